"""Writes compressed-tensors: the inverse of ``compressed_tensors``, for exchange with engines.

Files, shards and tokenizer are the business of ``writer``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qjax.checkpoints.bitpack import pack, pack_columns, packed_size, to_unsigned
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import KVScales
from qjax.checkpoints.scales import tile_counts
from qjax.checkpoints.writer import Linears, TensorSpec
from qjax.formats import QuantFormat
from qjax.quantized_array import QuantizedArray

VERSION = "0.19.0"
"""The compressed-tensors version whose layout is written."""

_ORDINARY_SCALES = ("float32", "bfloat16", "float16")

NVFP4 = QuantFormat("float4_e2m1fn", "group", group_size=16, scale_dtype="float8_e4m3fn")


def storage_format(fmt: QuantFormat) -> str:
    """The storage format upstream would choose."""
    if fmt.is_int:
        packed = fmt.activation is None and fmt.granularity != "block"
        return "pack-quantized" if packed else "int-quantized"
    if fmt.bits == 4:
        nvfp4 = fmt.scale_dtype == "float8_e4m3fn"
        return "nvfp4-pack-quantized" if nvfp4 else "mxfp4-pack-quantized"
    if fmt.scale_dtype == "float8_e8m0fnu":
        return "mxfp8-quantized"
    return "naive-quantized" if fmt.activation is None else "float-quantized"


def unwritable_reason(q: QuantizedArray) -> str | None:
    """Why an array cannot be stored as compressed-tensors without changing it; None if it can."""
    fmt = q.fmt
    if q.ndim != 2:
        return f"shape {q.shape}: only matrices (in, out) are written"
    if fmt.qtype == "float8_e5m2":
        return "float8_e5m2: the format has 8-bit floats of type e4m3 only"
    if (fmt == NVFP4) != (q.global_scale is not None):
        has = "without" if q.global_scale is None else "with"
        return f"{fmt.name} {has} a global scale: NVFP4 has one, other formats have not"
    if q.global_scale is not None:
        if global_divisor(q.global_scale) is None:
            return (
                f"its global scale, {float(q.global_scale)!r}, is the reciprocal of no float32 "
                "number: the format stores the reciprocal, and it would read back as another scale"
            )
    elif fmt.scale_dtype not in _ORDINARY_SCALES:
        if fmt.scale_dtype != "float8_e8m0fnu" or fmt.is_int or fmt.group_size != 32:
            return f"{fmt.name} with {fmt.scale_dtype} scales: only MXFP4 and MXFP8 have such"
    elif fmt.is_float and fmt.bits == 4:
        return f"{fmt.name} with {fmt.scale_dtype} scales: fp4 needs e8m0 scales (MXFP4)"
    if fmt.granularity == "token":
        return "one scale per token is for activations"
    counts = tile_counts(fmt, (q.shape[0], q.shape[1]))
    if q.scale.shape != counts[::-1]:
        return f"its scales have shape {q.scale.shape}, {fmt.name} stores {counts[::-1]}"
    if fmt.is_float and fmt.bits == 4 and q.shape[0] % 2:
        return f"shape {q.shape}: two fp4 codes make a byte, so K must be even"
    if q.perm is not None and fmt.group_size is None:
        return f"a permutation with {fmt.granularity} scales: only groups have an order"
    if q.perm is not None and storage_format(fmt) != "pack-quantized":
        return f"a permutation in {storage_format(fmt)}: only packed integers have an order"
    if fmt.is_int and fmt.bits < 8 and fmt.granularity == "block":
        return f"{fmt.name}: blocks are stored for 8 bits only"
    if fmt.activation is not None:
        return _unwritable_activation(q, fmt.activation)
    if q.act_scale is not None:
        return "a static activation scale without an activation format"
    return None


def _unwritable_activation(q: QuantizedArray, act: QuantFormat) -> str | None:
    if act.qtype not in ("int8", "float8_e4m3fn") or not act.symmetric:
        return f"{act.name} activations: only symmetric int8 and float8_e4m3fn are"
    if act.is_float != q.fmt.is_float:
        return f"{act.name} activations with {q.fmt.name} weights"
    if act.granularity not in ("token", "tensor", "group"):
        return f"{act.name} activations: only per token, tensor or group"
    if not act.dynamic and (act.granularity != "tensor" or q.act_scale is None):
        return f"{act.name}: static activations need one scale per tensor, stored with the weight"
    if act.dynamic and q.act_scale is not None:
        return f"{act.name} is dynamic, but the weight carries a static activation scale"
    return None


def global_divisor(scale: Any, stored: np.ndarray | None = None) -> np.ndarray | None:
    """What the format stores for a global scale: a number whose float32 reciprocal is the scale.

    17 % of all scales are the reciprocal of two float32 numbers, and 17 % of none.

    Args:
      scale: Float32 scalar, as ``QuantizedArray`` has it.
      stored: What a checkpoint held that the layer comes from; preferred if it is one of those.

    Returns:
      The number, float32 of shape ``(1,)`` or that of ``stored``; None if there is none.
    """
    scale = np.asarray(scale, np.float32)
    if not (np.isfinite(scale) and scale > 0):
        return None
    one = np.ones(1, np.float32)
    with np.errstate(over="ignore"):  # scales too small to have a reciprocal
        near = one / scale
        candidates = [near, np.nextafter(near, one * 0), np.nextafter(near, one * np.inf)]
        if stored is not None and stored.dtype == np.float32 and stored.size == 1:
            candidates.insert(0, stored)
        for divisor in candidates:
            if 0 < divisor.item() < np.inf and (one / divisor).item() == scale.item():
                return divisor
    return None


def layer_specs(q: QuantizedArray, divisor: np.ndarray | None = None) -> dict[str, TensorSpec]:
    """Types and shapes of what ``pack_layer`` returns for the same arguments."""
    fmt, (k, n) = q.fmt, q.shape
    storage = storage_format(fmt)
    rows, groups = tile_counts(fmt, (k, n))
    scale_shape = (1,) if fmt.granularity == "tensor" else (rows, groups)
    exponents = fmt.scale_dtype == "float8_e8m0fnu"
    scale_type = np.dtype(np.uint8 if exponents else fmt.scale_dtype)
    specs = {"weight_scale": TensorSpec(scale_type, scale_shape)}
    if storage == "pack-quantized":
        specs["weight_packed"] = TensorSpec(np.dtype("i4"), (n, packed_size(k, fmt.bits)))
        specs["weight_shape"] = TensorSpec(np.dtype("i8"), (2,))
    elif fmt.bits == 4 and fmt.is_float:
        specs["weight_packed"] = TensorSpec(np.dtype("u1"), (n, k // 2))
    else:
        plain = np.int8 if fmt.is_int else fmt.qtype
        specs["weight"] = TensorSpec(np.dtype(plain), (n, k))
    if q.zero_point is not None:
        specs["weight_zero_point"] = TensorSpec(np.dtype("i1"), scale_shape)
        if _packs_zero_points(fmt):
            packed = (packed_size(rows, fmt.bits), groups)
            specs["weight_zero_point"] = TensorSpec(np.dtype("i4"), packed)
    if q.perm is not None:
        specs["weight_g_idx"] = TensorSpec(np.dtype("i4"), (k,))
    if q.global_scale is not None:
        stored = global_divisor(q.global_scale, divisor)
        assert stored is not None  # unwritable_reason
        specs["weight_global_scale"] = TensorSpec(stored.dtype, stored.shape)
    if q.act_scale is not None:
        specs["input_scale"] = TensorSpec(act_scale(q).dtype, (1,))
    return specs


def _packs_zero_points(fmt: QuantFormat) -> bool:
    packed = storage_format(fmt) == "pack-quantized"
    return packed and fmt.granularity in ("group", "channel")


def pack_layer(q: QuantizedArray, divisor: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Tensors of one layer, without its name in front.

    Args:
      q: Kernel ``(K, N)`` that ``unwritable_reason`` has nothing against.
      divisor: The stored global scale of the checkpoint that it comes from, if there is one.

    Returns:
      ``weight_packed`` or ``weight``, ``weight_scale`` and what else the format has.
    """
    fmt, (k, n) = q.fmt, q.shape
    codes = np.asarray(q.qvalue)  # (K, N)
    scale = np.ascontiguousarray(np.asarray(q.scale).T)
    storage = storage_format(fmt)
    tensors: dict[str, np.ndarray] = {}
    if q.perm is not None:
        perm = np.asarray(q.perm)
        original = np.empty_like(codes)
        original[perm] = codes
        codes = original
        g_idx = np.empty(k, np.int32)
        g_idx[perm] = np.arange(k, dtype=np.int32) // (fmt.group_size or k)
        tensors["weight_g_idx"] = g_idx
    if storage == "pack-quantized":
        tensors["weight_packed"] = pack_columns(codes, fmt.bits, signed=True)
        tensors["weight_shape"] = np.array([n, k], np.int64)
    elif fmt.bits == 4 and fmt.is_float:
        nibbles = codes.view(np.uint8)
        tensors["weight_packed"] = pack_columns(nibbles, 4, signed=False, dtype=np.uint8)
    else:
        plain = codes.astype(np.int8) if fmt.is_int else codes
        tensors["weight"] = np.ascontiguousarray(plain.T)
    if q.zero_point is not None:
        zero_point = np.ascontiguousarray(np.asarray(q.zero_point).T)
        if _packs_zero_points(fmt):
            zero_point = pack(to_unsigned(zero_point, fmt.bits), fmt.bits, axis=0)
        tensors["weight_zero_point"] = _flat(zero_point, fmt)
    if scale.dtype == ml_dtypes.float8_e8m0fnu:
        scale = scale.view(np.uint8)
    tensors["weight_scale"] = _flat(scale, fmt)
    if q.global_scale is not None:
        stored = global_divisor(q.global_scale, divisor)
        assert stored is not None  # unwritable_reason
        tensors["weight_global_scale"] = np.array(stored)
    if q.act_scale is not None:
        tensors["input_scale"] = act_scale(q).reshape(1)
    return tensors


def act_scale(q: QuantizedArray) -> np.ndarray:
    """The static activation scale in the type of the weight's scales, where that loses nothing.

    Writers use one type for both, and in memory this one is always float32.
    """
    scale = np.asarray(q.act_scale, np.float32)
    if q.fmt.scale_dtype in _ORDINARY_SCALES:
        narrow = scale.astype(np.dtype(q.fmt.scale_dtype))
        if narrow.astype(np.float32) == scale:
            return narrow
    return scale


def _flat(scale: np.ndarray, fmt: QuantFormat) -> np.ndarray:
    return scale.reshape(1) if fmt.granularity == "tensor" else scale


def pack_kv_scales(scales: KVScales) -> dict[str, np.ndarray]:
    """Tensors of static KV cache scales, under their full names."""
    tensors = {}
    per_head = _per_head(scales)
    for letter, layers in (("k", scales.keys), ("v", scales.values)):
        for layer, scale in enumerate(layers):
            stored = scale.reshape(-1, 1, 1) if per_head else scale[:1]
            name = f"model.layers.{layer}.self_attn.{letter}_scale"
            tensors[name] = np.ascontiguousarray(stored, np.float32)
    return tensors


def _per_head(scales: KVScales) -> bool:
    return any((scale != scale[0]).any() for scale in (*scales.keys, *scales.values))


class CompressedTensorsWriter:
    """Writer of one compressed-tensors checkpoint.

    Layers of the most frequent scheme are targeted by their class, ``Linear``, others by name.

    Args:
      linears: All linear layers.

    Raises:
      CheckpointError: If a layer cannot be stored; names it and the reason.
    """

    def __init__(self, linears: Linears):
        for layer, q in linears.quantized.items():
            reason = unwritable_reason(q)
            if reason is not None:
                raise CheckpointError(f"compressed-tensors cannot store {layer}: {reason}")
        if not linears.quantized:
            raise CheckpointError("no layer is quantized; write a plain checkpoint instead")
        scales = linears.kv_scales
        if scales is not None and scales.dtype not in ("float8_e4m3fn", "int8"):
            raise CheckpointError(
                f"compressed-tensors has no {scales.dtype} KV cache; float8_e4m3fn and int8 are"
            )
        self._linears = linears

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        schemes = {layer: _scheme_key(q) for layer, q in self._linears.quantized.items()}
        groups: dict[str, Any] = {}
        for i, (scheme, _) in enumerate(Counter(schemes.values()).most_common()):
            fmt, ordered = scheme
            names = [name for name, other in schemes.items() if other == scheme]
            groups[f"group_{i}"] = {
                "format": storage_format(fmt),
                "input_activations": None if fmt.activation is None else _args(fmt.activation),
                "output_activations": None,
                "targets": names if i else ["Linear"],
                "weights": _args(fmt, weights=True, ordered=ordered),
            }
        formats = list(dict.fromkeys(group["format"] for group in groups.values()))
        scales = self._linears.kv_scales
        kv_scheme = None
        if scales is not None:
            kv_scheme = _args(QuantFormat(scales.dtype, "tensor", dynamic=False))
            if _per_head(scales):
                kv_scheme["strategy"] = "attn_head"
        # A tied output layer has no tensors, but engines have a layer of that name.
        ignore = list(self._linears.plain)
        if "lm_head" not in self._linears.quantized:
            ignore = list(dict.fromkeys([*ignore, "lm_head"]))
        return {
            "config_groups": groups,
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "global_compression_ratio": None,
            "ignore": ignore,
            "kv_cache_scheme": kv_scheme,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": VERSION,
        }

    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """No further files."""
        return {}

    def layout(self, layer: str, q: QuantizedArray) -> Mapping[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors."""
        specs = layer_specs(q, self._divisor(layer))
        return {f"{layer}.{suffix}": spec for suffix, spec in specs.items()}

    def tensors(self, layer: str, q: QuantizedArray) -> Mapping[str, np.ndarray]:
        """The tensors of one layer."""
        made = pack_layer(q, self._divisor(layer))
        return {f"{layer}.{suffix}": array for suffix, array in made.items()}

    def _divisor(self, layer: str) -> np.ndarray | None:
        return self._linears.origin.get(f"{layer}.weight_global_scale")

    def extra(self) -> Mapping[str, np.ndarray]:
        """KV cache scales."""
        scales = self._linears.kv_scales
        return {} if scales is None else pack_kv_scales(scales)


def _scheme_key(q: QuantizedArray) -> tuple[QuantFormat, bool]:
    """What the config says of a layer; tensors tell the type of ordinary scales and their steps."""
    ordinary = q.fmt.scale_dtype in _ORDINARY_SCALES
    changes = {"scale_dtype": "float32", "scale_steps": None} if ordinary else {}
    return q.fmt.replace(**changes), q.perm is not None


def _args(fmt: QuantFormat, *, weights: bool = False, ordered: bool = False) -> dict[str, Any]:
    stored = {"float8_e8m0fnu": "torch.uint8", "float8_e4m3fn": "torch.float8_e4m3fn"}
    return {
        "actorder": "group" if ordered else None,
        "block_structure": None if fmt.block is None else [fmt.block[1], fmt.block[0]],
        "dynamic": fmt.dynamic and not weights,
        "group_size": fmt.group_size,
        "num_bits": fmt.bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": stored.get(fmt.scale_dtype),
        "strategy": "tensor_group" if fmt == NVFP4 else fmt.granularity,
        "symmetric": fmt.symmetric,
        "type": "float" if fmt.is_float else "int",
        "zp_dtype": None if fmt.symmetric else "torch.int8",
    }
