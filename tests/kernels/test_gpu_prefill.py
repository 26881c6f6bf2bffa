"""Prefill by cuDNN on the GPU, against the XLA form of the same attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops.attention import paged_attention
from tests.kernels.attention_problems import Sizes, filled
from tests.tolerances import BF16_OPERANDS, relative_error

pytestmark = pytest.mark.gpu

FORMATS = [
    KVFormat("bfloat16"),
    KVFormat("float8_e4m3fn", "static"),
    KVFormat("int8", "dynamic"),
    KVFormat("int4", "tracked"),
]


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    if jax.devices()[0].platform != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def _poisoned(cache: QuantizedKVCache, lengths: list[int]) -> QuantizedKVCache:
    """The cache with NaN, or the largest codes, wherever no token of a sequence lies."""
    used = np.zeros((cache.num_pages, cache.page_size), bool)
    for row, length in zip(np.asarray(cache.page_table), lengths, strict=True):
        for i in range(-(-length // cache.page_size)):
            used[row[i], : length - i * cache.page_size] = True
    mask = jnp.asarray(used)[:, None, :]

    def filled_up(held: jax.Array | None) -> jax.Array | None:
        if held is None or held.ndim == 1:
            return held
        floating = jnp.issubdtype(held.dtype, jnp.floating)
        stale = jnp.asarray(jnp.nan if floating else 127, held.dtype)  # 127: NaN in float8_e4m3fn
        return jnp.where(mask if held.ndim == 3 else mask[..., None], held, stale)

    parts: dict[str, Any] = {
        name: tuple(filled_up(x) for x in getattr(cache, name))
        for name in ("keys", "values", "key_scales", "value_scales")
    }
    return dataclasses.replace(cache, **parts)


def _both(fmt: KVFormat, starts: list[int], counts: list[int], t: int, dim: int = 128) -> None:
    """cuDNN on a cache with stale pages, against XLA on a clean one."""
    sizes = Sizes(heads=2, ratio=4, dim=dim)
    lengths = [s + n for s, n in zip(starts, counts, strict=True)]
    clean = filled(fmt, lengths, sizes)
    stale = _poisoned(clean, lengths)
    rows = len(starts)
    q = np.random.default_rng(3).normal(size=(rows, t, 8, dim))
    positions = jnp.asarray(np.asarray(starts)[:, None] + np.arange(t), jnp.int32)
    slots, n = jnp.arange(rows, dtype=jnp.int32), jnp.asarray(lengths, jnp.int32)

    def call(
        cache: QuantizedKVCache, q: jax.Array, positions: jax.Array, n: jax.Array, backend: str
    ) -> jax.Array:
        return paged_attention(
            q,
            cache,
            0,
            positions,
            slots,
            n,
            scale=sizes.scale,
            consecutive=True,
            backend=backend,
        )

    run = jax.jit(call, static_argnums=4)
    q16 = jnp.asarray(q, jnp.bfloat16)
    out = np.asarray(run(stale, q16, positions, n, "cudnn"), np.float64)
    want = np.asarray(run(clean, q16, positions, n, "xla"), np.float64)
    assert np.isfinite(out).all()
    assert relative_error(out, want) < BF16_OPERANDS
    for row, count in enumerate(counts):
        assert not out[row, count:].any(), "padding must be zeros"
        if count:
            assert relative_error(out[row, :count], want[row, :count]) < 2 * BF16_OPERANDS
    assert (out == np.asarray(run(stale, q16, positions, n, "cudnn"), np.float64)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_first_chunks(fmt: KVFormat) -> None:
    _both(fmt, [0, 0, 0, 0], [256, 100, 1, 0], 256)


@pytest.mark.parametrize("t", [256, 77])
def test_full_chunks(t: int) -> None:
    _both(FORMATS[0], [0, 0], [t, t], t)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_after_stored_tokens(fmt: KVFormat) -> None:
    """More than one piece, a start within a page, a first chunk and an empty row beside them."""
    _both(fmt, [3000, 70, 0, 0, 2048], [128, 128, 77, 0, 5], 128)


def test_after_stored_tokens_in_one_piece() -> None:
    _both(FORMATS[0], [1000, 64, 0], [128, 128, 100], 128)


def test_same_bits_beside_padding_and_stored_tokens() -> None:
    """Other rows decide which of three branches runs; a first chunk's result is the same in all."""
    sizes = Sizes(heads=2, ratio=4, dim=128)
    t = 256
    cache = filled(FORMATS[0], [t, 2 * t], sizes)
    q = jnp.asarray(np.random.default_rng(3).normal(size=(2, t, 8, 128)), jnp.bfloat16)

    @jax.jit
    def run(start: jax.Array, length: jax.Array) -> jax.Array:
        starts, lengths = jnp.stack([jnp.int32(0), start]), jnp.stack([jnp.int32(t), length])
        positions = starts[:, None] + jnp.arange(t, dtype=jnp.int32)[None, :]
        return paged_attention(
            q,
            cache,
            0,
            positions,
            jnp.arange(2, dtype=jnp.int32),
            lengths,
            scale=sizes.scale,
            consecutive=True,
            backend="cudnn",
        )[0].astype(jnp.float32)

    cases = [(0, t), (0, 3), (t, 2 * t)]
    full, padded, stored = (np.asarray(run(jnp.int32(a), jnp.int32(n))) for a, n in cases)
    assert (full == padded).all() and (full == stored).all()


def test_head_dims() -> None:
    for dim in (64, 96, 256):
        _both(FORMATS[2], [100, 0], [64, 64], 64, dim)
