"""Writes GPTQ checkpoints, v1 where every reader agrees on the zero points and v2 otherwise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.gptq import SCALE_DTYPES, layer_shapes, pack_layer
from qjax.checkpoints.gptq_config import V1, V2, GptqLayer
from qjax.checkpoints.writer import Linears, TensorSpec
from qjax.quantized_array import QuantizedArray


def unwritable_reason(q: QuantizedArray) -> str | None:
    """Why integer formats with one scale per group cannot hold ``q``; None if they can.

    Also used for AWQ, whose tensors mean the same.
    """
    fmt = q.fmt
    if q.ndim != 2:
        return f"its shape {q.shape} is no matrix"
    if not fmt.is_int:
        return f"its codes are {fmt.qtype}, not integers"
    if fmt.activation is not None or q.act_scale is not None:
        return "its activations are quantized too, and the format stores weights only"
    if fmt.granularity not in ("channel", "group"):
        return f"its scales are per {fmt.granularity}; only per channel and per group are stored"
    if q.global_scale is not None:
        return "it has a second scale for the whole tensor"
    if fmt.scale_dtype not in SCALE_DTYPES.values():
        return f"its scales are {fmt.scale_dtype}; stored are {', '.join(SCALE_DTYPES.values())}"
    k, n = q.shape
    groups = 1 if fmt.group_size is None else -(-k // fmt.group_size)
    if q.scale.shape != (groups, n):
        return f"its scales have shape {q.scale.shape}, stored are {(groups, n)}"
    if q.zero_point is not None:
        half, zeros = 2 ** (fmt.bits - 1), np.asarray(q.zero_point)
        if zeros.min() < -half or zeros.max() >= half:
            return f"its zero points, {zeros.min()} to {zeros.max()}, do not fit {fmt.bits} bits"
    return None


def settings_of(q: QuantizedArray) -> GptqLayer:
    """How an array is described in the config."""
    return GptqLayer(q.fmt.bits, q.fmt.group_size, q.fmt.symmetric, None)


class GptqWriter:
    """Writer of one GPTQ checkpoint.

    The most frequent combination of bits, group size and symmetry becomes the base of the config,
    others and layers that are not quantized become ``dynamic`` patterns.

    Args:
      linears: All linear layers.
      checkpoint_format: ``"gptq"`` (v1), ``"gptq_v2"``, or None for v1 unless a zero point is 0.
        An explicit v1 is obeyed even then, with GPTQModel's borrow across fields: GPTQModel and
        qjax read it back exactly, engines which add 1 to each field do not.

    Raises:
      CheckpointError: If a layer cannot be stored; names it and the reason.
    """

    def __init__(self, linears: Linears, *, checkpoint_format: str | None = None):
        if checkpoint_format not in (None, V1, V2):
            raise CheckpointError(f"{checkpoint_format=} must be {V1!r}, {V2!r} or None")
        if linears.kv_scales is not None:
            raise CheckpointError(
                "gptq has no place for KV cache scales; use compressed-tensors, or leave them out"
            )
        for layer, q in linears.quantized.items():
            reason = unwritable_reason(q)
            if reason is not None:
                raise CheckpointError(f"gptq cannot store {layer}: {reason}")
            layer_shapes(settings_of(q), (q.shape[0], q.shape[1]), layer)
        self._linears = linears
        if checkpoint_format is None:
            borrow = any(_has_zero_zero_point(q) for q in linears.quantized.values())
            checkpoint_format = V2 if borrow else V1
        self.checkpoint_format = checkpoint_format

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        quantized = self._linears.quantized
        settings = {layer: settings_of(q) for layer, q in quantized.items()}
        inside = [s for layer, s in settings.items() if layer != "lm_head"] or [*settings.values()]
        base = Counter(inside).most_common(1)[0][0]
        config: dict[str, Any] = {
            "quant_method": "gptq",
            **_values(base),
            "desc_act": any(q.perm is not None for q in quantized.values()),
            "lm_head": "lm_head" in quantized,
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["qjax"]},
        }
        every: dict[str, GptqLayer | None] = dict(settings)
        every.update({layer: None for layer in self._linears.plain if layer != "lm_head"})
        dynamic = _dynamic(every, base)
        if dynamic:
            config["dynamic"] = dynamic
        return config

    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """AutoGPTQ and GPTQModel read this one; the others read config.json."""
        return {"quantize_config.json": self.config()}

    def layout(self, layer: str, q: QuantizedArray) -> Mapping[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors."""
        shapes = layer_shapes(settings_of(q), (q.shape[0], q.shape[1]), layer)
        scale = np.dtype(q.scale.dtype)
        return {
            f"{layer}.{suffix}": TensorSpec(scale if suffix == "scales" else np.dtype("i4"), shape)
            for suffix, shape in shapes.items()
        }

    def tensors(self, layer: str, q: QuantizedArray) -> Mapping[str, np.ndarray]:
        """The tensors of one layer."""
        return {f"{layer}.{s}": t for s, t in pack_layer(q, self.checkpoint_format).items()}

    def extra(self) -> Mapping[str, np.ndarray]:
        """Nothing else."""
        return {}


def _has_zero_zero_point(q: QuantizedArray) -> bool:
    if q.zero_point is None:
        return False
    return bool(np.asarray(q.zero_point).min() == -(2 ** (q.fmt.bits - 1)))


def _values(settings: GptqLayer) -> dict[str, Any]:
    group_size = -1 if settings.group_size is None else settings.group_size
    return {"bits": settings.bits, "group_size": group_size, "sym": settings.sym}


def _dynamic(layers: Mapping[str, GptqLayer | None], base: GptqLayer) -> dict[str, Any]:
    """Patterns of the layers which differ from the base: one for all blocks where it can be."""
    families: dict[str, list[str]] = {}
    for layer in layers:
        families.setdefault(re.sub(r"\.\d+\.", ".#.", layer), []).append(layer)
    dynamic: dict[str, Any] = {}
    for family, members in families.items():
        if len({layers[layer] for layer in members}) == 1:
            patterns = {re.escape(family).replace(r"\.\#\.", r"\.\d+\."): layers[members[0]]}
        else:
            patterns = {re.escape(layer): layers[layer] for layer in members}
        for pattern, settings in patterns.items():
            if settings is None:
                dynamic[f"-:^{pattern}$"] = {}
            elif settings != base:
                dynamic[f"+:^{pattern}$"] = _values(settings)
    return dynamic
