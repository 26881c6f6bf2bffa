"""The append kernel on the GPU, with rotation and without, against its XLA form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._device import mosaic_gpu_unsupported_reason
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops._append import append_by_kernel, append_unsupported_reason
from qjax.ops.kv import append
from qjax.ops.rotary import Projected, rotary_table, rotate_and_append, rotate_heads
from tests.kernels.attention_problems import PLAIN, QUANTIZED

pytestmark = pytest.mark.gpu

SLOTS, PAGE, HEADS, STEPS = 16, 8, 5, 10


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


def _cache(fmt: KVFormat, dim: int) -> QuantizedKVCache:
    scales = np.linspace(0.005, 0.02, HEADS)
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=dim,
        num_pages=SLOTS * 2,
        page_size=PAGE,
        max_seqs=SLOTS,
        pages_per_seq=2,
        fmt=fmt,
        static_scales=[(scales, scales[::-1])] if fmt.mode == "static" else None,
        counted=False,
        share_pages=True,
    )
    table = np.random.default_rng(0).permutation(SLOTS * 2).reshape(SLOTS, 2).astype(np.int32)
    table[3, 1] = SLOTS * 2  # one page only
    return cache.with_page_table(table)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("fmt", PLAIN + QUANTIZED, ids=lambda fmt: fmt.name)
def test_the_same_as_append(fmt: KVFormat, dim: int) -> None:
    dtype = "float16" if fmt.dtype == "float16" else "bfloat16"
    rng = np.random.default_rng(dim)
    by_xla, by_kernel = _cache(fmt, dim), _cache(fmt, dim)
    if append_unsupported_reason(by_xla, 0, jnp.zeros((SLOTS, 1, HEADS, dim), dtype)) is not None:
        assert fmt.packed and dim == 64
        return
    steps = [jax.jit(f, static_argnums=1, donate_argnums=0) for f in (append, append_by_kernel)]
    slots = jnp.asarray(rng.permutation(SLOTS + 2)[:SLOTS], jnp.int32)  # some do not exist
    for i in range(STEPS):
        x = rng.normal(size=(2, SLOTS, 1, HEADS, dim))
        x *= np.exp(rng.normal(size=(2, SLOTS, 1, HEADS, 1)))
        x[0, 0, 0, 1, 3], x[1, 0, 0, 2, 5], x[1, 1, 0, 0, 7] = np.nan, np.inf, -np.inf
        x[0, 1, 0, 3], x[1, 2, 0, 4], x[0, 2, 0, 0] = 0, np.inf, 1e-30
        keys, values = (jnp.asarray(part, dtype) for part in x)
        positions = jnp.full((SLOTS, 1), i, jnp.int32).at[4, 0].add(2 * PAGE - 4)
        valid = jnp.asarray(rng.random((SLOTS, 1)) < 0.9)
        arguments = 0, keys, values, positions, slots, valid
        by_xla, by_kernel = (
            step(cache, *arguments) for step, cache in zip(steps, (by_xla, by_kernel), strict=True)
        )
    _check_same(by_kernel, by_xla)


def _check_same(got: QuantizedKVCache, want: QuantizedKVCache, rotated: bool = False) -> None:
    for name in ("keys", "values", "key_scales", "value_scales", "running", "page_running"):
        x, y = getattr(got, name)[0], getattr(want, name)[0]
        if y is None:
            assert x is None
            continue
        assert x.dtype == y.dtype and x.shape == y.shape
        if rotated and not want.formats[0].quantized:
            _check_rounded(x, y)
            continue
        different = np.asarray(x) != np.asarray(y)
        # XLA may divide less exactly: a value half way between two codes may get the other one.
        codes = want.formats[0].quantized and name in ("keys", "values")
        assert different.mean() <= (3e-4 if codes else 0), (name, different.mean())


# Format, head_dim, query heads, partial sums (0: a 16-bit product), biases of q, k and v, products.
ROTATED = [
    (KVFormat("bfloat16"), 128, 20, 0, "", 1),
    (KVFormat("float16"), 64, 5, 4, "qkv", 1),
    (KVFormat("float8_e4m3fn", "static"), 256, 10, 2, "", 1),
    (KVFormat("float8_e4m3fn", "tracked"), 128, 35, 8, "qkv", 1),
    (KVFormat("int8", "tracked", without_key_bias=True), 128, 10, 2, "qv", 1),
    (KVFormat("int8", "dynamic"), 64, 20, 1, "", 3),
    (KVFormat("int4", "static"), 128, 10, 2, "qkv", 1),
    (KVFormat("int4", "tracked", without_key_bias=True), 256, 5, 2, "qv", 1),
]


@pytest.mark.parametrize(
    ("fmt", "dim", "q_heads", "splits", "biased", "products"),
    ROTATED,
    ids=[f"{fmt.name}-{dim}-{splits}" for fmt, dim, _, splits, _, _ in ROTATED],
)
def test_the_same_as_rotate_and_append(
    fmt: KVFormat, dim: int, q_heads: int, splits: int, biased: str, products: int
) -> None:
    dtype = jnp.dtype("float16" if fmt.dtype == "float16" else "bfloat16")
    rng = np.random.default_rng(dim)
    counts = (q_heads, HEADS, HEADS)
    sizes = [count * dim for count in counts]
    frequencies = (1e4 ** -(np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    bias_q, bias_k, bias_v = (
        jnp.asarray(rng.normal(size=size), dtype) if name in biased else None
        for name, size in zip("qkv", sizes, strict=True)
    )
    slots = jnp.asarray(rng.permutation(SLOTS), jnp.int32)

    @jax.jit
    def by_kernel(
        cache: QuantizedKVCache,
        new: tuple,
        table: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
    ) -> tuple[jax.Array, QuantizedKVCache]:
        projected = Projected(new, (bias_q, bias_k, bias_v), dtype)
        q, k, v = projected.heads(q_heads, HEADS, dim)
        where = positions, slots, valid
        queries, _, cache = rotate_and_append(
            cache, 0, q, k, v, table, *where, projected=projected, backend="mosaic_gpu"
        )
        return queries, cache

    # In programs of their own, as XLA may leave out a rounding between two parts of one program.
    heads = jax.jit(lambda new: Projected(new, (None, None, None), dtype).heads(*counts[:2], dim))
    add, rotate = jax.jit(jnp.add), jax.jit(rotate_heads)
    step = jax.jit(append, static_argnums=1)
    got, want = _cache(fmt, dim), _cache(fmt, dim)
    for i in range(3):
        shape = (max(splits, 1), SLOTS, 1, sum(sizes))
        x = rng.normal(size=shape)
        x[0, 0, 0, 7], x[0, 1, 0, -9], x[0, 2, 0, q_heads * dim] = np.nan, np.inf, -np.inf
        product = jnp.asarray(x, jnp.float32 if splits else dtype)
        ends = [sizes[0], sizes[0] + sizes[1]]
        new = (product,) if products == 1 else tuple(jnp.split(product, ends, axis=-1))
        positions = jnp.full((SLOTS, 1), PAGE - 2 + i, jnp.int32)
        valid = jnp.asarray(rng.random((SLOTS, 1)) < 0.9)
        table = jax.jit(rotary_table)(positions, frequencies)
        queries, got = by_kernel(got, new, table, positions, valid)
        q, k, v = (
            part if bias is None else add(part, bias.reshape(1, 1, -1, dim))
            for part, bias in zip(heads(new), (bias_q, bias_k, bias_v), strict=True)
        )
        expected = rotate(q, table)
        want = step(want, 0, rotate(k, table), v, positions, slots, valid)
        _check_rounded(queries, expected)
    _check_same(got, want, rotated=True)


def _check_rounded(got: jax.Array, want: jax.Array) -> None:
    """The same but for a few roundings: XLA may fuse one product of a rotation into the sum."""
    assert got.dtype == want.dtype and got.shape == want.shape
    eps = float(jnp.finfo(want.dtype).eps)
    x, y = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(x, y, rtol=eps, atol=1e-6)
    different = (x != y) & ~np.isnan(y)
    assert different.mean() <= 3e-4, different.mean()


def test_two_runs_and_a_loop() -> None:
    fmt, dim = KVFormat("int8", "tracked"), 128
    rng = np.random.default_rng(1)
    new = jnp.asarray(rng.normal(size=(STEPS, 2, SLOTS, 1, HEADS, dim)), jnp.bfloat16)
    slots, valid = jnp.arange(SLOTS, dtype=jnp.int32), jnp.ones((SLOTS, 1), bool)

    @jax.jit
    def run(cache: QuantizedKVCache, new: jax.Array) -> QuantizedKVCache:
        def step(i: jax.Array, cache: QuantizedKVCache) -> QuantizedKVCache:
            positions = jnp.full((SLOTS, 1), i, jnp.int32)
            return append_by_kernel(cache, 0, new[i, 0], new[i, 1], positions, slots, valid)

        return jax.lax.fori_loop(0, STEPS, step, cache)

    first, second = run(_cache(fmt, dim), new), run(_cache(fmt, dim), new)
    one_by_one = _cache(fmt, dim)
    step = jax.jit(append_by_kernel, static_argnums=1)
    for i in range(STEPS):
        positions = jnp.full((SLOTS, 1), i, jnp.int32)
        one_by_one = step(one_by_one, 0, new[i, 0], new[i, 1], positions, slots, valid)
    for other in (second, one_by_one):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            assert (np.asarray(a) == np.asarray(b)).all()
