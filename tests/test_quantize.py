"""quantize, dequantize, fake_quantize: properties that hold for every format."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import qjax
from qjax import numerics
from qjax.formats import FORMATS, QuantFormat

NAMED = {name: fmt for name, fmt in FORMATS.items() if fmt is not None and fmt.activation is None}
ONE_OF_A_KIND = ["fp8", "fp8_e5m2_tensor", "fp8_block", "int8", "int4_g32", "int4_g32_asym"]


def _normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32))


def _expand(q: qjax.QuantizedArray) -> np.ndarray:
    """Scale per element, by NumPy."""
    scale = np.asarray(q.effective_scale())
    for axis, tile in enumerate(q.tiles):
        scale = np.repeat(scale, tile, axis)
    return scale[tuple(slice(0, size) for size in q.shape)]


@pytest.mark.parametrize("name", NAMED)
def test_error_is_at_most_half_a_step(name: str, rng: np.random.Generator) -> None:
    fmt = NAMED[name]
    x = _normal(rng, 256, 64)
    q = qjax.quantize(x, fmt)
    error = np.abs(np.asarray(q.dequantize()) - np.asarray(x))
    scale = _expand(q)
    if fmt.is_float:
        # Half a unit in the last place of the value, or of the smallest subnormal.
        info = ml_dtypes.finfo(np.dtype(fmt.storage_dtype))
        exponent = np.floor(np.log2(np.maximum(np.abs(np.asarray(x)) / scale, float(info.tiny))))
        half = 0.5 * np.exp2(exponent - info.nmant) * scale
    else:
        # An asymmetric range is shifted by the rounding of its zero point: half a step more.
        half = scale * (0.5 if fmt.symmetric else 1.0)
    assert np.all(error <= half * (1 + 1e-5))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "fp8_e5m2", "int4_g32_asym"])
def test_grid_points_round_trip_exactly(name: str, rng: np.random.Generator) -> None:
    fmt = NAMED[name]
    codes = np.linspace(fmt.qmin, fmt.qmax, 64 * 8).reshape(64, 8)
    codes = np.asarray(codes.round() if fmt.is_int else codes, np.dtype(fmt.storage_dtype))
    grid = jnp.asarray(rng.permuted(codes.astype(np.float32), axis=0))
    # Both ends in every tile, so that the scale is found again exactly.
    grid = grid.at[::32].set(fmt.qmin).at[1::32].set(fmt.qmax)
    q = qjax.quantize(grid, fmt)
    np.testing.assert_array_equal(np.asarray(q.dequantize()), np.asarray(grid))


@pytest.mark.parametrize("name", NAMED)
def test_unusual_inputs_have_their_stated_result(name: str) -> None:
    """The table at the top of qjax/numerics.py."""
    fmt = NAMED[name]
    base = np.tile(np.linspace(-1, 1, 256, dtype=np.float32)[:, None], (1, 8))
    quantize = jax.jit(lambda x: qjax.quantize(x, fmt))

    def run(x: np.ndarray) -> np.ndarray:
        q = quantize(jnp.asarray(x))
        assert np.all(np.isfinite(np.asarray(q.qvalue, np.float32)))
        assert np.all(np.asarray(q.scale, np.float32) > 0)
        return np.asarray(q.dequantize())

    plain = run(base)
    np.testing.assert_array_equal(run(np.zeros_like(base)), 0.0)
    for magnitude in (2.0**-90, 1e-30, 1e30):
        error = np.abs(run(base * np.float32(magnitude)) / np.float32(magnitude) - plain)
        # A power of two changes nothing; others may move a value across a rounding boundary.
        assert error.max() <= (0 if magnitude == 2.0**-90 else 0.3)
    with_nan, with_inf = base.copy(), base.copy()
    with_nan[7], with_inf[7], with_inf[9] = np.nan, np.inf, -np.inf
    finite = [row for row in range(256) if row not in (7, 9)]
    np.testing.assert_array_equal(run(with_nan)[7], 0.0)
    np.testing.assert_allclose(run(with_nan)[finite], plain[finite], atol=0.3)
    out = run(with_inf)
    np.testing.assert_allclose(out[finite], plain[finite], atol=0.3)
    # An asymmetric tile without a positive value has no positive code: its +inf becomes 0.
    low = -1e-9 if not fmt.symmetric else 0.0
    assert np.all(out[7] > low) and np.all(out[9] < 0) and np.all(np.abs(out) < 1.5)


@given(st.floats(width=32), st.sampled_from(["float8_e4m3fn", "float8_e5m2", "int8", "int4"]))
def test_saturating_cast(value: float, dtype: str) -> None:
    out = float(_cast(jnp.full((), value, jnp.float32), dtype).astype(jnp.float32))
    limit = numerics.bound(dtype)
    if np.isnan(value):
        assert out == 0
    elif abs(value) >= limit:
        assert out == np.copysign(limit, value)
    elif dtype.startswith("int"):
        assert out == np.rint(np.float32(value))
    else:
        narrow = np.dtype(getattr(ml_dtypes, dtype))
        assert out == float(np.float32(value).astype(narrow).astype(np.float32))


_cast = jax.jit(numerics.cast_saturating, static_argnums=1)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_commutes_with_batching_and_transposition(name: str, rng: np.random.Generator) -> None:
    fmt = NAMED[name]
    x = _normal(rng, 2, 160, 160)
    batched = qjax.quantize(x, fmt)
    mapped = jax.vmap(lambda x: qjax.quantize(x, fmt))(x)
    single = qjax.quantize(x[1], fmt)
    transposed = qjax.quantize(x[1].T, fmt, axis=-1)
    for other in (batched.dequantize()[1], mapped.dequantize()[1], transposed.dequantize().T):
        np.testing.assert_array_equal(np.asarray(other), np.asarray(single.dequantize()))
    np.testing.assert_array_equal(
        np.asarray(single.T.dequantize()), np.asarray(single.dequantize()).T
    )


def test_transformations(rng: np.random.Generator) -> None:
    """jit, scan, eval_shape, tree_map: a QuantizedArray is an ordinary pytree."""
    x = _normal(rng, 3, 64, 16)
    q = qjax.quantize(x, qjax.INT4_G32_ASYM)
    assert q.shape == (3, 64, 16) and q.ndim == 3 and q.size == 3072
    rows = jax.lax.scan(lambda carry, w: (carry, w.dequantize().sum()), 0, q)[1]
    np.testing.assert_allclose(rows, q.dequantize().sum((1, 2)), rtol=1e-5)
    abstract = jax.eval_shape(lambda x: qjax.quantize(x, qjax.INT4_G32_ASYM), x)
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    assert qjax.quantized_nbytes(abstract) == q.nbytes == qjax.quantized_nbytes(q)
    numbers = {"q": q, "on": True, "step": 2**40, "rate": 0.5, "mean": np.float64(0.5), "no": None}
    assert qjax.quantized_nbytes(numbers) == q.nbytes + 1 + 4 + 4 + 8
    assert qjax.quantized_nbytes(3) == 4
    with pytest.raises(ValueError, match=r"a/b is 'int4', neither an array nor a number"):
        qjax.quantized_nbytes({"a": {"b": "int4"}})
    again = jax.tree.map(lambda leaf: leaf, q)
    assert again.fmt == q.fmt and again.dtype == q.dtype


def test_sharded_quantization_keeps_the_sharding(rng: np.random.Generator) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    x = _normal(rng, 256, 64)
    for spec in (PartitionSpec(None, "tp"), PartitionSpec("tp", None)):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        q = jax.jit(lambda x: qjax.quantize(x, qjax.INT4_G128))(sharded)
        assert q.qvalue.sharding.is_equivalent_to(sharded.sharding, 2)
        np.testing.assert_array_equal(
            np.asarray(q.dequantize()), np.asarray(qjax.quantize(x, qjax.INT4_G128).dequantize())
        )


def test_int4_takes_half_a_byte() -> None:
    """By our own count, and by XLA's for the compiled program's arguments."""
    q = jax.eval_shape(lambda: qjax.quantize(jnp.ones((1024, 512), jnp.float32), qjax.INT4_G128))
    assert q.nbytes == 1024 * 512 // 2 + 8 * 512 * 4
    compiled = jax.jit(lambda q: q.qvalue.astype(jnp.int32).sum()).lower(q).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.argument_size_in_bytes <= q.nbytes


def test_fake_quantize(rng: np.random.Generator) -> None:
    x = _normal(rng, 64, 16)
    value, grad = jax.value_and_grad(lambda x: (qjax.fake_quantize(x, qjax.INT4_G32) ** 2).sum())(x)
    rounded = qjax.quantize(x, qjax.INT4_G32).dequantize()
    np.testing.assert_allclose(value, (rounded**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(grad, 2 * rounded, rtol=1e-6)  # d/dx = identity
    x16 = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        np.asarray(qjax.fake_quantize(x16, qjax.INT4_G32), np.float32),
        np.asarray(qjax.quantize(x16, qjax.INT4_G32).dequantize(), np.float32),
    )


def test_tree_rules(rng: np.random.Generator) -> None:
    w = _normal(rng, 32, 8)
    params = {"a": {"q_proj": {"kernel": w, "bias": w[0]}}, "lm_head": {"kernel": w}}
    out = qjax.quantize_tree(params, {"lm_head/.*": None, ".*/kernel": qjax.INT8_CHANNEL})
    assert isinstance(out["a"]["q_proj"]["kernel"], qjax.QuantizedArray)
    assert (
        out["lm_head"]["kernel"] is w
        and out["a"]["q_proj"]["bias"] is params["a"]["q_proj"]["bias"]
    )
    np.testing.assert_array_equal(
        np.asarray(qjax.dequantize_tree(out)["a"]["q_proj"]["kernel"]),
        np.asarray(out["a"]["q_proj"]["kernel"].dequantize()),
    )
    with pytest.raises(ValueError, match=r"rules \['k_proj'\] match none of the 3 parameters"):
        qjax.quantize_tree(params, {"k_proj": qjax.INT8_CHANNEL})
    with pytest.raises(ValueError, match="not a regular expression"):
        qjax.quantize_tree(params, {"(": qjax.INT8_CHANNEL})
    with pytest.raises(ValueError, match="bias of shape .* is no matrix"):
        qjax.quantize_tree(params, {".*": qjax.INT8_CHANNEL})
    with pytest.raises(ValueError, match="is quantized already"):
        qjax.quantize_tree(out, {"a/.*kernel": qjax.INT8_CHANNEL})


def test_static_scales(rng: np.random.Generator) -> None:
    x = _normal(rng, 4, 32)
    q = qjax.quantize(x, qjax.INT8_TENSOR, axis=-1, scale=jnp.full((1, 1), 0.01))
    np.testing.assert_array_equal(
        np.asarray(q.qvalue), np.clip(np.rint(np.asarray(x) / np.float32(0.01)), -127, 127)
    )


def test_errors() -> None:
    with pytest.raises(ValueError, match="only floating-point arrays"):
        qjax.quantize(jnp.ones((4, 4), jnp.int32), qjax.INT8_CHANNEL)
    with pytest.raises(ValueError, match="zero_point was given without scale"):
        zero = jnp.zeros((1, 4), jnp.int8)
        qjax.quantize(jnp.ones((4, 4)), QuantFormat("int8", symmetric=False), zero_point=zero)
    codes, ones = jnp.ones((8, 4), jnp.int8), jnp.ones((1, 4))
    make = qjax.QuantizedArray.make
    with pytest.raises(ValueError, match="int4_g128 stores int4"):
        make(codes, ones, qjax.INT4_G128)
    with pytest.raises(ValueError, match="must have the rank of qvalue"):
        make(codes, ones[0], qjax.INT8_CHANNEL)
    with pytest.raises(ValueError, match="axis 0 has 3 scales for 8 elements"):
        make(codes, jnp.ones((3, 4)), qjax.INT8_CHANNEL)
    with pytest.raises(ValueError, match="zero_point is needed"):
        make(codes, ones, QuantFormat("int8", symmetric=False))
    with pytest.raises(ValueError, match=r"perm.shape=\(4,\) must be \(8,\)"):
        make(codes, ones, qjax.INT8_CHANNEL, perm=jnp.arange(4))


def test_more_errors() -> None:
    x = jnp.ones((64, 4))
    with pytest.raises(ValueError, match=r"fmt='int4' is no QuantFormat; parse_format"):
        qjax.quantize(x, "int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"quantized already \(int8_channel\)"):
        qjax.quantize(qjax.quantize(x, qjax.INT8_CHANNEL), qjax.INT8_CHANNEL)  # pyright: ignore
    with pytest.raises(ValueError, match="must be a floating-point type"):
        qjax.quantize(x, qjax.INT8_CHANNEL, dtype=jnp.int32)
    with pytest.raises(ValueError, match="a tile of 64.0 elements"):
        qjax.QuantFormat("int4", "group", group_size=64.0)  # pyright: ignore


def test_float64() -> None:
    # Without 64-bit types it is float32; a float64 result would be a warning on every use.
    q = qjax.quantize(np.ones((64, 4), np.float64), qjax.INT8_CHANNEL)  # pyright: ignore
    assert q.dtype == jnp.float32 and q.dequantize().dtype == jnp.float32
    with jax.enable_x64(True):
        # What float32 cannot hold counts as inf, which is neither in the scale nor in the result.
        x = jnp.asarray([[1e300], [3.0], [-1.5], [-1e300]], jnp.float64)
        for fmt in (qjax.INT8_CHANNEL, qjax.FP8_E4M3_CHANNEL, qjax.INT4_CHANNEL_ASYM):
            values = qjax.quantize(x, fmt).dequantize()
            assert values.dtype == jnp.float64
            assert float(values[0, 0]) == pytest.approx(3.0)
            assert -3.001 < float(values[3, 0]) < -1.4
