"""What the manifest of a native checkpoint says of each parameter, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.reader import KVScales
from qjax.formats import QuantFormat
from qjax.ops.packed import PackedWeight, pack_for_mosaic
from qjax.ops.packed_w8a8 import PackedW8A8
from qjax.pallas_kernels._layout import PACKING_VERSION
from qjax.quantize import is_quantized
from qjax.quantized_array import QuantizedArray

_FIELDS = ("qvalue", "scale", "zero_point", "perm", "global_scale", "act_scale")
_PACKED_FIELDS = ("words", "scales", "column", "perm", "act_scale")
_LAYOUTS = {"weight_only": PackedWeight, "w8a8": PackedW8A8}


class PackingVersionError(ValueError):
    """A weight is packed in a layout that this version does not have."""


def is_packed(value: Any) -> bool:
    """Whether a parameter is packed for kernels."""
    return isinstance(value, PackedWeight)


def is_leaf(value: Any) -> bool:
    """Whether a node of a parameter tree is one parameter."""
    return is_quantized(value) or is_packed(value)


def describe(value: Any) -> dict[str, Any]:
    """A parameter as the manifest has it."""
    fields = {
        field: {"dtype": str(jnp.dtype(array.dtype)), "shape": list(array.shape)}
        for field, array in parts(value).items()
    }
    if not is_leaf(value):
        return {"fields": fields}
    entry = {
        "format": dataclasses.asdict(value.fmt),
        "dtype": str(jnp.dtype(value.dtype)),
        "fields": fields,
    }
    if is_packed(value):
        entry["packing"] = {
            "version": PACKING_VERSION,
            "layout": next(name for name, kind in _LAYOUTS.items() if type(value) is kind),
            "tiles": list(value.tiles),
            "scale_dtype": str(jnp.dtype(value.scale_dtype)),
            "compute": value.compute,
        }
        if value.alternating:
            entry["packing"]["alternating"] = True
    return entry


def abstract(entry: Mapping[str, Any]) -> Any:
    """The inverse of ``describe``, with ``ShapeDtypeStruct`` for arrays.

    Raises:
      PackingVersionError: If it is packed in another layout.
      ValueError, KeyError, TypeError, AttributeError: If the entry is damaged.
    """
    fields = {}
    for name, field in entry["fields"].items():
        shape = tuple(int(size) for size in field["shape"])
        fields[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(field["dtype"]))
    if "format" not in entry:
        return fields["value"]
    known = _PACKED_FIELDS if "packing" in entry else _FIELDS
    unknown = fields.keys() - set(known)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    fmt, dtype = _format(entry["format"]), entry["dtype"]
    if "packing" in entry:
        return _packed(entry["packing"], fields, fmt, dtype)
    rest = {name: fields.get(name) for name in _FIELDS if name not in ("qvalue", "scale")}
    return QuantizedArray.make(fields["qvalue"], fields["scale"], fmt, dtype=dtype, **rest)


def _packed(
    packing: Mapping[str, Any], fields: Mapping[str, Any], fmt: QuantFormat, dtype: str
) -> PackedWeight:
    if packing["version"] != PACKING_VERSION:
        raise PackingVersionError(
            f"layout version {packing['version']!r} of packed weights; this qjax has version "
            f"{PACKING_VERSION}"
        )
    arrays: dict[str, Any] = {name: fields.get(name) for name in _PACKED_FIELDS}
    value = _LAYOUTS[packing["layout"]](
        **arrays,
        fmt=fmt,
        tiles=tuple(int(tile) for tile in packing["tiles"]),
        scale_dtype=jnp.dtype(packing["scale_dtype"]),
        compute=str(packing["compute"]),
        dtype=jnp.dtype(dtype),
        alternating=bool(packing.get("alternating", False)),
    )

    def again(packed: PackedWeight) -> PackedWeight:
        # Weights for 8-bit activations are packed in one way only.
        compute = packed.compute if fmt.activation is None else None
        alternating = packed.alternating
        return pack_for_mosaic(packed.unpack(), compute=compute, alternating=alternating)

    # Only a weight that comes from packing has this form: no other check is as complete.
    if jax.eval_shape(again, value) != value:
        raise ValueError(f"no weight of format {fmt.name} is packed as {dict(packing)}")
    return value


def _format(values: Mapping[str, Any]) -> QuantFormat:
    block, activation = values["block"], values["activation"]
    return QuantFormat(
        **{
            **values,
            "block": None if block is None else tuple(block),
            "activation": None if activation is None else _format(activation),
        }
    )


def parts(value: Any) -> dict[str, Any]:
    """Arrays of a parameter by field name."""
    if not is_leaf(value):
        return {"value": value}
    names = _PACKED_FIELDS if is_packed(value) else _FIELDS
    fields = {name: getattr(value, name) for name in names}
    return {name: array for name, array in fields.items() if array is not None}


def rebuild(value: Any, arrays: Mapping[str, Any]) -> Any:
    """A parameter like ``value`` that holds other arrays."""
    return dataclasses.replace(value, **arrays) if is_leaf(value) else arrays["value"]


def kv_json(scales: KVScales) -> dict[str, Any]:
    """KV cache scales as the manifest has them."""
    # Python prints float32 numbers so that they are read back exactly.
    lists = {name: [s.tolist() for s in getattr(scales, name)] for name in ("keys", "values")}
    return {"dtype": scales.dtype, **lists}


def kv_scales(values: Mapping[str, Any]) -> KVScales:
    """The inverse of ``kv_json``."""
    keys, vals = (
        tuple(np.asarray(s, np.float32) for s in values[name]) for name in ("keys", "values")
    )
    return KVScales(keys, vals, str(values["dtype"]))
