"""Static scales of the KV cache, in every spelling that checkpoints have used.

=====================================  ==========================================================
below ``model.layers.i.self_attn.``    written by
=====================================  ==========================================================
``k_scale`` ``v_scale``                compressed-tensors, HF fp8
``attn.k_scale`` ``attn.v_scale``      vLLM's own names
``k_proj.k_scale`` ``v_proj.v_scale``  modelopt
``k_proj.output_scale`` (and v_proj)   older compressed-tensors
``kv_scale`` ``attn.kv_scale``         older fp8 files: one number for keys and values
=====================================  ==========================================================

Engines take 1.0 where a scale is missing or -1; here that is an error, because a wrong scale shows
only as worse text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoints.errors import CheckpointError
from qjax.checkpoints.reader import GetTensor, KVScales
from qjax.checkpoints.safetensors_io import TensorInfo
from qjax.checkpoints.scales import only_zeros

_SPELLINGS = (
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("kv_scale", "kv_scale"),
    ("attn.kv_scale", "attn.kv_scale"),
)
_ZERO_POINTS = (
    "k_zero_point",
    "v_zero_point",
    "k_proj.output_zero_point",
    "v_proj.output_zero_point",
)
# Queries and probabilities stay in 16 bits here, so the scales for them have nothing to multiply.
_UNUSED = ("q_scale", "attn.q_scale", "prob_scale", "attn.prob_scale")


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def kv_scale_names(tensors: Mapping[str, TensorInfo], num_layers: int) -> frozenset[str]:
    """Names in the checkpoint which belong to the KV cache."""
    suffixes = {s for pair in _SPELLINGS for s in pair} | {*_ZERO_POINTS, *_UNUSED}
    names = (_prefix(i) + s for i in range(num_layers) for s in suffixes)
    return frozenset(name for name in names if name in tensors)


def read_kv_scales(
    tensors: Mapping[str, TensorInfo],
    get: GetTensor,
    num_layers: int,
    num_kv_heads: int,
    *,
    dtype: str = "float8_e4m3fn",
    declared: str | None = None,
) -> KVScales | None:
    """Static scales of all layers.

    Args:
      tensors: Headers of the checkpoint.
      get: Reads a tensor.
      num_layers: Decoder layers.
      num_kv_heads: KV heads of each.
      dtype: Type of the cache the scales were made for.
      declared: What says that there are static scales, such as ``"kv_cache_scheme"``; None if
        nothing does, and then their absence is no error.

    Returns:
      The scales, or None where there are none.

    Raises:
      CheckpointError: If some are missing, disagree, or are no positive finite numbers.
    """
    pairs = [_layer_scales(tensors, get, i, num_kv_heads) for i in range(num_layers)]
    missing = [i for i, pair in enumerate(pairs) if pair is None]
    if len(missing) == num_layers:
        if declared is None:
            return None
        raise CheckpointError(
            f"{declared} announces static KV cache scales and the checkpoint holds none (looked "
            f"for {_prefix(0)}k_scale and older names); remove that key to use a cache without "
            "stored scales"
        )
    if missing:
        raise CheckpointError(
            f"layers {missing} have no KV cache scale while others have; expected such as "
            f"{_prefix(missing[0])}k_scale and v_scale"
        )
    for layer in range(num_layers):
        names = (_prefix(layer) + s for s in _ZERO_POINTS)
        only_zeros((name for name in names if name in tensors), get)
    present = [pair for pair in pairs if pair is not None]
    return KVScales(tuple(k for k, _ in present), tuple(v for _, v in present), dtype)


def _layer_scales(
    tensors: Mapping[str, TensorInfo], get: GetTensor, layer: int, num_kv_heads: int
) -> tuple[np.ndarray, np.ndarray] | None:
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for pair in _SPELLINGS:
        names = [_prefix(layer) + suffix for suffix in pair]
        there = [name for name in names if name in tensors]
        if there and len(there) < len(names):
            (lost,) = set(names) - set(there)
            raise CheckpointError(f"{there[0]} is there but {lost} is not; both are needed")
        if there:
            key, value = (_per_head(name, get(name), num_kv_heads) for name in names)
            found[names[0]] = (key, value)
    if not found:
        return None
    (first, result), *others = found.items()
    for other, pair in others:
        if not (np.array_equal(pair[0], result[0]) and np.array_equal(pair[1], result[1])):
            raise CheckpointError(f"{first} and {other} both give KV cache scales and they differ")
    return result


def _per_head(name: str, array: np.ndarray, num_kv_heads: int) -> np.ndarray:
    if array.size not in (1, num_kv_heads):
        raise CheckpointError(
            f"{name} of shape {array.shape} must hold one scale or one per KV head, {num_kv_heads}"
        )
    values: Any = array.reshape(-1).astype(np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise CheckpointError(
            f"{name} holds {values.tolist()}: a scale must be positive and finite (-1 means that "
            "it was never calibrated); calibrate again or remove these tensors"
        )
    return np.array(np.broadcast_to(values, (num_kv_heads,)))
