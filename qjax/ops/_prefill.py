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
from qjax._device import cudnn_unsupported_reason, device_info
from qjax.kv_cache import QuantizedKVCache
from qjax.ops.kv import decode_codes
from qjax.typing import Array, DType

# Stored tokens per piece: this many times the chunk's, but no more bytes of dequantized keys and
# values than that, nor fewer tokens than these.
_PIECE_CHUNKS = 4
_PIECE_BYTES = 512 << 20
_MIN_PIECE_TOKENS = 2048


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
    reason = cudnn_unsupported_reason()
    if reason is not None:
        return reason
    architecture = device_info().architecture or ""
    most = 256 if int(architecture.removeprefix("sm_")) >= 90 else 128
    if cache.head_dim % 8 or cache.head_dim > most:
        return f"head_dim={cache.head_dim} must be a multiple of 8 up to {most} on {architecture}"
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
    start = positions[:, 0]
    count = jnp.where(start >= 0, jnp.clip(lengths - start, 0, t), 0)
    stored = jnp.where(count > 0, start, 0)
    index = jnp.arange(t, dtype=jnp.int32)
    real = index[None, :] < count[:, None]

    with jax.named_scope("chunk"):
        # Unsigned, as a division that rounds down takes several times the instructions.
        where = (stored[:, None] + index[None, :]).astype(jnp.uint32)
        page_size = jnp.uint32(cache.page_size)
        page = _pages(cache, slots, (where // page_size).astype(jnp.int32))
        offset = (where % page_size).astype(jnp.int32)
        keys, values = _dequantized(cache, layer, (page, slice(None), offset), real, q.dtype)

    def full_chunks() -> Array:
        out, _ = _compat.cudnn_causal_attention(q, keys, values, scale=scale, with_lse=False)
        return out

    def first_chunks() -> Array:
        out = full_chunks()
        # Padding is cleared in place. Anything that read all of the output and wrote it again would
        # take a tenth of cuDNN's time.
        rows = jnp.arange(b * t, dtype=jnp.int32)
        padding = jnp.where(real.reshape(-1), rows + b * t, rows)
        flat = out.reshape(b * t, *out.shape[2:])
        flat = flat.at[padding].set(
            jnp.zeros((), out.dtype), mode="drop", unique_indices=True, wrap_negative_indices=False
        )
        return flat.reshape(out.shape)

    pages = _pages_per_piece(cache, b, t, q.dtype.itemsize)
    piece = pages * cache.page_size

    def attend_stored(i: int | Array) -> tuple[Array, Array]:
        """To piece ``i``; log-sum-exps ``[b, t, q_heads]``, minus infinity for rows without."""
        entries = i * pages + jnp.arange(pages, dtype=jnp.int32)
        page = _pages(cache, slots, jnp.broadcast_to(entries[None, :], (b, pages)))
        held = jnp.clip(stored - i * piece, 0, piece)
        valid = jnp.arange(piece, dtype=jnp.int32)[None, :] < held[:, None]
        keys, values = _dequantized(cache, layer, (page,), valid, q.dtype)
        # cuDNN's results for rows without any token are undefined: they are given one of zeros,
        # with a weight of 0.
        out, lse = _compat.cudnn_attention(
            q, keys, values, jnp.maximum(count, 1), jnp.maximum(held, 1), scale=scale
        )
        return out, jnp.where((held > 0)[:, None, None], lse.swapaxes(1, 2), -jnp.inf)

    def with_stored() -> Array:
        out, lse = _compat.cudnn_causal_attention(q, keys, values, scale=scale, with_lse=True)
        assert lse is not None
        state = _merged((out, lse.swapaxes(1, 2)), attend_stored(0))
        if pages < cache.pages_per_seq:
            state = jax.lax.fori_loop(
                1,
                (jnp.max(stored) + (piece - 1)) // piece,
                lambda i, state: _merged(state, attend_stored(i)),
                state,
            )
        return jnp.where(real[..., None, None], state[0], 0).astype(q.dtype)

    with jax.named_scope("attend"):
        # One branch of three, as every decision waits for the device.
        padded = jnp.any(count < t).astype(jnp.int32)
        branch = jnp.where(jnp.any(stored > 0), jnp.int32(2), padded)
        return jax.lax.switch(branch, (full_chunks, first_chunks, with_stored))


def _pages_per_piece(cache: QuantizedKVCache, b: int, t: int, itemsize: int) -> int:
    """Pages of stored tokens that are attended to in one call of cuDNN.

    Merging takes time per query and piece, and what a piece has room for is dequantized whether it
    is there or not: several times the chunk's tokens balance the two.
    """
    token_bytes = 2 * cache.num_kv_heads * cache.head_dim * itemsize
    tokens = min(_PIECE_CHUNKS * t, _PIECE_BYTES // (b * token_bytes))
    most = max(1, max(tokens, _MIN_PIECE_TOKENS) // cache.page_size)
    return -(-cache.pages_per_seq // -(-cache.pages_per_seq // most))


def _pages(cache: QuantizedKVCache, slots: Array, entries: Array) -> Array:
    """Pages of entries int32 ``[b, n]`` of the page table, clipped to those that exist."""
    pages = cache.page_table.at[slots[:, None], entries].get(
        mode="clip", wrap_negative_indices=False
    )
    return jnp.clip(pages, 0, cache.num_pages - 1)


def _merged(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two normalized parts of a softmax as one, in float32.

    Args:
      x: ``[b, t, heads, d]`` and float32 ``[b, t, heads]``, finite.
      y: Likewise, but its log-sum-exps may be minus infinity.
    """
    top = jnp.maximum(x[1], y[1])
    weights = jnp.exp(x[1] - top), jnp.exp(y[1] - top)
    total = weights[0] + weights[1]
    parts = [
        part[0].astype(jnp.float32) * (w / total)[..., None]
        for part, w in zip((x, y), weights, strict=True)
    ]
    return parts[0] + parts[1], top + jnp.log(total)


def _dequantized(
    cache: QuantizedKVCache, layer: int, where: tuple, valid: Array, dtype: DType
) -> tuple[Array, Array]:
    """Keys and values of tokens, ``[b, tokens, kv_heads, head_dim]`` in ``dtype``.

    Args:
      cache: The cache.
      layer: Layer index.
      where: Index of tokens in the arrays of pages, or of whole pages ``([b, pages],)``.
      valid: bool ``[b, tokens]``. Others are zeros: masked by a weight of 0 alone, what a page
        holds from earlier could be an infinity.
      dtype: Of the result.
    """
    fmt = cache.formats[layer]

    def tokens(held: Array) -> Array:
        x = held.at[where].get(wrap_negative_indices=False)
        if len(where) == 1:
            x = x.swapaxes(2, 3)
        return x.reshape(*valid.shape, *x.shape[-1 - (held.ndim == 4) :])

    result = []
    for held, held_scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        x = tokens(held[layer])
        if fmt.quantized:
            scales = held_scales[layer]
            assert scales is not None
            scales = tokens(scales) if fmt.stores_scales else scales[None, None, :]
            x = (decode_codes(x, fmt, jnp.float32) * scales[..., None]).astype(dtype)
        result.append(jnp.where(valid[..., None, None], x, 0))
    return result[0], result[1]
