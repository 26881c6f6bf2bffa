"""Attention over the paged cache and without one, against NumPy on the dequantized operands."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops import attention as module
from qjax.ops.attention import attention, paged_attention
from qjax.ops.kv import append, read
from tests.tolerances import ATTENTION_BF16, ATTENTION_F16, F32_SUM, relative_error

PAGE = 4
EDGES = (0, 1, PAGE - 1, PAGE, PAGE + 1)
F32, BF16, F16 = KVFormat("float32"), KVFormat("bfloat16"), KVFormat("float16")
INT8 = KVFormat("int8", "dynamic")

jit_append = jax.jit(append, static_argnums=1)
jit_read = jax.jit(read, static_argnums=(1, 3))


def reference(q, k, v, positions, lengths, scale, window=None, soft_cap=None) -> np.ndarray:
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        p, n = positions[b, t], lengths[b]
        if not 0 <= p < n:
            continue
        first = 0 if window is None else max(0, p - window + 1)
        head = h // (q.shape[2] // k.shape[2])
        logits = scale * k[b, first : p + 1, head] @ q[b, t, h]
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights / weights.sum() @ v[b, first : p + 1, head]
    return out


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def table_for(slots: int, per_seq: int, lengths) -> np.ndarray:
    """Pages in a scattered order, as few as each length needs; the rest unused."""
    total = slots * per_seq
    pages = np.random.default_rng(0).permutation(total).reshape(slots, per_seq)
    used = np.arange(per_seq)[None, :] * PAGE < np.asarray(lengths)[:, None]
    return np.where(used, pages, total).astype(np.int32)


def filled(fmt, lengths, *, heads=2, dim=8, per_seq=3, seed=1, gain=None):
    """A cache whose slot ``i`` holds ``lengths[i]`` tokens."""
    slots = len(lengths)
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=heads,
        head_dim=dim,
        num_pages=slots * per_seq,
        page_size=PAGE,
        max_seqs=slots,
        pages_per_seq=per_seq,
        fmt=fmt,
        static_scales=[(np.full(heads, 0.01), np.full(heads, 0.02))]
        if fmt.mode == "static"
        else None,
    ).with_page_table(table_for(slots, per_seq, lengths))
    t = per_seq * PAGE
    positions = np.broadcast_to(np.arange(t, dtype=np.int32), (slots, t))
    gain = np.ones(slots) if gain is None else np.asarray(gain)
    keys, values = normal(seed, (2, slots, t, heads, dim)) * gain[:, None, None, None].astype("f4")
    valid = positions < np.asarray(lengths)[:, None]
    rows = jnp.arange(slots, dtype=jnp.int32)
    return jit_append(cache, 0, keys, values, positions, rows, valid)


@functools.cache
def compiled(scale, window, chunk_tokens):
    """One jitted function per constant, so that equal shapes compile once."""
    assert chunk_tokens == module._CHUNK_TOKENS
    return jax.jit(
        lambda c, q, p, s, n: paged_attention(q, c, 0, p, s, n, scale=scale, window=window)
    )


def run(cache, q, positions, lengths, slots=None, *, window=None, dtype=jnp.float32):
    slots = np.arange(q.shape[0]) if slots is None else slots
    out = compiled(q.shape[3] ** -0.5, window, module._CHUNK_TOKENS)(
        cache,
        jnp.asarray(q, dtype=dtype),
        jnp.asarray(positions, dtype=jnp.int32),
        jnp.asarray(slots, dtype=jnp.int32),
        jnp.asarray(lengths, dtype=jnp.int32),
    )
    assert out.dtype == dtype and out.shape == q.shape
    return np.asarray(out.astype(jnp.float32))


def contents(cache) -> tuple[np.ndarray, np.ndarray]:
    keys, values = jit_read(
        cache, 0, jnp.arange(cache.max_seqs, dtype=jnp.int32), cache.pages_per_seq * PAGE
    )
    return np.asarray(keys), np.asarray(values)


def last(lengths) -> np.ndarray:
    """Position of the newest token of each sequence, ``[b, 1]``; -1 for an empty one."""
    return np.asarray(lengths)[:, None] - 1


CASES = [
    # format, query dtype, KV heads, GQA ratio, head_dim, tolerance
    (F32, jnp.float32, 2, 4, 64, F32_SUM),
    (BF16, jnp.bfloat16, 1, 8, 128, ATTENTION_BF16),
    (BF16, jnp.float32, 2, 1, 8, F32_SUM),
    (F16, jnp.float16, 2, 4, 8, ATTENTION_F16),
    (KVFormat("float8_e5m2", "dynamic"), jnp.bfloat16, 2, 4, 8, ATTENTION_BF16),
    (KVFormat("float8_e4m3fn", "tracked"), jnp.float32, 2, 1, 64, F32_SUM),
    (KVFormat("float8_e4m3fn", "static"), jnp.bfloat16, 2, 8, 8, ATTENTION_BF16),
    (KVFormat("int8", "dynamic"), jnp.float32, 1, 4, 128, F32_SUM),
    (KVFormat("int8", "static", "head"), jnp.float16, 2, 4, 8, ATTENTION_F16),
    (KVFormat("int4", "dynamic"), jnp.float32, 2, 8, 64, F32_SUM),
]


@pytest.mark.parametrize("form", ["decode", "prefill"])
@pytest.mark.parametrize(
    ("fmt", "dtype", "heads", "ratio", "dim", "tolerance"),
    CASES,
    ids=[f"{c[0].name}-{jnp.dtype(c[1]).name}-gqa{c[3]}-d{c[4]}" for c in CASES],
)
def test_formats_at_page_edges(form, fmt, dtype, heads, ratio, dim, tolerance):
    lengths = np.array(EDGES)
    cache = filled(fmt, lengths, heads=heads, dim=dim)
    t = 1 if form == "decode" else 6
    positions = last(lengths) if form == "decode" else np.tile(np.arange(6), (5, 1))
    q = np.asarray(jnp.asarray(normal(2, (5, t, heads * ratio, dim))).astype(dtype), np.float32)
    out = run(cache, q, positions, lengths, dtype=dtype)
    want = reference(q, *contents(cache), positions, lengths, dim**-0.5)
    assert relative_error(out, want) < tolerance
    padded = (positions >= lengths[:, None]) | (positions < 0)
    assert padded.any() and np.abs(out[padded]).max() == 0


@pytest.mark.parametrize("window", [1, 3, 50])
def test_sliding_window_in_every_form(window, monkeypatch):
    lengths = np.array([12, 7])
    cache = filled(INT8, lengths)
    positions = np.tile(np.arange(12), (2, 1))
    q = normal(3, (2, 12, 4, 8))
    want = reference(q, *contents(cache), positions, lengths, 8**-0.5, window)
    assert relative_error(run(cache, q, positions, lengths, window=window), want) < F32_SUM
    newest = q[np.arange(2)[:, None], last(lengths)]
    out = run(cache, newest, last(lengths), lengths, window=window)
    assert relative_error(out, want[np.arange(2)[:, None], last(lengths)]) < F32_SUM
    # Several key chunks, and queries that start late, so that the first chunks are skipped.
    monkeypatch.setattr(module, "_CHUNK_TOKENS", PAGE)
    out = run(cache, q[:, 5:], positions[:, 5:], lengths, window=window)
    assert relative_error(out, want[:, 5:]) < F32_SUM


@pytest.mark.parametrize("form", ["decode", "prefill"])
def test_soft_cap(form):
    lengths, cap = np.array([12, 7]), 0.7
    cache = filled(INT8, lengths)
    t = 1 if form == "decode" else 12
    positions = last(lengths) if form == "decode" else np.tile(np.arange(12), (2, 1))
    q = 3 * normal(13, (2, t, 4, 8))
    call = jax.jit(
        lambda *args: paged_attention(
            args[0], cache, 0, *args[1:], scale=8**-0.5, soft_cap=cap, consecutive=True
        )
    )
    i32 = [jnp.asarray(x, jnp.int32) for x in (positions, np.arange(2), lengths)]
    want = reference(q, *contents(cache), positions, lengths, 8**-0.5, soft_cap=cap)
    assert relative_error(call(q, *i32), want) < F32_SUM


@pytest.mark.parametrize("chunk", [PAGE, 2 * PAGE])
def test_many_key_chunks_equal_one(chunk, monkeypatch):
    lengths = np.array([12, 3, 0])
    cache = filled(INT8, lengths)
    positions = np.tile(np.arange(4, 9), (3, 1))
    q = normal(4, (3, 5, 4, 8))
    want = reference(q, *contents(cache), positions, lengths, 8**-0.5)
    monkeypatch.setattr(module, "_CHUNK_TOKENS", chunk)  # 3 pages: three chunks, or a ragged two
    out = run(cache, q, positions, lengths)
    assert relative_error(out, want) < F32_SUM
    assert np.abs(out[2]).max() == 0


def test_decode_equals_prefill_position_by_position():
    lengths = np.array([9, 9])
    cache = filled(INT8, lengths)
    q = normal(5, (2, 9, 4, 8))
    positions = np.tile(np.arange(9), (2, 1))
    prefill = run(cache, q, positions, lengths)
    for t in range(9):
        here = slice(t, t + 1)
        out = run(cache, q[:, here], positions[:, here], [t + 1, t + 1])
        assert relative_error(out, prefill[:, here]) < F32_SUM


@pytest.mark.parametrize("form", ["decode", "prefill", "chunked"])
def test_a_sequence_does_not_feel_the_others(form, monkeypatch):
    if form == "chunked":
        monkeypatch.setattr(module, "_CHUNK_TOKENS", PAGE)
    q = normal(6, (3, 1 if form == "decode" else 5, 4, 8))

    def first(lengths, gain):
        cache = filled(INT8, lengths, gain=gain)
        # The same pages for the first sequence in both worlds; the others' may differ in number.
        positions = np.asarray(lengths)[:, None] - q.shape[1] + np.arange(q.shape[1])
        return run(cache, q, positions, lengths)[0]

    one = first([7, 12, 5], [1, 1, 1])
    np.testing.assert_array_equal(one, first([7, 0, 9], [1, 1, 1000]))
    assert np.abs(one).max() > 0


def test_slots_in_any_order_and_number():
    lengths = np.array([6, 11, 2])
    cache = filled(INT8, lengths)
    q = normal(7, (3, 1, 4, 8))
    keys, values = contents(cache)
    for slots in ([2, 0, 1], [2, 1]):
        n = lengths[slots]
        out = run(cache, q[: len(slots)], last(n), n, slots)
        want = reference(q[: len(slots)], keys[slots], values[slots], last(n), n, 8**-0.5)
        assert relative_error(out, want) < F32_SUM
    # A slot that does not exist sees nothing.
    n = np.array([6, 11, 4])
    out = run(cache, q, last(n), n, [0, 1, 3])
    want = reference(q[:2], keys[:2], values[:2], last(n), n, 8**-0.5)
    assert relative_error(out[:2], want) < F32_SUM and np.abs(out[2]).max() == 0


def test_a_stale_table_row_of_an_idle_slot_steals_no_page():
    cache = filled(INT8, [9, 5])
    want = run(cache, q := normal(8, (2, 1, 4, 8)), last([9, 0]), [9, 0])
    stale = cache.with_page_table(jnp.stack([cache.page_table[0], cache.page_table[0]]))
    np.testing.assert_array_equal(run(stale, q, last([9, 0]), [9, 0]), want)


def test_a_table_wider_than_the_pool_takes_the_gathering_form():
    lengths = np.array([9, 5])
    wide = filled(INT8, lengths, per_seq=3)
    table = np.pad(np.asarray(wide.page_table), ((0, 0), (0, 17)), constant_values=wide.num_pages)
    cache = dataclasses.replace(wide, page_table=jnp.asarray(table))
    q = normal(9, (2, 1, 4, 8))
    want = run(wide, q, last(lengths), lengths)
    assert relative_error(run(cache, q, last(lengths), lengths), want) < F32_SUM


def test_decode_step_copies_neither_keys_nor_values():
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=4,
        head_dim=64,
        num_pages=32,
        page_size=32,
        max_seqs=2,
        pages_per_seq=16,
        fmt=F32,
    )
    rows = jnp.zeros(2, jnp.int32)
    step = (
        jax.jit(lambda c, q: paged_attention(q, c, 0, rows[:, None], rows, rows, scale=1.0))
        .lower(cache, jnp.zeros((2, 1, 4, 64)))
        .compile()
    )
    memory = step.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < cache.keys[0].nbytes / 8


def test_backends_and_arguments_are_refused_with_a_reason():
    cache = filled(F32, [3])
    q, one = jnp.zeros((1, 1, 2, 8)), jnp.ones(1, jnp.int32)

    def call(q=q, layer=0, positions=one[:, None], **options):
        return jax.eval_shape(
            lambda q: paged_attention(q, cache, layer, positions, one, one, scale=1.0, **options),
            q,
        )

    with pytest.raises(NotImplementedError, match="float32 pages; there are kernels for"):
        call(backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="cudnn cannot run here: one new token"):
        call(backend="cudnn")
    with pytest.raises(ValueError, match="unknown backend='triton'"):
        call(backend="triton")
    with pytest.raises(ValueError, match="soft_cap=0 must be positive"):
        call(soft_cap=0)
    with pytest.raises(ValueError, match="layer=1 must be in 0..0"):
        call(layer=1)
    with pytest.raises(ValueError, match="multiple of the cache's 2 KV heads"):
        call(q=q[:, :, :1])
    with pytest.raises(ValueError, match="positions"):
        call(positions=one)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        call(window=0)
    assert call(backend="xla").shape == q.shape


# --- without a cache ----------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "window"), [(1, None), (4, None), (8, 3)])
def test_plain_attention(ratio, window):
    q = normal(10, (2, 6, 2 * ratio, 8))
    k, v = normal(11, (2, 2, 6, 2, 8))
    positions, lengths = np.tile(np.arange(6), (2, 1)), np.array([6, 6])
    want = reference(q, k, v, positions, lengths, 0.3, window)
    call = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.3, window=window))
    out = call(q, k, v)
    assert relative_error(out, want) < F32_SUM
    low = [jnp.asarray(x).astype(jnp.bfloat16) for x in (q, k, v)]
    wide = [x.astype(jnp.float32) for x in low]
    exact = reference(wide[0], wide[1], wide[2], positions, lengths, 0.3, window)
    assert relative_error(call(low[0], low[1], low[2]).astype(jnp.float32), exact) < ATTENTION_BF16


def test_plain_attention_with_padding_has_zeros_and_finite_gradients():
    q, k, v = (jnp.asarray(x) for x in normal(12, (3, 2, 4, 2, 8)))
    valid = jnp.asarray([[True, True, True, False], [False] * 4])
    mask = jnp.broadcast_to(valid[:, None, :], (2, 4, 4))

    def total(q, k, v):
        out = attention(q, k, v, scale=0.3, mask=mask)
        return jnp.sum(out * out), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    positions, lengths = np.tile(np.arange(4), (2, 1)), np.array([3, 0])
    want = reference(q, k, v, positions, lengths, 0.3)
    assert relative_error(out[0, :3], want[0, :3]) < F32_SUM
    assert np.abs(np.asarray(out[1])).max() == 0
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)
    assert np.abs(np.asarray(grads[1])[1]).max() == 0


def test_plain_attention_refuses_wrong_shapes():
    q = jnp.zeros((1, 3, 4, 8))
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        attention(q, q[:, :, :3], q[:, :, :3], scale=1.0)
    with pytest.raises(ValueError, match=r"must be bool of shape \(1, 3, 3\)"):
        attention(q, q, q, scale=1.0, mask=jnp.ones((1, 3), bool))
    with pytest.raises(ValueError, match="window=-1"):
        attention(q, q, q, scale=1.0, window=-1)
