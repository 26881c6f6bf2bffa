"""Caches and references that the tests and the benchmark of the decode kernel share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.nn.rotary import rope_frequencies
from qjax.ops._paged import decode_by_kernel
from qjax.ops.key_bias import KeyBias
from qjax.ops.kv import append, read
from qjax.pallas_kernels.paged_decode import Config

BIAS = 300.0
"""Size of the few outliers of a key bias, where keys are stored without it."""

PLAIN = [KVFormat("bfloat16"), KVFormat("float16")]
QUANTIZED = [
    KVFormat(dtype, mode)
    for dtype in ("float8_e4m3fn", "float8_e5m2", "int8", "int4")
    for mode in ("static", "dynamic", "tracked")
]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A decode step: one new token per sequence."""

    heads: int = 2
    ratio: int = 4
    dim: int = 128
    page: int = 64
    dtype: str = "bfloat16"
    window: int | None = None
    soft_cap: float | None = None

    @property
    def scale(self) -> float:
        return self.dim**-0.5


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _append_random(
    sizes: Sizes, cache: QuantizedKVCache, lengths: jax.Array, seed: jax.Array
) -> QuantizedKVCache:
    b, t = cache.max_seqs, cache.pages_per_seq * cache.page_size
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = (b, t, sizes.heads, sizes.dim)
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))

    def tokens(normal: jax.Array, gain: jax.Array) -> jax.Array:
        # Tokens of different size, so that scales per token differ.
        size = jnp.exp(0.5 * jax.random.normal(gain, (*shape[:3], 1)))
        return size * jax.random.normal(normal, shape)

    new = tokens(keys[0], keys[1]), tokens(keys[2], keys[3])
    slots = jnp.arange(b, dtype=jnp.int32)
    return append(cache, 0, *new, positions, slots, positions < lengths[:, None])


def filled(fmt: KVFormat, lengths: list[int], sizes: Sizes, seed: int = 0) -> QuantizedKVCache:
    """A cache whose slot ``i`` holds ``lengths[i]`` tokens, on pages in a scattered order."""
    slots, per_seq = len(lengths), max(1, -(-max(lengths) // sizes.page))
    static = None
    if fmt.mode == "static":
        top = np.linspace(6, 12, sizes.heads) / fmt.bound
        static = [(top, top[::-1] / 2)]
    total = slots * per_seq
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=sizes.heads,
        head_dim=sizes.dim,
        num_pages=total,
        page_size=sizes.page,
        max_seqs=slots,
        pages_per_seq=per_seq,
        fmt=fmt,
        static_scales=static,
    )
    pages = np.random.default_rng(seed).permutation(total).reshape(slots, per_seq)
    used = np.arange(per_seq)[None, :] * sizes.page < np.asarray(lengths)[:, None]
    cache = cache.with_page_table(np.where(used, pages, total).astype(np.int32))
    return _append_random(sizes, cache, jnp.asarray(lengths, jnp.int32), jnp.int32(seed))


def queries(sizes: Sizes, rows: int, seed: int = 1) -> jax.Array:
    """``[rows, 1, q_heads, head_dim]``; heads of different size."""
    shape = (rows, 1, sizes.heads * sizes.ratio, sizes.dim)
    q = np.random.default_rng(seed).normal(size=shape)
    q *= np.exp2(np.random.default_rng(seed + 1).integers(-2, 2, (*shape[:3], 1)))
    return jnp.asarray(q, sizes.dtype)


def key_bias(sizes: Sizes) -> KeyBias:
    """A bias with a few outliers per head, at slow and at fast features, and small numbers."""
    rng = np.random.default_rng(3)
    bias = rng.normal(size=(sizes.heads, sizes.dim))
    for head in bias:
        head[rng.integers(0, sizes.dim, 4)] = rng.uniform(-BIAS, BIAS, 4)
    frequencies = rope_frequencies(sizes.dim, 1e6, None)
    return KeyBias(jnp.asarray(bias, jnp.float32), frequencies, factor=0.9)


def by_kernel(
    cache: QuantizedKVCache,
    q: jax.Array,
    lengths: list[int],
    sizes: Sizes,
    *,
    slots: list[int] | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The kernel's result, with the newest token of each sequence as the query."""
    run = _kernel(sizes, config, interpret)
    slots = list(range(q.shape[0])) if slots is None else slots
    out = run(cache, q, jnp.asarray(lengths, jnp.int32), jnp.asarray(slots, jnp.int32))
    assert out.dtype == q.dtype
    return out


@functools.cache
def _kernel(sizes: Sizes, config: Config | None, interpret: bool) -> Callable[..., jax.Array]:
    """One function per config, so that equal shapes compile once."""

    def run(cache: QuantizedKVCache, q: jax.Array, n: jax.Array, slots: jax.Array) -> jax.Array:
        out = decode_by_kernel(
            q.reshape(q.shape[0], sizes.heads, sizes.ratio, sizes.dim),
            cache,
            0,
            n[:, None] - 1,
            slots,
            n,
            sizes.scale,
            sizes.window,
            sizes.soft_cap,
            key_bias(sizes) if cache.formats[0].without_key_bias else None,
            config=config,
            interpret=interpret,
        )
        return out.reshape(q.shape)

    return run if interpret else jax.jit(run)


def reference(
    cache: QuantizedKVCache,
    q: jax.Array,
    lengths: list[int],
    sizes: Sizes,
    slots: list[int] | None = None,
) -> np.ndarray:
    """The same in float64, of the dequantized keys and values."""
    rows = q.shape[0]
    slots = list(range(rows)) if slots is None else slots
    longest = cache.pages_per_seq * cache.page_size
    keys, values = jax.jit(read, static_argnums=(1, 3))(
        cache, 0, jnp.asarray(slots, jnp.int32), longest
    )
    keys, values = np.asarray(keys, np.float64), np.asarray(values)
    if cache.formats[0].without_key_bias:
        keys = keys + _rotated_bias(sizes, longest).swapaxes(0, 1)
    grouped = np.asarray(q.astype(jnp.float32), np.float64)
    grouped = grouped.reshape(rows, sizes.heads, sizes.ratio, sizes.dim)
    out = np.zeros(grouped.shape)
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        first = 0 if sizes.window is None else max(0, length - sizes.window)
        k, v = (x[row, first:length].astype(np.float64) for x in (keys, values))
        logits = np.einsum("hgd,thd->hgt", grouped[row], k) * sizes.scale
        if sizes.soft_cap is not None:
            logits = sizes.soft_cap * np.tanh(logits / sizes.soft_cap)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[row] = np.einsum("hgt,thd->hgd", weights, v)
    return out.reshape(q.shape)


def bias_logits(sizes: Sizes, q: np.ndarray, length: int) -> np.ndarray:
    """Products of queries ``[b, heads, ratio, dim]`` with the rotated bias, in float64."""
    return np.einsum("bhgd,htd->bhgt", q, _rotated_bias(sizes, length))


def _rotated_bias(sizes: Sizes, length: int) -> np.ndarray:
    """float64 ``[heads, length, dim]``, at the angles that the model rotates by."""
    known = key_bias(sizes)
    positions = np.arange(length, dtype=np.float32)
    angles = (positions[:, None] * known.frequencies).astype(np.float64)
    cos, sin = np.cos(angles) * known.factor, np.sin(angles) * known.factor
    first, second = np.split(np.asarray(known.bias, np.float64)[:, None], 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
