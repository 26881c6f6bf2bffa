"""KV cache: static scales, saturation counters, memory, construction and error messages."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._compat import JAX_VERSION
from qjax.kv_cache import static_scales_from
from qjax.kv_format import KVFormat, parse_kv_format
from qjax.ops.kv import append, read
from tests.kv_reference import (
    BOUND,
    CODES,
    DIM,
    HEADS,
    PAGE,
    STATIC,
    add,
    expected,
    ident,
    make,
    stored,
    tokens,
)

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


@pytest.mark.parametrize("mode", ["dynamic", "tracked", "static"])
@pytest.mark.parametrize("dtype", CODES)
def test_what_becomes_zero_is_counted(dtype, mode):
    fmt = KVFormat(dtype, mode)
    rng = np.random.default_rng(12)
    # From the top of the range to far below the smallest code, and some zeros that lose nothing.
    x = rng.normal(size=(1, 9, HEADS, DIM)) * 2.0 ** rng.integers(-40, 1, (1, 9, HEADS, DIM))
    x = np.where(rng.random(x.shape) < 0.2, 0, x).astype(np.float32)
    cache = add(make(fmt), x, np.zeros_like(x), slots=(0,))
    want, _ = expected(x[0], fmt, STATIC[0])
    count = np.count_nonzero((want == 0) & (x[0] != 0))
    assert 0 < count < np.count_nonzero(x)
    assert np.asarray(cache.underflowed).tolist() == [[count, 0]]


def test_plain_types_lose_what_their_exponent_cannot_hold():
    x = np.full((1, 1, HEADS, DIM), 1e-8, np.float32)
    cache = add(make(KVFormat("float16")), x, -x * 10, slots=(0,))
    assert np.asarray(cache.underflowed).tolist() == [[HEADS * DIM, 0]]
    cache = add(make(KVFormat("bfloat16")), x, x, slots=(0,))
    assert np.asarray(cache.underflowed).tolist() == [[0, 0]]


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
    assert cache.nbytes == pages + scales + 2 * 2 * HEADS * 4 + 3 * (2 * HEADS + 4) * 4 + 6 * 4
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
