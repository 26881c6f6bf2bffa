"""Writes Hugging Face ``fp8`` checkpoints: the inverse of ``fp8``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoints.ct_writer import act_scale, pack_kv_scales
from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.scales import tile_counts
from qjax.checkpoints.writer import Linears, TensorSpec
from qjax.formats import FP8_PER_TENSOR, FP8_PER_TOKEN, QuantFormat
from qjax.quantized_array import QuantizedArray

_QTYPES = ("float8_e4m3fn", "float8_e5m2")


def unwritable_reason(q: QuantizedArray) -> str | None:
    """Why an array cannot be stored as HF fp8 without changing it; None if it can."""
    fmt = q.fmt
    if q.ndim != 2 or fmt.qtype not in _QTYPES:
        return f"{fmt.name} of shape {q.shape}: only fp8 matrices (in, out) are"
    if fmt.granularity not in ("tensor", "channel", "block"):
        return f"{fmt.granularity!r} scales: only per tensor, channel or block"
    if fmt.scale_dtype not in ("float32", "bfloat16", "float16", "float8_e8m0fnu"):
        return f"{fmt.scale_dtype} scales"
    counts = tile_counts(fmt, (q.shape[0], q.shape[1]))
    if q.scale.shape != counts[::-1]:
        return f"its scales have shape {q.scale.shape}, {fmt.name} stores {counts[::-1]}"
    if q.perm is not None or q.global_scale is not None:
        return "a permutation or a global scale"
    act = fmt.activation
    if fmt.block is not None:
        wanted = QuantFormat(FP8_PER_TOKEN.qtype, "group", group_size=fmt.block[0])
        if act != wanted:
            return f"blocks without dynamic activations in groups of {fmt.block[0]}"
    elif act not in (FP8_PER_TOKEN, FP8_PER_TENSOR):
        return (
            f"{'unquantized' if act is None else act.name} activations: readers of this format "
            "quantize them to fp8 per token or per tensor; write compressed-tensors"
        )
    if (act == FP8_PER_TENSOR) != (q.act_scale is not None):
        return "a static activation scale without static activations, or the reverse"
    return None


class Fp8Writer:
    """Writer of one HF fp8 checkpoint. All layers must have the same type, tile and activations.

    Args:
      linears: All linear layers.

    Raises:
      CheckpointError: If a layer cannot be stored; names it and the reason.
    """

    def __init__(self, linears: Linears):
        kinds: dict[tuple[Any, ...], str] = {}
        for layer, q in linears.quantized.items():
            reason = unwritable_reason(q)
            if reason is not None:
                raise CheckpointError(f"HF fp8 cannot store {layer}: {reason}")
            exponents = q.fmt.scale_dtype == "float8_e8m0fnu"
            kinds.setdefault((q.fmt.qtype, q.fmt.block, q.act_scale is not None, exponents), layer)
        if len(kinds) != 1:
            raise CheckpointError(
                "HF fp8 says once for all layers how they are quantized; found "
                + (", ".join(f"{layer}: {kind}" for kind, layer in kinds.items()) or "no layer")
            )
        scales = linears.kv_scales
        if scales is not None and scales.dtype != "float8_e4m3fn":
            raise CheckpointError(f"HF fp8 has float8_e4m3fn KV caches only, not {scales.dtype}")
        ((self._kind, _),) = kinds.items()
        self._linears = linears

    def config(self) -> dict[str, Any]:
        """``quantization_config`` of config.json."""
        qtype, block, static, exponents = self._kind
        skipped = list(self._linears.plain)
        if "lm_head" not in self._linears.quantized:
            skipped = list(dict.fromkeys([*skipped, "lm_head"]))
        return {
            "quant_method": "fp8",
            "activation_scheme": "static" if static else "dynamic",
            "fmt": qtype.removeprefix("float8_").removesuffix("fn"),
            "scale_fmt": "ue8m0" if exponents else "float",
            "weight_block_size": None if block is None else [block[1], block[0]],
            # vLLM and SGLang read the first name, transformers the second.
            "ignored_layers": skipped,
            "modules_to_not_convert": skipped,
        }

    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """No further files."""
        return {}

    def layout(self, layer: str, q: QuantizedArray) -> Mapping[str, TensorSpec]:
        """Names, types and shapes of a layer's tensors."""
        k, n = q.shape
        shape = () if q.fmt.granularity == "tensor" else tile_counts(q.fmt, (k, n))
        specs = {
            f"{layer}.weight": TensorSpec(np.dtype(q.fmt.qtype), (n, k)),
            f"{layer}.{_scale_name(q)}": TensorSpec(np.dtype(q.fmt.scale_dtype), shape),
        }
        if q.act_scale is not None:
            specs[f"{layer}.input_scale"] = TensorSpec(act_scale(q).dtype, ())
        return specs

    def tensors(self, layer: str, q: QuantizedArray) -> Mapping[str, np.ndarray]:
        """The tensors of one layer."""
        scale = np.ascontiguousarray(np.asarray(q.scale).T)
        tensors = {
            f"{layer}.weight": np.ascontiguousarray(np.asarray(q.qvalue).T),
            f"{layer}.{_scale_name(q)}": (
                scale.reshape(()) if q.fmt.granularity == "tensor" else scale
            ),
        }
        if q.act_scale is not None:
            tensors[f"{layer}.input_scale"] = act_scale(q).reshape(())
        return tensors

    def extra(self) -> Mapping[str, np.ndarray]:
        """KV cache scales."""
        scales = self._linears.kv_scales
        return {} if scales is None else pack_kv_scales(scales)


def _scale_name(q: QuantizedArray) -> str:
    return "weight_scale" if q.fmt.block is None else "weight_scale_inv"
