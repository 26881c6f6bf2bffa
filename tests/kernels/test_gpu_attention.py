"""The paged decode kernel on the GPU, against float64 attention of the dequantized cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._device import mosaic_gpu_unsupported_reason
from qjax.kv_format import KVFormat
from qjax.ops._paged import paged_attention_unsupported_reason
from qjax.ops.attention import paged_attention
from qjax.ops.kv import append
from qjax.pallas_kernels.paged_decode import Config
from tests.kernels.attention_problems import (
    PLAIN,
    QUANTIZED,
    Sizes,
    bias_logits,
    by_kernel,
    filled,
    key_bias,
    queries,
    reference,
)
from tests.tolerances import ATTENTION_BF16, ATTENTION_F16, KEY_BIAS_TF32, relative_error

pytestmark = pytest.mark.gpu

# Keys stored without their bias: the additive term of the kernel.
UNBIASED = [
    KVFormat("float8_e4m3fn", "static", without_key_bias=True),
    KVFormat("int8", "dynamic", without_key_bias=True),
    KVFormat("int4", "tracked", without_key_bias=True),
]
RAGGED = [0, 1, 63, 64, 65, 1000, 7, 128, 129, 513]
E4M3, INT8, INT4 = (KVFormat(d, "dynamic") for d in ("float8_e4m3fn", "int8", "int4"))
BF16, STATIC = KVFormat("bfloat16"), KVFormat("float8_e4m3fn", "static")


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


def _tolerance(fmt: KVFormat, sizes: Sizes) -> float:
    """float16 inside unless the pages are bfloat16, and one rounding of the result.

    Logits of hundreds, as a key bias makes them, are off by 1e-6 of that.
    """
    low = "bfloat16" in (fmt.dtype, sizes.dtype) or fmt.without_key_bias
    return ATTENTION_BF16 if low else ATTENTION_F16


def _check(
    fmt: KVFormat,
    sizes: Sizes,
    lengths: list[int] = RAGGED,
    config: Config | None = None,
) -> None:
    cache = filled(fmt, lengths, sizes)
    q = queries(sizes, len(lengths))
    out = by_kernel(cache, q, lengths, sizes, config=config)
    got = np.asarray(out.astype(jnp.float32), np.float64)
    want = reference(cache, q, lengths, sizes)
    tolerance = _tolerance(fmt, sizes)
    assert relative_error(got, want) < tolerance
    for row, length in enumerate(lengths):  # every sequence by itself, the short ones too
        if length == 0:
            assert not got[row].any()
        else:
            assert relative_error(got[row], want[row]) < 2 * tolerance, (row, length)
    again = by_kernel(cache, q, lengths, sizes, config=config)
    assert (out == again).all(), "results must not differ from run to run"


@pytest.mark.parametrize("fmt", PLAIN + QUANTIZED, ids=lambda fmt: fmt.name)
def test_formats(fmt: KVFormat) -> None:
    dtype = "float16" if fmt.dtype == "float16" else "bfloat16"
    _check(fmt, Sizes(dtype=dtype))


@pytest.mark.parametrize("fmt", [E4M3, INT4], ids=lambda fmt: fmt.name)
def test_float16_queries(fmt: KVFormat) -> None:
    _check(fmt, Sizes(dtype="float16"))


@pytest.mark.parametrize("dim", [64, 96, 256])
@pytest.mark.parametrize("fmt", [BF16, E4M3, INT4], ids=lambda fmt: fmt.name)
def test_head_dims(fmt: KVFormat, dim: int) -> None:
    _check(fmt, Sizes(dim=dim))


@pytest.mark.parametrize("ratio", [1, 2, 3, 8, 12, 16])
@pytest.mark.parametrize("fmt", [BF16, STATIC, INT4], ids=lambda fmt: fmt.name)
def test_ratios(fmt: KVFormat, ratio: int) -> None:
    _check(fmt, Sizes(heads=3, ratio=ratio))


def test_widest() -> None:
    for fmt in (BF16, INT8):
        _check(fmt, Sizes(heads=1, ratio=16, dim=256), [65, 300])


@pytest.mark.parametrize(
    ("fmt", "page"),
    [(BF16, 16), (BF16, 8), (STATIC, 32), (E4M3, 32), (E4M3, 128), (INT4, 256), (STATIC, 16)],
    ids=lambda x: getattr(x, "name", x),
)
def test_page_sizes(fmt: KVFormat, page: int) -> None:
    _check(fmt, Sizes(page=page))


@pytest.mark.parametrize(("window", "soft_cap"), [(1, None), (64, 2.0), (100, None), (None, 5.0)])
@pytest.mark.parametrize("fmt", [BF16, E4M3, INT4], ids=lambda fmt: fmt.name)
def test_window_and_soft_cap(fmt: KVFormat, window: int | None, soft_cap: float | None) -> None:
    _check(fmt, Sizes(window=window, soft_cap=soft_cap))


@pytest.mark.parametrize(
    "config",
    [Config(64, 2), Config(128, 2), Config(64, 4, 3), Config(64, 6, 16), Config(128, 3, 2)],
    ids=str,
)
@pytest.mark.parametrize("fmt", [E4M3, INT4], ids=lambda fmt: fmt.name)
def test_configs(fmt: KVFormat, config: Config) -> None:
    _check(fmt, Sizes(), config=config)


def test_large_batch_equals_each_sequence_alone_and_in_any_order() -> None:
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(1, 700, 48)]
    sizes, config = Sizes(heads=8), Config(64, 3)
    cache = filled(E4M3, lengths, sizes)
    q = queries(sizes, len(lengths))
    out = by_kernel(cache, q, lengths, sizes, config=config)
    order = [int(i) for i in rng.permutation(len(lengths))]
    n = [lengths[i] for i in order]
    moved = by_kernel(cache, q[jnp.asarray(order)], n, sizes, slots=order, config=config)
    assert (moved == out[jnp.asarray(order)]).all()
    some = [3, 40, 17]
    n = [lengths[i] for i in some]
    alone = by_kernel(cache, q[jnp.asarray(some)], n, sizes, slots=some, config=config)
    assert (alone == out[jnp.asarray(some)]).all()


def test_a_fact_in_a_long_context_is_found() -> None:
    """One token of 100,000 fits the query; its value must come out, whatever its place."""
    sizes, length = Sizes(heads=1, ratio=4), 100_000
    rng = np.random.default_rng(1)
    q = rng.normal(size=(1, 1, 4, 128))
    q[:] = q[:, :, :1]
    keys, values = rng.normal(size=(2, 1, length, 1, 128)).astype(np.float32)
    fact = rng.normal(size=128) * 3
    for place in (5, 50_001, 99_998):
        k, v = keys.copy(), values.copy()
        k[0, place, 0] = q[0, 0, 0] * 2.2  # logit about 25 against noise of about 1
        v[0, place, 0] = fact
        for fmt in (BF16, E4M3, INT8):
            cache = filled(fmt, [length], sizes)
            positions = jnp.arange(length, dtype=jnp.int32)[None]
            slots, valid = jnp.zeros((1,), jnp.int32), jnp.ones((1, length), bool)
            cache = jax.jit(append, static_argnums=1)(cache, 0, k, v, positions, slots, valid)
            query = jnp.asarray(q, jnp.bfloat16)
            out = by_kernel(cache, query, [length], sizes)
            want = reference(cache, query, [length], sizes)
            assert relative_error(np.asarray(out, np.float64), want) < ATTENTION_BF16
            error = relative_error(np.asarray(out[0, 0, 0], np.float64), fact)
            assert error < 0.05, (fmt.name, place, error)  # the noise's share, and e4m3's 2**-4


def test_values_of_very_different_size_do_not_underflow() -> None:
    """The token that wins has values 1e6 times smaller than a token that hardly counts."""
    sizes = Sizes(heads=1, ratio=1)
    cache = filled(INT8, [2], sizes)
    q = jnp.ones((1, 1, 1, 128), jnp.bfloat16)
    k = jnp.zeros((1, 2, 1, 128)).at[0, 0].set(2.0)  # logits 22.6 and 0: weights 1 and 1.5e-10
    v = jnp.full((1, 2, 1, 128), 1e3).at[0, 0].set(1e-3)
    args = jnp.arange(2, dtype=jnp.int32)[None], jnp.zeros((1,), jnp.int32), jnp.ones((1, 2), bool)
    cache = jax.jit(append, static_argnums=1)(cache, 0, k, v, *args)
    out = by_kernel(cache, q, [2], sizes)
    want = reference(cache, q, [2], sizes)
    assert relative_error(np.asarray(out, np.float64), want) < ATTENTION_BF16


def test_through_paged_attention() -> None:
    lengths, sizes = [100, 0, 64], Sizes(heads=2)
    cache = filled(E4M3, lengths, sizes)
    q = queries(sizes, 3)
    n, slots = jnp.asarray(lengths, jnp.int32), jnp.arange(3, dtype=jnp.int32)

    def call(q: jax.Array, backend: str | None) -> jax.Array:
        return paged_attention(
            q, cache, 0, n[:, None] - 1, slots, n, scale=sizes.scale, backend=backend
        )

    out = jax.jit(call, static_argnums=1)(q, "mosaic_gpu")
    assert (out == by_kernel(cache, q, lengths, sizes)).all()
    xla = jax.jit(call, static_argnums=1)(q, "xla")
    wide = (np.asarray(x, np.float64) for x in (out, xla))
    assert relative_error(*wide) < 2 * ATTENTION_BF16
    with pytest.raises(NotImplementedError, match="float32 queries"):
        call(q.astype(jnp.float32), "mosaic_gpu")


def test_in_a_loop_with_append() -> None:
    """As in decoding: the cache is carried through a loop, and every step reads what it wrote."""
    sizes, start, steps = Sizes(heads=2), [60, 3], 8
    cache = filled(E4M3, [n + 64 for n in start], sizes)  # room for the new tokens
    rng = np.random.default_rng(2)
    new = jnp.asarray(rng.normal(size=(steps, 2, 2, 1, 2, 128)), jnp.float32)
    q = queries(sizes, 2)
    slots, valid = jnp.arange(2, dtype=jnp.int32), jnp.ones((2, 1), bool)
    first = jnp.asarray(start, jnp.int32)

    def decode(cache, backend):
        def step(i, carry):
            cache, outs = carry
            positions = (first + i)[:, None]
            cache = append(cache, 0, new[i, 0], new[i, 1], positions, slots, valid)
            out = paged_attention(
                q,
                cache,
                0,
                positions,
                slots,
                positions[:, 0] + 1,
                scale=sizes.scale,
                backend=backend,
            )
            return cache, outs.at[i].set(out)

        outs = jnp.zeros((steps, *q.shape), q.dtype)
        return jax.lax.fori_loop(0, steps, step, (cache, outs))[1]

    run = jax.jit(decode, static_argnums=1)
    kernel, xla = (np.asarray(run(cache, name), np.float64) for name in ("mosaic_gpu", "xla"))
    assert relative_error(kernel, xla) < 2 * ATTENTION_BF16


def test_logits_of_the_bias_keep_their_bits() -> None:
    """In TF32, whose 11 bits alone would be off by 2**-12 of hundreds."""
    sizes = Sizes(heads=4, ratio=7)
    q, known = queries(sizes, 3).reshape(3, 4, 7, 128), key_bias(sizes)
    got = jax.jit(lambda q: known.all_logits(q, 1024, 0.5))(q)
    want = bias_logits(sizes, np.asarray(q.astype(jnp.float32), np.float64), 1024) * 0.5
    size = np.abs(want).max(axis=-1, keepdims=True)
    assert (np.abs(np.asarray(got) - want) / size).max() < KEY_BIAS_TF32


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(heads=4, ratio=7),
        Sizes(heads=2, ratio=1, page=32, window=100),
        Sizes(heads=1, ratio=12, page=128, soft_cap=50.0),
        Sizes(heads=2, ratio=8, dim=64, dtype="float16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fmt", UNBIASED, ids=lambda fmt: fmt.name)
def test_keys_without_their_bias(fmt: KVFormat, sizes: Sizes) -> None:
    _check(fmt, sizes)


@pytest.mark.parametrize("config", [Config(64, 2), Config(128, 2, 3), Config(64, 4, 16)], ids=str)
def test_keys_without_their_bias_in_splits(config: Config) -> None:
    _check(UNBIASED[1], Sizes(heads=2, ratio=7), config=config)


def test_keys_without_their_bias_through_paged_attention() -> None:
    lengths, sizes = [100, 0, 64, 700], Sizes(heads=2, ratio=7)
    cache = filled(UNBIASED[0], lengths, sizes)
    q, known = queries(sizes, 4), key_bias(sizes)
    assert paged_attention_unsupported_reason(q, cache, 0) is None
    n, slots = jnp.asarray(lengths, jnp.int32), jnp.arange(4, dtype=jnp.int32)

    def call(q: jax.Array, backend: str) -> jax.Array:
        where = n[:, None] - 1, slots, n
        options = {"scale": sizes.scale, "key_bias": known, "backend": backend}
        return paged_attention(q, cache, 0, *where, **options)

    run = jax.jit(call, static_argnums=1)
    kernel, xla = (np.asarray(run(q, name), np.float64) for name in ("mosaic_gpu", "xla"))
    assert relative_error(kernel, xla) < 2 * ATTENTION_BF16
