"""Writing tokens into the KV cache, and reading them back dequantized.

``append`` is the only writer. For every token and KV head it fixes a scale, quantizes with it and
stores both; nothing written before is touched, so a token decodes to the same values for ever::

    dynamic   scale_t = absmax_t / bound
    tracked   a_t     = max(absmax_t, a_{t-1} / 2)        per sequence and KV head
              scale_t = a_t / bound
    static    scale   = given at init

The tracked recurrence is evaluated on the exponent bits of float32, where halving is an exact
integer subtraction: any split of a sequence into chunks gives the same bits. Since ``a_t >=
absmax_t`` a finite token is never clipped; an outlier is forgotten within a few tokens. Of int4 the
scale that is stored may be a little smaller, clipping on purpose, and for keys negative
(``best_scale``): it multiplies logits, whereas kernels take the logarithm of a value's scale.

What unusual inputs become (tests/test_kv_cache.py): NaN is stored as 0, an infinity as the largest
magnitude its scale represents (0 if the token and its history hold nothing else), both are counted
in ``saturated``, and neither takes part in any statistic.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qjax import numerics
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import CLIP_FACTORS, KVFormat
from qjax.ops._append import (
    append_by_kernel,
    append_unsupported_reason,
    choose_append_backend,
)
from qjax.typing import Array, DType

# One step of the float32 exponent: subtracting it from the bits of a normal number halves it.
_HALVE = 1 << 23
_INT32_MAX = 2**31 - 1


def decay_scan(absmax: Array, start: Array, valid: Array) -> Array:
    """Running absmax of a chunk of tokens, ``a_t = max(absmax_t, a_{t-1} / 2)``.

    Exact over the whole float32 range; results below the smallest normal number are 0. Tokens that
    are not valid leave the statistic as it is, without decay.

    Args:
      absmax: float32 ``[b, t, kv_heads]``, finite, not negative.
      start: float32 ``[b, kv_heads]``, the statistic before the chunk.
      valid: bool ``[b, t]``.

    Returns:
      float32 ``[b, t, kv_heads]``, the statistic after each token.
    """
    steps = jnp.cumsum(valid.astype(jnp.int32), axis=1)[..., None]
    bits = jax.lax.bitcast_convert_type(absmax, jnp.int32)
    bits = jnp.where(valid[..., None], bits, 0)
    hops = jnp.broadcast_to(valid[..., None].astype(jnp.int32), bits.shape)

    def later(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        # 255 halvings take any float32 to zero; the cap keeps the product inside int32.
        best = jnp.maximum(second[0], first[0] - second[1] * _HALVE)
        return best, jnp.minimum(first[1] + second[1], 255)

    best, _ = jax.lax.associative_scan(later, (bits, hops), axis=1)
    begin = jax.lax.bitcast_convert_type(start, jnp.int32)[:, None, :]
    best = jnp.maximum(best, begin - jnp.minimum(steps, 255) * _HALVE)
    # Subnormal bits do not halve by subtraction; they are flushed alike in every chunking.
    best = jnp.where(best < _HALVE, 0, best)
    return jax.lax.bitcast_convert_type(best, jnp.float32)


def pack_int4(codes: Array) -> Array:
    """int8 codes in -8..7, ``[..., d]``, as uint8 ``[..., d // 2]``: low nibbles first."""
    low, high = jnp.split(jax.lax.bitcast_convert_type(codes, jnp.uint8), 2, axis=-1)
    return (low & jnp.uint8(15)) | (high << jnp.uint8(4))


def decode_codes(stored: Array, fmt: KVFormat, dtype: DType) -> Array:
    """Stored values as numbers in units of their scale, ``[..., head_dim]`` in ``dtype``.

    Exact for quantized formats when ``dtype`` is bfloat16 or float32.
    """
    if fmt.packed:
        both = jax.lax.bitcast_convert_type(stored, jnp.int8)
        low = (both << jnp.int8(4)) >> jnp.int8(4)  # arithmetic shifts extend the sign
        return jnp.concatenate([low, both >> jnp.int8(4)], axis=-1).astype(dtype)
    if stored.dtype != jnp.dtype(fmt.dtype):
        stored = jax.lax.bitcast_convert_type(stored, jnp.dtype(fmt.dtype))
    return stored.astype(dtype)


def quantize_kv(x: Array, scale: Array | None, limit: Array, fmt: KVFormat) -> Array:
    """Codes of ``x`` as they are stored.

    Args:
      x: float32 ``[..., head_dim]``.
      scale: float32 ``[..., 1]``; None for the plain types.
      limit: float32 ``[..., 1]``, magnitude that infinities are cut to.
      fmt: The format.

    Returns:
      ``[..., head_dim]`` in ``fmt.storage_dtype`` (``head_dim // 2`` bytes for int4), all finite.
    """
    x = jnp.where(jnp.isinf(x), jnp.copysign(limit, x), x)
    if scale is not None:
        x = x / scale
    if fmt.packed:
        return pack_int4(
            numerics.cast_saturating(x, jnp.int8, lower=-8 if fmt.clips else -7, upper=7)
        )
    codes = numerics.cast_saturating(x, jnp.dtype(fmt.dtype), lower=-fmt.bound, upper=fmt.bound)
    if codes.dtype != fmt.storage_dtype:
        codes = jax.lax.bitcast_convert_type(codes, fmt.storage_dtype)
    return codes


def scale_of(absmax: Array, fmt: KVFormat) -> Array:
    """``absmax / bound`` in float32; 1 where that is zero or too small for a normal number."""
    # The reciprocal is written out: XLA would otherwise use it inside jit and divide outside.
    scale = absmax * jnp.float32(1.0 / fmt.bound)
    return jnp.where(scale < numerics.TINY, jnp.float32(1), scale)


def best_scale(x: Array, scale: Array, signed: bool) -> Array:
    """The scale for int4 codes -8..7 that stores a token with the least squared error.

    With few codes it pays to clip the largest elements, as the others get finer steps; and a
    negative scale turns the range round, for tokens whose largest element is positive. Errors are
    compared in whole numbers, so that the choice does not depend on the order of a sum.

    Args:
      x: float32 ``[..., head_dim]``.
      scale: float32 ``[...]``, which covers all of ``x`` with codes -7..7.
      signed: Whether the result may be negative.

    Returns:
      float32 ``[...]``, the scale times one of ``CLIP_FACTORS``, or minus that.
    """
    x = jnp.where(jnp.isfinite(x), x, jnp.float32(0))
    best, least = scale, jnp.full(scale.shape, jnp.inf, jnp.float32)
    for sign in (1, -1) if signed else (1,):
        for factor in CLIP_FACTORS:
            tried = scale * jnp.float32(sign * factor)
            codes = x / tried[..., None]
            error = codes - jnp.clip(jnp.round(codes), -8, 7)
            # At most 7 / 0.64 - 7 = 4 steps off: 16 * 512 * head_dim, far from overflow.
            steps = jnp.sum(jnp.round(error * error * 512).astype(jnp.int32), axis=-1)
            total = steps.astype(jnp.float32) * jnp.float32(factor * factor)
            best = jnp.where(total < least, tried, best)
            least = jnp.minimum(total, least)
    return best


def append(
    cache: QuantizedKVCache,
    layer: int,
    keys: Array,
    values: Array,
    positions: Array,
    slots: Array,
    valid: Array,
    *,
    backend: str | None = None,
) -> QuantizedKVCache:
    """Quantize tokens and store them in one layer, in place when the cache is donated.

    Each slot may occur in one row only and each position of a row once; tokens of a row are in the
    order of the sequence; one that goes to a page which sequences share is the one that is there.
    Under these rules any chunking of a sequence stores the same bits. A
    token that is not valid, or has no page (its position lies outside the table, its table entry
    is unused, its slot does not exist), changes nothing: neither pages nor statistics nor counters.

    Args:
      cache: The cache.
      layer: Layer index, a Python int.
      keys: ``[b, t, kv_heads, head_dim]``, any float type.
      values: ``[b, t, kv_heads, head_dim]``.
      positions: int32 ``[b, t]``, position of each token in its sequence.
      slots: int32 ``[b]``, slot of each row.
      valid: bool ``[b, t]``; False for padding.
      backend: ``"mosaic_gpu"`` (one token per row, on Hopper), ``"xla"``, or None, with which the
        kernel runs where it can.

    Returns:
      The cache with the tokens stored, statistics and counters updated.

    Raises:
      ValueError: If the layer or the backend does not exist, or shapes disagree.
      NotImplementedError: If the named backend cannot run; says why.
    """
    check_append(cache, layer, keys, values, positions, slots, valid)

    def reason() -> str | None:
        return append_unsupported_reason(cache, layer, keys)

    if choose_append_backend("append", backend, reason) == "mosaic_gpu":
        return append_by_kernel(cache, layer, keys, values, positions, slots, valid)
    fmt, page_size = cache.formats[layer], cache.page_size
    b, t, heads, _ = keys.shape

    slot_exists = (slots >= 0) & (slots < cache.max_seqs)
    safe_slots = jnp.clip(slots, 0, cache.max_seqs - 1)
    page_index = positions // page_size
    has_entry = (page_index >= 0) & (page_index < cache.pages_per_seq) & slot_exists[:, None]
    page = cache.page_table[safe_slots[:, None], jnp.clip(page_index, 0, cache.pages_per_seq - 1)]
    stored = valid & has_entry & (page >= 0) & (page < cache.num_pages)
    # Dropped tokens get pages beyond the pool, each its own: the scatter may then assume unique
    # indices. All three indexed axes lead, so no backend has to transpose the cache.
    beyond = cache.num_pages + jnp.arange(b * t, dtype=jnp.int32).reshape(b, t)
    where = (
        jnp.where(stored, page, beyond)[..., None],
        jnp.arange(heads, dtype=jnp.int32)[None, None, :],
        (positions % page_size)[..., None],
    )

    def put(pages: Array, new: Array) -> Array:
        return pages.at[where].set(new, mode="drop", unique_indices=True)

    pages, page_scales, seen, clipped, lost, limits = [], [], [], [], [], []
    old = ((keys, cache.keys, cache.key_scales), (values, cache.values, cache.value_scales))
    for index, (x, held, held_scales) in enumerate(old):
        held_scale = held_scales[layer]
        with jax.named_scope("quantize_kv"):
            x = x.astype(jnp.float32)
            finite = jnp.isfinite(x)
            absmax = jnp.max(jnp.where(finite, jnp.abs(x), jnp.float32(0)), axis=-1)
            absmax = jnp.where(stored[..., None], absmax, jnp.float32(0))
            limit = absmax
            if fmt.mode == "none":
                scale, limit = None, jnp.full_like(absmax, fmt.bound)
            elif fmt.mode == "static":
                assert held_scale is not None
                scale = jnp.broadcast_to(held_scale, absmax.shape)
                limit = scale * jnp.float32(fmt.bound)
            else:
                statistic = cache.running[layer]
                if statistic is not None:
                    limit = decay_scan(absmax, statistic[index, safe_slots], stored)
                    limits.append(limit)
                scale = scale_of(limit, fmt)
                if fmt.clips:
                    scale = best_scale(x, scale, signed=index == 0)
            wide = None if scale is None else scale[..., None]
            codes = quantize_kv(x, wide, limit[..., None], fmt)
        with jax.named_scope("store_kv"):
            pages.append(put(held[layer], codes))
            if fmt.stores_scales and held_scale is not None and scale is not None:
                held_scale = put(held_scale, scale)
            page_scales.append(held_scale)
        if not cache.counted:
            continue
        outside = ~finite
        if fmt.mode in ("none", "static"):  # the other modes never clip unless it pays
            top = jnp.float32(fmt.clipped_from) * (jnp.float32(1) if wide is None else wide)
            outside |= jnp.abs(x) > top
        outside &= stored[..., None, None]
        clipped.append(jnp.sum(outside, dtype=jnp.int32))
        low = jnp.float32(fmt.lost_up_to) * (jnp.float32(1) if wide is None else jnp.abs(wide))
        zeroed = (jnp.abs(x) <= low) & (x != 0) & stored[..., None, None]
        lost.append(jnp.sum(zeroed, dtype=jnp.int32))
        seen.append(jnp.max(absmax, axis=(0, 1)))

    def counted(count: Array, new: list[Array]) -> Array:
        total = count + jnp.stack(new)
        return jnp.where(total < count, _INT32_MAX, total)  # wrapped around

    changes = {
        "keys": pages[0],
        "values": pages[1],
        "key_scales": page_scales[0],
        "value_scales": page_scales[1],
    }
    if cache.counted:
        changes |= {
            "layer_absmax": jnp.maximum(cache.layer_absmax[layer], jnp.stack(seen)),
            "layer_saturated": counted(cache.layer_saturated[layer], clipped),
            "layer_underflowed": counted(cache.layer_underflowed[layer], lost),
        }
    statistic = cache.running[layer]
    if statistic is not None:
        tracked = jnp.stack(limits)
        touched = jnp.any(stored, axis=1)
        target = jnp.where(touched, slots, cache.max_seqs + jnp.arange(b, dtype=jnp.int32))
        changes["running"] = statistic.at[jnp.arange(2)[:, None], target[None, :]].set(
            tracked[:, :, -1], mode="drop", unique_indices=True
        )
        at_pages = cache.page_running[layer]
        if at_pages is not None:
            ends = jnp.where(stored & (positions % page_size == page_size - 1), page, beyond)
            changes["page_running"] = at_pages.at[ends].set(
                tracked.transpose(1, 2, 0, 3), mode="drop", unique_indices=True
            )
    return dataclasses.replace(
        cache,
        **{name: _replaced(getattr(cache, name), layer, value) for name, value in changes.items()},
    )


def _replaced(items: tuple, index: int, item: Array | None) -> tuple:
    return (*items[:index], item, *items[index + 1 :])


def check_append(
    cache: QuantizedKVCache,
    layer: int,
    keys: Array,
    values: Array,
    positions: Array,
    slots: Array,
    valid: Array,
) -> None:
    """Raises ValueError unless the arguments are as ``append`` needs them."""
    if not 0 <= layer < cache.num_layers:
        raise ValueError(f"{layer=} must be in 0..{cache.num_layers - 1}")
    tail = (cache.num_kv_heads, cache.head_dim)
    if keys.ndim != 4 or keys.shape[2:] != tail or values.shape != keys.shape:
        raise ValueError(
            f"keys {keys.shape} and values {values.shape} must both be [b, t, kv_heads, head_dim] "
            f"with (kv_heads, head_dim) = {tail} of the cache"
        )
    b, t = keys.shape[:2]
    if positions.shape != (b, t) or valid.shape != (b, t) or slots.shape != (b,):
        raise ValueError(
            f"positions {positions.shape} and valid {valid.shape} must be {(b, t)}, slots "
            f"{slots.shape} must be {(b,)} for keys of shape {keys.shape}"
        )
    if valid.dtype != jnp.bool_:
        raise ValueError(f"valid has dtype {valid.dtype}; it must be bool")


def read(cache: QuantizedKVCache, layer: int, slots: Array, length: int) -> tuple[Array, Array]:
    """The first tokens of some sequences, dequantized; for tests and inspection.

    Args:
      cache: The cache.
      layer: Layer index.
      slots: int32 ``[b]``.
      length: Number of positions, a Python int up to ``pages_per_seq * page_size``.

    Returns:
      ``(keys, values)``, float32 ``[b, length, kv_heads, head_dim]``; zeros at positions without a
      page. Positions that were never written hold whatever the page held before.

    Raises:
      ValueError: If the length is longer than a sequence can be.
    """
    longest = cache.pages_per_seq * cache.page_size
    if not 0 <= length <= longest:
        raise ValueError(f"{length=} must be in 0..{longest} (pages_per_seq * page_size)")
    fmt = cache.formats[layer]
    position = jnp.arange(length, dtype=jnp.int32)
    page = cache.page_table[slots[:, None], (position // cache.page_size)[None, :]]
    where = (page, slice(None), (position % cache.page_size)[None, :])
    result = []
    for held, held_scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        x = decode_codes(held[layer].at[where].get(mode="fill", fill_value=0), fmt, jnp.float32)
        scale = held_scales[layer]
        if scale is not None and fmt.stores_scales:
            x = x * scale.at[where].get(mode="fill", fill_value=0)[..., None]
        elif scale is not None:
            x = x * scale[None, None, :, None]
        result.append(x)
    return result[0], result[1]
