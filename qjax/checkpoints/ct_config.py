"""The ``quantization_config`` of compressed-tensors: which layer has which scheme.

A config is a set of groups; each has weights, activations, a storage format and targets (names,
``re:`` patterns or class names). What is not understood is refused with the key and the value.

References:
  compressed-tensors ``quantization/{quant_config,quant_args,quant_scheme}.py``, ``utils/match.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qjax.checkpoints.errors import CheckpointError
from qjax.formats import QuantFormat

_TOP_KEYS = {
    "quant_method",
    "version",
    "format",
    "quantization_status",
    "global_compression_ratio",
    "ignore",
    "kv_cache_scheme",
    "config_groups",
    "sparsity_config",
    # How transformers shall run the model; nothing about what is stored.
    "run_compressed",
    "dequantize",
    "use_optimized_inference",
}
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_ARGS_KEYS = {
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    # Of these the tensors themselves, or nothing any more, depends on:
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
}
# Storage format -> (type, legal bits) of the weights it can hold.
_STORAGE = {
    "pack-quantized": {"int": range(2, 9)},
    "int-quantized": {"int": range(2, 9)},
    "float-quantized": {"float": (8,)},
    "naive-quantized": {"int": range(2, 9), "float": (8,)},
    "nvfp4-pack-quantized": {"float": (4,)},
    "mxfp4-pack-quantized": {"float": (4,)},
    "mxfp8-quantized": {"float": (8,)},
}


@dataclass(frozen=True)
class Scheme:
    """How the layers of one config group are quantized and stored."""

    group: str
    storage: str
    fmt: QuantFormat
    """``scale_dtype`` is what the tensors say, not known yet here."""
    act_order: bool = False


@dataclass(frozen=True)
class CTConfig:
    """A parsed config."""

    schemes: Mapping[str, Scheme | None]
    """Target to scheme, in order of precedence; None: a group that leaves its layers alone."""
    ignore: tuple[str, ...]
    kv_dtype: str | None
    """Type of the cache which static scales belong to."""

    def scheme(self, layer: str) -> Scheme | None:
        """The scheme of a linear layer, or None if it is not quantized."""
        if any(_matches(layer, pattern) for pattern in self.ignore):
            return None
        for target, scheme in self.schemes.items():
            if _matches(layer, target):
                return scheme
        return None


def parse_config(config: Mapping[str, Any], where: str) -> CTConfig:
    """Parse a ``quantization_config``.

    Args:
      config: The object of config.json.
      where: File and method, which messages begin with.

    Raises:
      CheckpointError: If it is malformed or asks for something that is not supported.
    """
    _known_keys(config, _TOP_KEYS, where)
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise CheckpointError(
            f"{where}: sparsity_config={sparsity!r} is not supported; only dense weights are"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        raise CheckpointError(f"{where}: config_groups must be an object, it is {groups!r}")
    schemes: dict[str, Scheme | None] = {}
    for name, group in groups.items():
        place = f"{where}: config_groups.{name}"
        if not isinstance(group, Mapping):
            raise CheckpointError(
                f"{place} is {group!r}: preset names are not supported, write the scheme in full"
            )
        scheme = _scheme(name, group, config.get("format"), place)
        for target in _patterns(group.get("targets"), f"{place}.targets"):
            schemes[target] = scheme
    # Names before patterns before classes, and alphabetically among those, as upstream has it.
    order = sorted(schemes, key=lambda t: (t in _CLASSES, "re:" in t, t))
    ignore = _patterns(config.get("ignore") or [], f"{where}: ignore")
    kv = config.get("kv_cache_scheme")
    kv_dtype = None if kv is None else _kv_dtype(kv, f"{where}: kv_cache_scheme")
    return CTConfig({target: schemes[target] for target in order}, tuple(ignore), kv_dtype)


_CLASSES = ("Linear", "LinearBase")
"""Class names that stand for every linear layer."""


def _matches(layer: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return pattern == layer or pattern in _CLASSES


def _patterns(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{where} must be a list of names and patterns, it is {value!r}")
    for pattern in value:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as e:
                raise CheckpointError(f"{where}: {pattern!r} is no regular expression: {e}") from e
    return value


def _known_keys(config: Mapping[str, Any], known: set[str], where: str) -> None:
    for key, value in config.items():
        # Upstream writes every key it knows; an empty one asks for nothing.
        if key not in known and value not in (None, {}, [], False):
            raise CheckpointError(f"{where}: {key}={value!r} is not supported")


def _scheme(name: str, group: Mapping[str, Any], storage: Any, where: str) -> Scheme | None:
    _known_keys(group, _GROUP_KEYS, where)
    if group.get("output_activations") is not None:
        raise CheckpointError(
            f"{where}.output_activations={group['output_activations']!r}: quantized outputs are "
            "not supported"
        )
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        if inputs is not None:
            raise CheckpointError(
                f"{where}: input_activations without weights (quantized attention) are not "
                f"supported; targets={group.get('targets')!r}"
            )
        return None
    storage = group.get("format") or storage
    if not isinstance(storage, str) or storage not in _STORAGE:
        raise CheckpointError(
            f"{where}: format={storage!r} is not supported; supported are {', '.join(_STORAGE)}"
            + (" (each group of a mixed-precision model)" if storage == "mixed-precision" else "")
        )
    where = f"{where} ({storage})"
    fmt = _weights(weights, storage, f"{where}.weights")
    if inputs is not None:
        activation = _activations(inputs, fmt, f"{where}.input_activations")
        fmt = fmt.replace(activation=activation)
    return Scheme(name, storage, fmt, _args(weights, where)["actorder"] in ("group", "dynamic"))


def _args(args: Any, where: str) -> dict[str, Any]:
    """Checked and completed arguments of weights or activations."""
    if not isinstance(args, Mapping):
        raise CheckpointError(f"{where} must be an object, it is {args!r}")
    _known_keys(args, _ARGS_KEYS, where)
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    keys = ("strategy", "group_size", "block_structure", "actorder")
    full = {**defaults, **dict.fromkeys(keys), **args}
    size = full["group_size"]
    for key, kind in (("num_bits", int), ("symmetric", bool), ("type", str)):
        if type(full[key]) is not kind:
            raise CheckpointError(f"{where}.{key}={full[key]!r} must be of type {kind.__name__}")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise CheckpointError(f"{where}.group_size={size!r} must be a positive integer or -1")
    if full["strategy"] is None:
        full["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    if full["strategy"] in ("group", "tensor_group") and (size is None or size < 1):
        raise CheckpointError(f"{where}: strategy={full['strategy']!r} needs a group_size")
    return full


def _weights(value: Any, storage: str, where: str) -> QuantFormat:
    args = _args(value, where)
    bits, kind, strategy = args["num_bits"], args["type"], args["strategy"]
    if bits not in _STORAGE[storage].get(kind, ()):
        raise CheckpointError(f"{where}: num_bits={bits} type={kind!r} is not supported")
    if args["dynamic"] is not False:
        raise CheckpointError(f"{where}.dynamic={args['dynamic']!r}: weights must be static")
    if args["actorder"] not in (None, False, "weight", "static", "group", "dynamic"):
        raise CheckpointError(f"{where}.actorder={args['actorder']!r} is not supported")
    if kind == "float" and not args["symmetric"]:
        raise CheckpointError(f"{where}.symmetric=False is not supported for floats")
    if storage.startswith(("nvfp4", "mxfp")):
        wanted = ("tensor_group", 16) if storage.startswith("nvfp4") else ("group", 32)
        if (strategy, args["group_size"]) != wanted:
            raise CheckpointError(
                f"{where}: strategy={strategy!r} group_size={args['group_size']} is not "
                f"supported; this format has {wanted[0]!r} and {wanted[1]}"
            )
        scale = "float8_e4m3fn" if storage.startswith("nvfp4") else "float8_e8m0fnu"
        qtype = "float4_e2m1fn" if bits == 4 else "float8_e4m3fn"
        return QuantFormat(qtype, "group", group_size=wanted[1], scale_dtype=scale)
    qtype = f"int{bits}" if kind == "int" else "float8_e4m3fn"
    if strategy in ("tensor", "channel"):
        return QuantFormat(qtype, strategy, symmetric=args["symmetric"])
    if strategy == "group":
        return QuantFormat(
            qtype, "group", group_size=args["group_size"], symmetric=args["symmetric"]
        )
    if strategy == "block":
        rows, columns = _block(args["block_structure"], where)
        return QuantFormat(qtype, "block", block=(columns, rows), symmetric=args["symmetric"])
    raise CheckpointError(f"{where}.strategy={strategy!r} is not supported for weights")


def _block(value: Any, where: str) -> tuple[int, int]:
    """``(rows, columns)`` = (N, K) tile; older files write ``"128x128"``."""
    if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
        value = [int(part) for part in value.split("x")]
    if not (isinstance(value, list) and len(value) == 2):
        raise CheckpointError(f"{where}.block_structure={value!r} must be two positive integers")
    if not all(type(v) is int and v > 0 for v in value):
        raise CheckpointError(f"{where}.block_structure={value!r} must be two positive integers")
    return value[0], value[1]


def _activations(value: Any, weights: QuantFormat, where: str) -> QuantFormat | None:
    args = _args(value, where)
    bits, kind, strategy = args["num_bits"], args["type"], args["strategy"]
    if weights.bits == 4 and weights.is_float and kind == "float" and bits in (4, 8):
        # MXFP4 and NVFP4 run as W4A16: there is no fp4 arithmetic before Blackwell, and 16-bit
        # activations only add precision.
        return None
    if bits != 8 or kind not in ("int", "float"):
        raise CheckpointError(f"{where}: num_bits={bits} type={kind!r} is not supported")
    if not args["symmetric"]:
        raise CheckpointError(f"{where}.symmetric=False is not supported")
    if (kind == "float") != weights.is_float:
        raise CheckpointError(
            f"{where}.type={kind!r} with {weights.qtype} weights is not supported: both must be "
            "integers or both floats"
        )
    if args["dynamic"] not in (True, False):
        raise CheckpointError(f"{where}.dynamic={args['dynamic']!r} is not supported")
    qtype = "int8" if kind == "int" else "float8_e4m3fn"
    if strategy == "tensor":
        return QuantFormat(qtype, "tensor", dynamic=args["dynamic"])
    if not args["dynamic"]:
        raise CheckpointError(f"{where}: strategy={strategy!r} with dynamic=False is not supported")
    if strategy == "token":
        return QuantFormat(qtype, "token")
    if strategy == "group":
        size = args["group_size"]
        tile = weights.group_size if weights.block is None else weights.block[0]
        if tile not in (None, size):
            raise CheckpointError(
                f"{where}.group_size={size} with weight tiles of {tile} is not supported; they "
                "must be equal"
            )
        # MX activations share the type of their weights' scales.
        scale = weights.scale_dtype if weights.scale_dtype.startswith("float8") else "float32"
        return QuantFormat(qtype, "group", group_size=size, scale_dtype=scale)
    raise CheckpointError(f"{where}.strategy={strategy!r} is not supported for activations")


def _kv_dtype(value: Any, where: str) -> str | None:
    """Type of the cache; None if its scales are dynamic, so that none are stored."""
    args = _args(value, where)
    dtype = {("float", 8): "float8_e4m3fn", ("int", 8): "int8"}.get(
        (args["type"], args["num_bits"])
    )
    if dtype is None:
        raise CheckpointError(
            f"{where}: num_bits={args['num_bits']} type={args['type']!r} is not supported"
        )
    if not args["symmetric"]:
        raise CheckpointError(f"{where}.symmetric=False is not supported")
    if args["dynamic"] is not False:
        return None
    if args["strategy"] not in ("tensor", "attn_head"):
        raise CheckpointError(f"{where}.strategy={args['strategy']!r} is not supported")
    return dtype
