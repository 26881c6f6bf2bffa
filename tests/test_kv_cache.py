"""KV cache: what is stored, what is tracked, what is counted; independent NumPy reference."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax._compat import JAX_VERSION
from qjax.kv_cache import QuantizedKVCache, static_scales_from
from qjax.kv_format import KVFormat, parse_kv_format
from qjax.ops.kv import append, decay_scan, read

PLAIN = [KVFormat("float32"), KVFormat("bfloat16"), KVFormat("float16")]
CODES = ["float8_e5m2", "float8_e4m3fn", "int8", "int4"]
QUANTIZED = [KVFormat(d, m) for d in CODES for m in ("dynamic", "tracked", "static")]
BOUND = {"float8_e5m2": 57344.0, "float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0}
HEADS, DIM, PAGE = 2, 8, 4
STATIC = (np.array([0.02, 0.5], np.float32), np.array([0.3, 0.04], np.float32))

jit_append = jax.jit(append, static_argnums=1)
jit_read = jax.jit(read, static_argnums=(1, 3))
jit_scan = jax.jit(decay_scan)


def ident(fmt: KVFormat) -> str:
    return fmt.name


def make(fmt: KVFormat | Sequence[KVFormat], **kw: Any) -> QuantizedKVCache:
    """Two slots of three pages in a scattered order; slot 1 lacks its last page."""
    arguments: dict[str, Any] = {
        "num_layers": 1,
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "num_pages": 8,
        "page_size": PAGE,
        "max_seqs": 2,
        "pages_per_seq": 3,
        "fmt": fmt,
        "static_scales": [STATIC] if getattr(fmt, "mode", None) == "static" else None,
    }
    cache = QuantizedKVCache.init(**(arguments | kw))
    return cache.with_page_table(np.array([[5, 2, 7], [1, 0, cache.num_pages]], np.int32))


def tokens(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values whose magnitude varies from token to token by up to 2**6."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *shape, HEADS, DIM)) * 2.0 ** rng.integers(-3, 4, (2, *shape, 1, 1))
    return x[0].astype(np.float32), x[1].astype(np.float32)


def add(cache, keys, values, start: Any = 0, valid=None, slots=(0, 1), layer=0):
    """Append a chunk of consecutive tokens per row, from position ``start`` on.

    Padded to two rows of one or twelve tokens, so that a format compiles twice in this whole file.
    """
    b, t = keys.shape[:2]
    grow = ((0, 2 - b), (0, (1 if t == 1 else 12) - t))
    positions = np.asarray(start, np.int32).reshape(-1, 1) + np.arange(12, dtype=np.int32)[None]
    valid = np.ones((b, t), bool) if valid is None else valid
    return jit_append(
        cache,
        layer,
        jnp.asarray(np.pad(keys, (*grow, (0, 0), (0, 0)), constant_values=np.nan)),
        jnp.asarray(np.pad(values, (*grow, (0, 0), (0, 0)), constant_values=np.nan)),
        jnp.asarray(np.broadcast_to(positions, (2, 12))[:, : t + grow[1][1]]),
        jnp.asarray(np.pad(np.asarray(slots, np.int32), grow[0], constant_values=-1)),
        jnp.asarray(np.pad(valid, grow)),
    )


def stored(cache, layer=0) -> tuple[np.ndarray, np.ndarray]:
    """Dequantized keys and values of both slots, ``[2, 12, heads, dim]``."""
    keys, values = jit_read(cache, layer, jnp.arange(2, dtype=jnp.int32), 12)
    return np.asarray(keys), np.asarray(values)


def expected(x: np.ndarray, fmt: KVFormat, static: np.ndarray, start: np.ndarray | None = None):
    """Decoded values of one sequence ``[t, heads, dim]`` and the running statistic at its end."""
    if fmt.mode == "none":
        return x.astype(getattr(ml_dtypes, fmt.dtype, fmt.dtype)).astype(np.float32), None
    bound = np.float32(BOUND[fmt.dtype])
    running = np.zeros(HEADS, np.float32) if start is None else start
    out = np.zeros_like(x)
    for t in range(x.shape[0]):
        absmax = np.abs(x[t]).max(-1)
        running = np.maximum(absmax, running / 2)
        top = running if fmt.mode == "tracked" else absmax
        scale = np.where(top > 0, top * np.float32(1 / bound), np.float32(1))
        scale = (static if fmt.mode == "static" else scale)[:, None]
        ratio = np.clip(x[t] / scale, -bound, bound)
        if fmt.dtype.startswith("int"):
            codes = np.rint(ratio)
        else:
            codes = ratio.astype(getattr(ml_dtypes, fmt.dtype)).astype(np.float32)
        out[t] = codes * scale
    return out, running


def same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("fmt", PLAIN + QUANTIZED, ids=ident)
def test_any_chunking_stores_what_quantizing_at_once_gives(fmt):
    keys, values = tokens(0, (2, 9))
    lengths = np.array([9, 5])  # two pages and one token; one page and one token
    whole = None
    for chunks in [(9,), (4, 5), (1,) * 9]:
        cache, at = make(fmt), 0
        for t in chunks:
            part = slice(at, at + t)
            valid = np.arange(at, at + t)[None, :] < lengths[:, None]
            cache = add(cache, keys[:, part], values[:, part], at, valid)
            at += t
        if whole is None:
            whole = cache
        same(cache, whole)
    assert whole is not None
    got = stored(whole)
    for which, x in enumerate((keys, values)):
        for slot, length in enumerate(lengths):
            want, running = expected(x[slot, :length], fmt, STATIC[which])
            np.testing.assert_array_equal(got[which][slot, :length], want)
            if fmt.mode == "tracked":
                assert whole.running[0] is not None
                np.testing.assert_array_equal(np.asarray(whole.running[0])[which, slot], running)
    seen = np.abs(np.where((np.arange(9) < lengths[:, None])[..., None, None], [keys, values], 0))
    np.testing.assert_array_equal(np.asarray(whole.absmax)[0], seen.max((1, 2, 4)))


@pytest.mark.parametrize("length", [0, 1, PAGE - 1, PAGE, PAGE + 1])
def test_a_token_touches_only_its_own_place(length):
    fmt = KVFormat("int8", "dynamic")
    keys, values = tokens(1, (1, 12))
    cache = add(make(fmt), keys, values, slots=(0,))
    new, _ = tokens(2, (1, 1))
    after = add(cache, new, new, length, slots=(0,))
    page = (5, 2, 7)[length // PAGE]
    for old, now in zip(cache.keys + cache.values, after.keys + after.values, strict=True):
        changed = np.argwhere((np.asarray(old) != np.asarray(now)).any((1, 3)))
        assert changed.tolist() == [[page, length % PAGE]]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("not valid", {"valid": np.zeros((2, 1), bool)}),
        ("negative position", {"start": [-1, -2]}),
        ("beyond the table", {"start": [12, 4000]}),
        ("no such slot", {"slots": (-1, 2)}),
    ],
)
def test_what_has_no_place_changes_nothing(name, change):
    keys, values = tokens(3, (2, 1))
    for dtype in ("float8_e4m3fn", "int4"):
        cache = add(make(KVFormat(dtype, "tracked")), keys, values)
        poison = np.full_like(keys, np.inf)
        same(add(cache, poison, poison, **({"start": 1} | change)), cache)


def test_unused_table_entry_drops_the_token_only():
    keys, values = tokens(4, (2, 1))
    cache = make(KVFormat("int8", "tracked"))
    after = add(cache, keys, values, start=8)  # slot 1 has two pages
    assert np.asarray(after.running[0])[:, 1].max() == 0
    assert np.flatnonzero(np.asarray(after.keys[0]).any((1, 2, 3))).tolist() == [7]


# --- scale tracking ---------------------------------------------------------------------------


def overwrite_scale_store(sequence: np.ndarray, bound: float) -> np.ndarray:
    """The plain idea that fails: every store computes a fresh scale and overwrites the old one."""
    codes, scale = [], 1.0
    for token in sequence:
        scale = np.abs(token).max() / bound
        codes.append(np.rint(token / scale))
    return np.stack(codes) * scale


def test_overwriting_the_scale_ruins_earlier_tokens_and_tracking_does_not():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(10, HEADS, DIM)).astype(np.float32)
    x[9] *= 50
    naive = overwrite_scale_store(x[:, 0], 127.0)
    assert np.abs(naive[:9] - x[:9, 0]).max() > 10 * np.abs(x[:9, 0]).max()

    cache = add(make(KVFormat("int8", "tracked")), x[None, :9], x[None, :9], slots=(0,))
    before = stored(cache)[0][0, :9]
    after = stored(add(cache, x[None, 9:], x[None, 9:], 9, slots=(0,)))[0][0, :10]
    np.testing.assert_array_equal(after[:9], before)
    # Half a step of the largest scale in force: the running absmax over 127.
    assert np.abs(after - x).max(-1).max() <= np.abs(x).max() / 127 / 2 * 1.001
    assert np.abs(before - x[:9]).max() <= np.abs(x[:9]).max() / 127 / 2 * 1.001


def test_an_outlier_is_forgotten_within_six_tokens():
    rng = np.random.default_rng(6)
    x = np.sign(rng.normal(size=(12, HEADS, DIM))).astype(np.float32)
    x *= rng.uniform(0.25, 1, x.shape).astype(np.float32)
    x[..., 0] = 1  # every token has absmax 1
    x[2] *= 50
    cache = add(make(KVFormat("int8", "tracked")), x[None], x[None], slots=(0,))
    assert cache.key_scales[0] is not None
    page, offset = np.array([5, 2, 7])[np.arange(12) // 4], np.arange(12) % 4
    scale = np.asarray(cache.key_scales[0])[page, :, offset] * 127
    want = [1, 1, 50, 25, 12.5, 6.25, 3.125, 1.5625, 1, 1, 1, 1]
    np.testing.assert_allclose(scale[:, 0], want, rtol=1e-6)
    got = stored(cache)[0][0]
    assert np.abs(got[8:] - x[8:]).max() <= 0.5 / 127 * 1.001


def test_a_reset_slot_starts_afresh():
    loud, quiet = tokens(7, (2, 3))[0] * 100, tokens(8, (1, 3))[0]
    fmt = KVFormat("float8_e4m3fn", "tracked")
    used = add(make(fmt), loud, loud)
    used = used.reset_slots(np.array([False, True]))
    running = np.asarray(used.running[0])
    assert running[:, 0].min() > 0 and running[:, 1].max() == 0
    got = stored(add(used, quiet, quiet, slots=(1,)))[0][1, :3]
    fresh = stored(add(make(fmt), quiet, quiet, slots=(1,)))[0][1, :3]
    np.testing.assert_array_equal(got, fresh)


def test_rows_of_a_batch_do_not_influence_each_other():
    keys, values = tokens(9, (2, 3))
    fmt = KVFormat("int4", "tracked")
    both = add(make(fmt), keys, values)
    other = add(make(fmt), np.stack([keys[0], keys[1] * 1000]), np.stack([values[0]] * 2))
    alone = add(make(fmt), keys[:1], values[:1], slots=(0,))
    for which in range(2):
        np.testing.assert_array_equal(stored(both)[which][0], stored(other)[which][0])
        np.testing.assert_array_equal(stored(both)[which][0], stored(alone)[which][0])


_MAX = float(np.finfo(np.float32).max)
_floats = st.floats(0, _MAX, width=32) | st.sampled_from([0.0, 1.5e-45, 1.2e-38, 3e-38, 3.4e38])
_steps = st.lists(st.tuples(_floats, st.booleans()), min_size=6, max_size=6)


@given(_steps, st.integers(1, 5), st.floats(0, _MAX, width=32, allow_subnormal=False))
@settings(max_examples=25)
def test_decay_scan_is_exact_for_every_split(steps, cut, start):
    tiny = np.finfo(np.float32).tiny
    absmax = np.array([s[0] for s in steps], np.float32).reshape(1, 6, 1)
    valid = np.array([s[1] for s in steps]).reshape(1, 6)
    want, a = [], np.float32(start)
    for x, ok in zip(absmax[0, :, 0], valid[0], strict=True):
        if ok:
            a = max(x, a / np.float32(2))
            a = np.float32(0) if a < tiny else a
        want.append(a)
    begin = jnp.full((1, 1), start, jnp.float32)
    whole = jit_scan(jnp.asarray(absmax), begin, jnp.asarray(valid))
    np.testing.assert_array_equal(np.asarray(whole)[0, :, 0], np.array(want, np.float32))
    # The split runs at the same shapes (nothing recompiles): its halves are padded with invalid.
    left = valid & (np.arange(6) < cut)
    right = valid & (np.arange(6) >= cut)
    one = jit_scan(jnp.asarray(absmax), begin, jnp.asarray(left))
    two = jit_scan(jnp.asarray(absmax), one[:, -1], jnp.asarray(right))
    np.testing.assert_array_equal(np.asarray(two)[:, cut:], np.asarray(whole)[:, cut:])


def test_decay_of_a_long_pause_reaches_zero():
    absmax = np.zeros((1, 300, 1), np.float32)
    absmax[0, 0] = 3e38
    got = jit_scan(jnp.asarray(absmax), jnp.zeros((1, 1)), jnp.ones((1, 300), bool))
    want = 3e38 / 2.0 ** np.arange(300)
    want = np.where(want < np.finfo(np.float32).tiny, 0, want).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got)[0, :, 0], want)


@given(st.data())
@settings(max_examples=8)
def test_any_history_reads_back_as_its_model(data):
    """Random appends (ragged, padded), and slots given to new sequences, against a NumPy model."""
    fmt = KVFormat("int8", "tracked")
    cache = make(fmt)
    held: list[list[np.ndarray]] = [[], []]
    room = (12, 8)
    for step in range(data.draw(st.integers(2, 6))):
        if data.draw(st.booleans(), label="new sequence"):
            slot = data.draw(st.integers(0, 1))
            held[slot] = []
            cache = cache.reset_slots(np.arange(2) == slot)
        keys, values = tokens(data.draw(st.integers(0, 99)), (2, 3))
        count = [data.draw(st.integers(0, 3), label=f"tokens {step}") for _ in range(2)]
        valid = np.arange(3)[None, :] < np.array(count)[:, None]
        order = data.draw(st.sampled_from([(0, 1), (1, 0)]))
        start = [len(held[slot]) for slot in order]
        cache = add(cache, keys, values, start, valid, slots=order)
        for row, slot in enumerate(order):
            fits = list(keys[row, : count[row]])[: room[slot] - len(held[slot])]
            held[slot] += fits
    got = stored(cache)[0]
    for slot in range(2):
        if held[slot]:
            want, _ = expected(np.stack(held[slot]), fmt, STATIC[0])
            np.testing.assert_array_equal(got[slot, : len(held[slot])], want)


# --- unusual inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", PLAIN + QUANTIZED, ids=ident)
def test_infinities_and_nans_are_stored_finite_and_counted(fmt):
    rng = np.random.default_rng(11)
    bad = rng.uniform(-0.1, 0.1, (1, 3, HEADS, DIM)).astype(np.float32)
    bad[0, 1, 0, :3] = [np.inf, -np.inf, np.nan]
    bad[0, 2, 1] = np.nan
    clean = np.where(np.isfinite(bad), bad, np.float32(0))
    got = add(make(fmt), bad, clean, slots=(0,))
    assert np.asarray(got.saturated).tolist() == [[3 + DIM, 0]]
    like = add(make(fmt), clean, clean, slots=(0,))
    assert np.asarray(like.saturated).tolist() == [[0, 0]]
    same(got.layer_absmax, like.layer_absmax)
    same((got.running, got.key_scales, got.values), (like.running, like.key_scales, like.values))
    keys, others = (stored(c)[0][0, :3] for c in (got, like))
    elsewhere = ~np.isinf(bad[0])
    np.testing.assert_array_equal(keys[elsewhere], others[elsewhere])
    largest = {
        "none": float(jnp.finfo(fmt.dtype).max) if fmt.mode == "none" else 0,
        "static": STATIC[0][0] * BOUND.get(fmt.dtype, 0),
        "dynamic": np.abs(clean[0, 1, 0]).max(),
        "tracked": max(np.abs(clean[0, 1, 0]).max(), np.abs(clean[0, 0, 0]).max() / 2),
    }[fmt.mode]
    np.testing.assert_allclose(keys[1, 0, :2], [largest, -largest], rtol=1e-6)


@pytest.mark.parametrize("mode", ["dynamic", "tracked"])
@pytest.mark.parametrize("dtype", CODES)
def test_zeros_tiny_and_huge_tokens(dtype, mode):
    x = np.zeros((1, 3, HEADS, DIM), np.float32)
    x[0, 0, :, 0], x[0, 1, :, 0] = 1e-30, 1e30
    for order in ([2, 0, 1], [0, 2, 1]):
        cache = add(make(KVFormat(dtype, mode)), x[:, order], x[:, order], slots=(0,))
        np.testing.assert_allclose(stored(cache)[0][0, :3], x[0, order], rtol=1e-6)
    assert np.asarray(cache.saturated).max() == 0
    only_inf = np.full((1, 1, HEADS, DIM), np.inf, np.float32)
    cache = add(make(KVFormat(dtype, mode)), only_inf, only_inf, slots=(0,))
    assert stored(cache)[0][0, :1].max() == 0


# --- static scales, counters, statistics ------------------------------------------------------


@pytest.mark.parametrize("dtype", CODES)
def test_static_scales_clip_and_count(dtype):
    cache = make(KVFormat(dtype, "static"))
    x = np.zeros((1, 2, HEADS, DIM), np.float32)
    x[0, 0, 0, 0] = 1.2 * STATIC[0][0] * BOUND[dtype]  # clipped as a key
    x[0, 1, 1, 1] = -1.2 * STATIC[0][1] * BOUND[dtype]  # clipped as a key and as a value
    x[0, 1, 1, 2] = STATIC[1][1] * BOUND[dtype]  # the largest value that fits
    cache = add(cache, x, x, slots=(0,))
    assert np.asarray(cache.saturated).tolist() == [[2, 1]]
    keys, values = (a[0] for a in stored(cache))
    np.testing.assert_allclose(keys[0, 0, 0], STATIC[0][0] * BOUND[dtype], rtol=1e-6)
    np.testing.assert_allclose(values[1, 1, 1], -STATIC[1][1] * BOUND[dtype], rtol=1e-6)


def test_plain_float16_counts_what_leaves_its_range():
    x = np.full((1, 1, HEADS, DIM), 1e6, np.float32)
    cache = add(make(KVFormat("float16")), x, -x, slots=(0,))
    assert np.asarray(cache.saturated).tolist() == [[HEADS * DIM] * 2]
    assert stored(cache)[1].min() == -65504


def test_counters_stop_at_the_int32_maximum():
    full = jnp.full((2,), 2**31 - 3, jnp.int32)
    cache = dataclasses.replace(make(KVFormat("int8", "dynamic")), layer_saturated=(full,))
    nans = np.full((1, 1, HEADS, DIM), np.nan, np.float32)
    cache = add(cache, nans, nans, slots=(0,))
    assert np.asarray(cache.saturated).tolist() == [[2**31 - 1] * 2]


@pytest.mark.parametrize("granularity", ["head", "tensor"])
def test_measured_magnitudes_become_static_scales_that_do_not_clip(granularity):
    keys, values = tokens(12, (2, 8))
    layers = (KVFormat("bfloat16"), KVFormat("int8", "tracked"))
    cache = make(layers, num_layers=2)
    for layer in range(2):
        cache = add(cache, keys * (layer + 1), values, layer=layer)
    fmt = (KVFormat("bfloat16"), KVFormat("float8_e4m3fn", "static", granularity))
    scales = static_scales_from(cache, fmt)
    assert scales[0] is None and scales[1] is not None
    want = np.abs(keys * 2).max((0, 1, 3)) / np.float32(448)
    want = want if granularity == "head" else want.max()
    np.testing.assert_array_equal(scales[1][0], want)
    calibrated = make(fmt, num_layers=2, static_scales=scales)
    calibrated = add(calibrated, keys * 2, values, layer=1)
    assert np.asarray(calibrated.saturated).max() == 0
    got = stored(calibrated, 1)[0][:1, :8]
    # Rounding to three mantissa bits, and half a subnormal step (2**-10) of the largest scale.
    bound = np.abs(keys[:1] * 2) / 16 + np.abs(keys).max() * 2 / 448 * 2**-10
    assert (np.abs(got - keys[:1] * 2) <= bound * 1.001).all()


def test_static_scales_from_refuses_what_it_cannot_know():
    cache = make(KVFormat("bfloat16"))
    with pytest.raises(ValueError, match="run calibration text"):
        static_scales_from(cache, KVFormat("int8", "static"))
    with pytest.raises(ValueError, match="takes no static scales"):
        static_scales_from(cache, KVFormat("int8", "tracked"))
    with pytest.raises(ValueError, match="2 formats for 1 layers"):
        static_scales_from(cache, [KVFormat("int8", "static")] * 2)
    keys, values = tokens(13, (1, 1))
    keys[:, :, 0] = 0  # a head that is silent takes the layer's scale
    pair = static_scales_from(add(cache, keys, values, slots=(0,)), KVFormat("int8", "static"))[0]
    assert pair is not None and pair[0][0] == pair[0][1] > 0


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "there is no default"),
        ([None], "there is no default"),
        ([(STATIC[0], STATIC[1])] * 2, "2 entries for 1 layers"),
        ([(np.float32(1), STATIC[1])], r"key scale has shape \(\); granularity 'head' needs"),
        ([(STATIC[0], np.array([1.0, np.nan]))], "value scale .* positive and finite"),
        ([(STATIC[0], np.array([1.0, 0.0]))], "positive and finite"),
        ([(STATIC[0], np.array([1.0, -1.0]))], "positive and finite"),
        ([(STATIC[0], np.array([1.0, 1e-40]))], "positive and finite"),
    ],
)
def test_static_scales_are_validated(scales, message):
    with pytest.raises(ValueError, match=message):
        make(KVFormat("int8", "static"), static_scales=scales)


def test_static_scales_for_another_mode_are_refused():
    with pytest.raises(ValueError, match="the other modes take none"):
        make(KVFormat("int8", "dynamic"), static_scales=[STATIC])


# --- in place -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt",
    [KVFormat("bfloat16"), *(KVFormat(d, "tracked") for d in CODES)],
    ids=ident,
)
@pytest.mark.parametrize("looped", [False, True], ids=["step", "fori_loop"])
def test_append_to_a_donated_cache_copies_nothing(fmt, looped):
    if fmt.dtype == "bfloat16" and JAX_VERSION < (0, 11):
        pytest.skip("XLA's CPU backend of jax 0.10 widens a bfloat16 scatter to float32")
    cache = make(fmt, num_kv_heads=4, head_dim=64, num_pages=64, page_size=16)
    new = jnp.zeros((2, 1, 4, 64))
    slots, valid = jnp.arange(2, dtype=jnp.int32), jnp.ones((2, 1), bool)

    def step(i, cache):
        return append(cache, 0, new, new, jnp.broadcast_to(i, (2, 1)), slots, valid)

    def run(cache, start):
        return jax.lax.fori_loop(start, start + 3, step, cache) if looped else step(start, cache)

    compiled = jax.jit(run, donate_argnums=0).lower(cache, jnp.int32(0)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 10


# --- construction and messages ------------------------------------------------------------------


def test_layers_may_have_different_formats():
    layers = (KVFormat("bfloat16"), KVFormat("float8_e5m2", "tracked"), KVFormat("int4", "dynamic"))
    cache = make(layers, num_layers=3)
    keys, values = tokens(14, (1, 2))
    for layer, fmt in enumerate(layers):
        cache = add(cache, keys, values, layer=layer, slots=(0,))
        want, _ = expected(keys[0], fmt, STATIC[0])
        np.testing.assert_array_equal(stored(cache, layer)[0][0, :2], want)
    assert [k.dtype.name for k in cache.keys] == ["bfloat16", "uint8", "uint8"]
    assert (cache.num_layers, cache.head_dim, cache.num_kv_heads) == (3, DIM, HEADS)
    # Bits of 8 elements and the scale, for keys and values of two heads.
    assert cache.bytes_per_token() == 4 * (16 + (8 + 4) + (4 + 4))
    pages = sum(a.nbytes for a in cache.keys + cache.values)
    assert pages == 8 * PAGE * 4 * (16 + 8 + 4)
    scales = 2 * 2 * 8 * PAGE * HEADS * 4
    assert cache.nbytes == pages + scales + 2 * 2 * HEADS * 4 + 3 * (2 * HEADS + 2) * 4 + 6 * 4
    leaves, tree = jax.tree.flatten(cache)
    assert jax.tree.unflatten(tree, leaves).formats == layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size=0 must be at least 1"),
        ({"fmt": [KVFormat("bfloat16")] * 2}, "2 formats for num_layers=1"),
        ({"fmt": KVFormat("int4", "dynamic"), "head_dim": 7}, "must be even for int4"),
    ],
)
def test_init_names_the_wrong_size(change, message):
    with pytest.raises(ValueError, match=message):
        make(**({"fmt": KVFormat("bfloat16")} | change))


def test_page_tables_and_masks_are_checked():
    cache = make(KVFormat("bfloat16"))
    with pytest.raises(ValueError, match=r"\(2, 2\) must be \(2, 3\)"):
        cache.with_page_table(np.zeros((2, 2), np.int32))
    with pytest.raises(ValueError, match="page 3 is in the page table 2 times"):
        cache.with_page_table(np.array([[3, 1, 8], [3, 8, 8]]))
    with pytest.raises(ValueError, match="span -1..8"):
        cache.with_page_table(np.array([[3, 1, 8], [-1, 8, 8]]))
    with pytest.raises(ValueError, match="mask of shape"):
        cache.reset_slots(np.zeros(3, bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 1}, "layer=1 must be in 0..0"),
        ({"keys": np.zeros((2, 1, HEADS, 4), np.float32)}, "must both be"),
        ({"values": np.zeros((2, 2, HEADS, DIM), np.float32)}, "must both be"),
        ({"slots": (0, 1, 2)}, "slots"),
        ({"valid": np.ones((2, 1), np.int32)}, "must be bool"),
    ],
)
def test_append_names_the_wrong_argument(change, message):
    x = np.zeros((2, 1, HEADS, DIM), np.float32)
    with pytest.raises(ValueError, match=message):
        add(make(KVFormat("bfloat16")), **({"keys": x, "values": x} | change))


def test_read_refuses_more_than_a_sequence_can_hold():
    with pytest.raises(ValueError, match="length=13 must be in 0..12"):
        read(make(KVFormat("bfloat16")), 0, jnp.zeros(1, jnp.int32), 13)


def test_names_of_the_command_line():
    parse = functools.partial(parse_kv_format, model_dtype=jnp.bfloat16)
    assert parse("auto") == parse("bf16") == parse("bfloat16") == KVFormat("bfloat16")
    assert parse("fp8_e5m2") == KVFormat("float8_e5m2", "tracked")
    assert parse("int4", mode="static") == KVFormat("int4", "static", "head")
    assert parse("fp8_e4m3", mode="dynamic").name == "fp8_e4m3-dynamic"
    assert [parse(n).bits for n in ("f32", "f16", "fp8_e4m3", "int8", "int4")] == [32, 16, 8, 8, 4]
    with pytest.raises(ValueError, match="'fp8' is unknown; choose one of auto"):
        parse("fp8")
    with pytest.raises(ValueError, match="mode='none' is unknown"):
        parse("int8", mode="none")
    with pytest.raises(ValueError, match="cannot be a KV cache type"):
        parse_kv_format("auto", model_dtype=jnp.int32)


@pytest.mark.parametrize(
    "arguments",
    [
        ("int7", "dynamic"),
        ("int8", "sometimes"),
        ("int8", "none"),
        ("bfloat16", "static"),
        ("int8", "dynamic", "head"),
        ("int8", "static", "page"),
    ],
)
def test_formats_without_meaning_are_refused(arguments):
    with pytest.raises(ValueError, match="unknown|need mode|leave it None"):
        KVFormat(*arguments)
