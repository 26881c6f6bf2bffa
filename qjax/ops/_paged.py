"""Backends of ``paged_attention``: their choice, and the decode kernel's side of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.kv_cache import QuantizedKVCache
from qjax.ops._dispatch import choose_backend, kernels_by_default
from qjax.ops._prefill import prefill_unsupported_reason
from qjax.ops.key_bias import KeyBias
from qjax.pallas_kernels import paged_decode
from qjax.typing import Array

# Largest additive term of a step, for every query head and position of the page tables. What is
# larger, such as 256 sequences of up to 131072 tokens, might not fit beside the model.
_MAX_BIAS_BYTES = 1 << 30


def choose_attention_backend(
    q: Array,
    cache: QuantizedKVCache,
    layer: int,
    window: int | None,
    soft_cap: float | None,
    *,
    consecutive: bool,
    backend: str | None,
) -> str:
    """``"mosaic_gpu"``, ``"cudnn"`` or ``"xla"``; arguments and errors as ``paged_attention``."""
    if backend == "cudnn" or backend is None and kernels_by_default():
        reason = prefill_unsupported_reason(q, cache, layer, window, soft_cap)
        if reason is None and not consecutive:
            reason = "positions that need not be consecutive; cuDNN is for consecutive=True"
        if reason is None:
            return "cudnn"
        if backend == "cudnn":
            raise NotImplementedError(f"paged_attention: cudnn cannot run here: {reason}")
    reason = paged_attention_unsupported_reason(q, cache, layer)
    return choose_backend("paged_attention", backend, reason)


def paged_attention_unsupported_reason(
    q: Array, cache: QuantizedKVCache, layer: int, *, interpret: bool = False
) -> str | None:
    """Why the decode kernel cannot compute ``paged_attention`` of these arguments; None if it can.

    Args:
      q: Queries ``[b, t, q_heads, head_dim]``.
      cache: The cache.
      layer: Layer index.
      interpret: For the Pallas interpreter, which needs no GPU.
    """
    if q.shape[1] != 1:
        return f"t={q.shape[1]} new tokens per row; the kernel is for one"
    problem = decode_problem(q, cache, layer)
    reason = paged_decode.unsupported_reason(problem)
    size = 4 * problem.batch * problem.kv_heads * problem.ratio * _bias_length(cache)
    if reason is None and problem.logit_bias and size > _MAX_BIAS_BYTES:
        reason = (
            f"keys stored without their bias, whose logits would take {size} bytes; the limit is "
            f"{_MAX_BIAS_BYTES}"
        )
    if reason is not None:
        return reason
    if not interpret:
        return mosaic_gpu_unsupported_reason()
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, MOSAIC_GPU_MIN_JAX))}"
    return None


def decode_problem(q: Array, cache: QuantizedKVCache, layer: int) -> paged_decode.Problem:
    """One decode step in the kernel's terms, for its configs; arguments as ``paged_attention``."""
    fmt = cache.formats[layer]
    return paged_decode.Problem(
        batch=q.shape[0],
        kv_heads=cache.num_kv_heads,
        ratio=q.shape[2] // cache.num_kv_heads,
        head_dim=cache.head_dim,
        page_size=cache.page_size,
        pages_per_seq=cache.pages_per_seq,
        kind=fmt.dtype,
        query=jnp.dtype(q.dtype).name,
        token_scales=fmt.stores_scales,
        logit_bias=fmt.without_key_bias,
    )


def _bias_length(cache: QuantizedKVCache) -> int:
    return paged_decode.bias_length(cache.page_size * cache.pages_per_seq)


def decode_by_kernel(
    q: Array,
    cache: QuantizedKVCache,
    layer: int,
    positions: Array,
    slots: Array,
    lengths: Array,
    scale: float,
    window: int | None,
    soft_cap: float | None = None,
    key_bias: KeyBias | None = None,
    *,
    config: paged_decode.Config | None = None,
    interpret: bool = False,
) -> Array:
    """``paged_attention`` of one token per row by the kernel.

    Args:
      q: ``[b, kv_heads, ratio, head_dim]``.
      cache: As for ``paged_attention``, like the following.
      layer: Layer index.
      positions: int32 ``[b, 1]``.
      slots: int32 ``[b]``.
      lengths: int32 ``[b]``, 0 for slots that do not exist.
      scale: Multiplier of the logits.
      window: Sliding window or None.
      soft_cap: Soft cap or None.
      key_bias: What the stored keys lack, or None. Its part of the logits is computed here, for
        all positions that the page tables have room for.
      config: How the kernel cuts up the work; its heuristic by default.
      interpret: Run in the Pallas interpreter.

    Returns:
      Like ``q``.
    """
    position = positions[:, 0]
    stop = jnp.where((position >= 0) & (position < lengths), position + 1, 0)
    start = None if window is None else jnp.maximum(stop - window, 0)
    logit_bias = None
    if key_bias is not None:
        with jax.named_scope("key_bias"):
            factor = paged_decode.logit_factor(scale, soft_cap)
            logit_bias = key_bias.all_logits(q, _bias_length(cache), factor)
    return paged_decode.decode(
        q,
        cache.keys[layer],
        cache.values[layer],
        cache.key_scales[layer],
        cache.value_scales[layer],
        jnp.take(cache.page_table, slots, axis=0, mode="clip"),
        start,
        stop,
        kind=cache.formats[layer].dtype,
        scale=scale,
        soft_cap=soft_cap,
        logit_bias=logit_bias,
        config=config,
        interpret=interpret,
    )
