"""KV cache: what is stored and what is tracked, against an independent NumPy model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.kv_format import KVFormat
from qjax.ops.kv import decay_scan
from tests.kv_reference import (
    BOUND,
    CODES,
    DIM,
    HEADS,
    PAGE,
    PLAIN,
    QUANTIZED,
    STATIC,
    add,
    expected,
    ident,
    make,
    same,
    stored,
    tokens,
)

jit_scan = jax.jit(decay_scan)


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
            want, running = expected(x[slot, :length], fmt, STATIC[which], keys=which == 0)
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
    if fmt.clips:  # with codes from 0.64 * 7 to 8 seventh of it
        assert (np.abs(keys[1, 0, :2] / largest - [0.9, -0.9]) < 0.27).all()
    else:
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


def test_without_counters_the_same_is_stored():
    """Counters are a choice; what is stored does not depend on it."""
    keys, values = tokens(3, (2, 5))
    fmt = next(f for f in QUANTIZED if f.mode == "tracked")
    kept = add(make(fmt), keys, values, 0)
    bare = add(dataclasses.replace(make(fmt), counted=False), keys, values, 0)
    for a, b in zip(stored(kept), stored(bare), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.asarray(kept.layer_absmax[0]).max() > 0
    assert np.asarray(bare.layer_absmax[0]).max() == 0
