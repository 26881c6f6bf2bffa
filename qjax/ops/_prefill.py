"""``paged_attention`` of chunks of consecutive tokens by cuDNN, on NVIDIA GPUs.

The softmax of a query has two parts, merged by their log-sum-exps: the tokens of its own chunk up
to itself (causal), and what the sequence stored before, in pieces whose number depends on the
longest of the batch. The codes become 16-bit numbers times their scales, rounded once: the same
values that the other forms multiply, up to that rounding. An outlier bias added to keys of 16 bits
would round their own part away, which is what leaving it out of the cache avoids; as a term of the
logits it would be an array for every query and key of a piece. Such layers stay with XLA's form.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax import _compat
from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax._device import device_info
from qjax.kv_cache import QuantizedKVCache
from qjax.ops.kv import decode_codes
from qjax.typing import Array

# Stored tokens per piece: at most [b, 2048, kv_heads, head_dim] of keys and values dequantized.
_PIECE_TOKENS = 2048


def prefill_unsupported_reason(
    q: Array, cache: QuantizedKVCache, layer: int, window: int | None, soft_cap: float | None
) -> str | None:
    """Why cuDNN cannot compute ``paged_attention`` of these arguments; None if it can.

    Args:
      q: Queries ``[b, t, q_heads, head_dim]``.
      cache: The cache.
      layer: Layer index.
      window: Sliding window or None.
      soft_cap: Soft cap or None.
    """
    fmt = cache.formats[layer]
    if q.shape[1] == 1:
        return "one new token per row; cuDNN is for chunks of several"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} queries; cuDNN takes bfloat16 and float16"
    if not fmt.quantized and fmt.dtype != jnp.dtype(q.dtype).name:
        return f"{q.dtype} queries with {fmt.dtype} pages; plain types must be the same"
    if window is not None or soft_cap is not None:
        return f"{window=} and {soft_cap=}; the pieces have neither"
    if fmt.without_key_bias:
        return "keys stored without their bias; cuDNN's keys of 16 bits are too coarse for it"
    if cache.head_dim % 8 or cache.head_dim > 256:
        return f"head_dim={cache.head_dim} must be a multiple of 8 up to 256"
    if JAX_VERSION < MOSAIC_GPU_MIN_JAX:
        return f"jax {jax.__version__} is older than {'.'.join(map(str, MOSAIC_GPU_MIN_JAX))}"
    info = device_info()
    if info.platform != "gpu" or not (info.architecture or "").startswith("sm_"):
        return f"the default device is a {info.kind}; cuDNN needs an NVIDIA GPU"
    return None


def prefill_by_cudnn(
    q: Array,
    cache: QuantizedKVCache,
    layer: int,
    positions: Array,
    slots: Array,
    lengths: Array,
    scale: float,
) -> Array:
    """``paged_attention`` where the positions of every row are consecutive.

    Args:
      q: ``[b, t, q_heads, head_dim]``.
      cache: As for ``paged_attention``, like the following.
      layer: Layer index.
      positions: int32 ``[b, t]``; only the first of each row is looked at.
      slots: int32 ``[b]``.
      lengths: int32 ``[b]``, 0 for slots that do not exist.
      scale: Multiplier of the logits.

    Returns:
      Like ``q``; zeros for padding.
    """
    b, t = q.shape[:2]
    page_size, per_seq = cache.page_size, cache.pages_per_seq
    start = positions[:, 0]
    count = jnp.where(start >= 0, jnp.clip(lengths - start, 0, t), 0)
    stored = jnp.where(count > 0, start, 0)
    table = jnp.take(cache.page_table, slots, axis=0, mode="clip")
    table = jnp.clip(table, 0, cache.num_pages - 1)

    def attend(
        keys: Array, values: Array, q_lengths: Array, kv_lengths: Array, *, causal: bool
    ) -> tuple[Array, Array]:
        # cuDNN's results for rows without any token are undefined: they are given one, and dropped.
        out, lse = _compat.cudnn_attention(
            q,
            keys,
            values,
            jnp.maximum(q_lengths, 1),
            jnp.maximum(kv_lengths, 1),
            scale=scale,
            causal=causal,
        )
        index = jnp.arange(t, dtype=jnp.int32)[None, :]
        seen = (index < q_lengths[:, None]) & (kv_lengths > 0)[:, None]
        lse = jnp.where(seen[..., None], lse.swapaxes(1, 2), -jnp.inf)
        return jnp.where(seen[..., None, None], out.astype(jnp.float32), 0), lse

    with jax.named_scope("chunk"):
        where = stored[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :]
        page = jnp.take_along_axis(table, jnp.minimum(where // page_size, per_seq - 1), axis=1)
        keys, values = _dequantized(cache, layer, (page, slice(None), where % page_size), q.dtype)
        state = attend(keys, values, count, count, causal=True)

    pages = min(max(1, _PIECE_TOKENS // page_size), per_seq)
    piece = pages * page_size

    def body(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        entries = jnp.minimum(i * pages + jnp.arange(pages, dtype=jnp.int32), per_seq - 1)
        page = jnp.repeat(table[:, entries], page_size, axis=1)
        offset = jnp.tile(jnp.arange(page_size, dtype=jnp.int32), pages)
        offset = jnp.broadcast_to(offset[None, :], page.shape)
        keys, values = _dequantized(cache, layer, (page, slice(None), offset), q.dtype)
        kv_lengths = jnp.clip(stored - i * piece, 0, piece)
        return _merged(state, attend(keys, values, count, kv_lengths, causal=False))

    with jax.named_scope("stored"):
        pieces = (jnp.max(stored) + (piece - 1)) // piece
        out, _ = jax.lax.fori_loop(0, pieces, body, state)
    return out.astype(q.dtype)


def _merged(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two normalized parts of a softmax as one: ``[b, t, heads, d]`` and ``[b, t, heads]``."""
    top = jnp.maximum(x[1], y[1])
    shift = jnp.where(top == -jnp.inf, jnp.float32(0), top)
    weights = jnp.exp(x[1] - shift), jnp.exp(y[1] - shift)
    total = weights[0] + weights[1]
    safe = jnp.where(total > 0, total, jnp.float32(1))
    out = sum(part[0] * (w / safe)[..., None] for part, w in zip((x, y), weights, strict=True))
    return jnp.asarray(out), shift + jnp.log(total)


def _dequantized(
    cache: QuantizedKVCache, layer: int, where: tuple, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """Keys and values of tokens, ``[b, tokens, kv_heads, head_dim]`` in ``dtype``."""
    fmt = cache.formats[layer]
    result = []
    for held, held_scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        if not fmt.quantized:
            result.append(held[layer][where])
            continue
        x = decode_codes(held[layer][where], fmt, jnp.float32)
        scales = held_scales[layer]
        assert scales is not None
        scales = scales[where] if fmt.stores_scales else scales[None, None, :]
        result.append((x * scales[..., None]).astype(dtype))
    return result[0], result[1]
