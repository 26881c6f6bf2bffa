"""The weight-only kernels on the GPU, against float32 products of the same packed operands."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import QuantFormat
from qjax.ops.gated import gated_config, gated_dot
from qjax.ops.packed import pack_for_mosaic, packed_dot
from qjax.pallas_kernels.weight_only import Config
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

# Format, type of the products, tolerance of a float32 output.
WEIGHTS: dict[str, tuple[QuantFormat, str, float]] = {
    "int4_g128": (qjax.INT4_G128, "float16", tolerances.F16_WEIGHTS),
    "int4_g64": (qjax.INT4_G64, "float16", tolerances.F16_WEIGHTS),
    "int4_g32": (qjax.INT4_G32, "float16", tolerances.F16_WEIGHTS),
    "int4_g128_asym": (qjax.INT4_G128_ASYM, "float16", tolerances.F16_ZERO_POINTS),
    "int4_g64_asym": (qjax.INT4_G64_ASYM, "float16", tolerances.F16_ZERO_POINTS),
    "int4_g32_asym": (qjax.INT4_G32_ASYM, "float16", tolerances.F16_ZERO_POINTS),
    "int4_channel": (qjax.INT4_CHANNEL, "float16", tolerances.F32_SUM_GPU),
    "int4_channel_asym": (qjax.INT4_CHANNEL_ASYM, "float16", tolerances.F16_ZERO_POINTS),
    "int4_g128_bf16": (qjax.INT4_G128, "bfloat16", tolerances.F32_SUM_GPU),
    "int4_g64_bf16": (qjax.INT4_G64, "bfloat16", tolerances.F32_SUM_GPU),
    "int4_g32_asym_bf16": (qjax.INT4_G32_ASYM, "bfloat16", tolerances.F32_SUM_GPU),
    "int8_channel": (qjax.INT8_CHANNEL, "float16", tolerances.F32_SUM_GPU),
    "int8_tensor": (qjax.INT8_TENSOR, "float16", tolerances.F32_SUM_GPU),
    "int8_g128": (qjax.INT8_G128, "float16", tolerances.F16_WEIGHTS),
    "e4m3_channel": (qjax.FP8_E4M3_CHANNEL, "float16", tolerances.F32_SUM_GPU),
    "e4m3_block128": (qjax.FP8_E4M3_BLOCK128, "float16", tolerances.F16_WEIGHTS),
    "e4m3_block128_bf16": (qjax.FP8_E4M3_BLOCK128, "bfloat16", tolerances.F32_SUM_GPU),
    "e5m2_channel": (qjax.FP8_E5M2_CHANNEL, "float16", tolerances.F32_SUM_GPU),
    "e5m2_block128": (qjax.FP8_E5M2_BLOCK128, "float16", tolerances.F16_WEIGHTS),
}
# Every branch of the kernel: warpgroups, more and fewer stages than steps, splits, pipelining.
CONFIGS = {
    "wg1": Config(1, 4),
    "wg2_splits": Config(2, 4, 2),
    "wg1_deep": Config(1, 12),
    "wg3": Config(3, 3),
    "wg4_pipelined": Config(4, 4, 1, True, 104),
    "wg4_pipelined_splits": Config(4, 2, 4, True, 104),
}


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


def _operands(
    rng: np.random.Generator, m: int, k: int, n: int, fmt: QuantFormat, compute: str, dtype: str
) -> tuple[jax.Array, qjax.PackedWeight]:
    values = rng.standard_normal((k, n), np.float32)
    values *= np.exp(rng.standard_normal((1, n))).astype(np.float32)
    w = pack_for_mosaic(qjax.quantize(jnp.asarray(values), fmt), compute=compute)
    x = rng.standard_normal((m, k), np.float32)
    if dtype == "bfloat16":  # rows of very different size, beyond the range of float16
        x *= np.exp2(rng.integers(-30, 30, (m, 1))).astype(np.float32)
    return jnp.asarray(x, dtype), w


def _check(x: jax.Array, w: qjax.PackedWeight, out: jax.Array, tolerance: float) -> None:
    weight = np.asarray(w.dequantize(jnp.float32), np.float64)
    reference = np.asarray(x, np.float64) @ weight
    size = np.linalg.norm(reference, axis=1, keepdims=True)
    assert relative_error(np.asarray(out, np.float64) / size, reference / size) < tolerance


@pytest.mark.parametrize("m", [1, 8, 16, 17, 64])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_and_rows(name: str, m: int, rng: np.random.Generator) -> None:
    fmt, compute, tolerance = WEIGHTS[name]
    x, w = _operands(rng, m, 1024, 512, fmt, compute, "bfloat16")
    run = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32))
    out = run(x, w)
    _check(x, w, out, tolerance)
    assert (out == run(x, w)).all(), "results must not differ from run to run"
    half = jax.jit(packed_dot)(x, w)
    assert half.dtype == jnp.bfloat16
    # Element by element: columns differ in size, and the largest alone may be rounded badly.
    exact = np.asarray(out, np.float64)
    size = np.sqrt(np.mean(exact**2, 1, keepdims=True))
    off = np.abs(np.asarray(half, np.float64) - exact)
    assert (off <= tolerances.BF16_ELEMENT * np.abs(exact) + tolerance * size).all()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["int4_g128", "int4_g32_asym", "int8_channel", "e4m3_block128"])
def test_configs(name: str, config: str, rng: np.random.Generator) -> None:
    fmt, compute, tolerance = WEIGHTS[name]
    for m in (3, 32):
        x, w = _operands(rng, m, 1024, 768, fmt, compute, "bfloat16")
        run = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32, config=CONFIGS[config]))
        out = run(x, w)
        _check(x, w, out, tolerance)
        assert (out == run(x, w)).all()


@pytest.mark.parametrize("name", ["int4_g128", "int4_channel", "int8_channel", "e4m3_channel"])
def test_float16_activations(name: str, rng: np.random.Generator) -> None:
    fmt, compute, tolerance = WEIGHTS[name]
    x, w = _operands(rng, 16, 1024, 512, fmt, compute, "float16")
    out = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32))(x, w)
    _check(x, w, out, tolerance)


def test_one_step_and_activation_order(rng: np.random.Generator) -> None:
    """The shortest contraction there is, and rows of the weight in another order."""
    x, w = _operands(rng, 2, 128, 64, qjax.INT4_G32, "float16", "bfloat16")
    w = dataclasses.replace(w, perm=jnp.asarray(rng.permutation(128), jnp.int32))
    out = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32))(x, w)
    _check(x, w, out, tolerances.F16_WEIGHTS)


def test_large_layers(rng: np.random.Generator) -> None:
    """Layers of an 8B model with the configs that the heuristic chooses for them."""
    for k, n in ((4096, 6144), (14336, 4096)):
        for name in ("int4_g128", "int8_channel"):
            fmt, compute, tolerance = WEIGHTS[name]
            x, w = _operands(rng, 8, k, n, fmt, compute, "bfloat16")
            out = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32))(x, w)
            _check(x, w, out, tolerance)


def test_quantized_dot_chooses_the_kernel(rng: np.random.Generator) -> None:
    x, w = _operands(rng, 4, 256, 128, qjax.INT4_G128, "float16", "bfloat16")
    assert "mosaic_gpu" in jax.jit(qjax.quantized_dot).lower(x, w).as_text()
    out = qjax.quantized_dot(x, w, backend="mosaic_gpu")
    assert (out == qjax.quantized_dot(x, w)).all()


def test_inside_a_loop(rng: np.random.Generator) -> None:
    """As in decoding: many calls in one program, each depending on the last."""
    x, w = _operands(rng, 8, 512, 512, qjax.INT8_CHANNEL, "float16", "float16")

    @jax.jit
    def chain(x: jax.Array, w: qjax.PackedWeight) -> jax.Array:
        def step(_: jax.Array, y: jax.Array) -> jax.Array:
            out = packed_dot(y, w, out_dtype=jnp.float32)
            return (out / jnp.abs(out).max()).astype(y.dtype)

        return jax.lax.fori_loop(0, 20, step, x)

    first = chain(x, w)
    assert np.isfinite(np.asarray(first, np.float64)).all()
    assert (first == chain(x, w)).all()


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize(
    "name", ["int4_g128_bf16", "int4_g32_asym", "int8_channel", "e4m3_channel"]
)
def test_gated(name: str, m: int, rng: np.random.Generator) -> None:
    fmt, compute, _ = WEIGHTS[name]
    x, w = _operands(rng, m, 1024, 33 * 256, fmt, compute, "bfloat16")
    # Of a size where silu is neither its argument nor zero.
    x = x / (32 * jnp.abs(x).max(axis=1, keepdims=True).astype(x.dtype))
    w = pack_for_mosaic(w.unpack(), compute=compute, alternating=True)
    assert gated_config(x, w) is not None
    both = packed_dot(x, w)
    gate, up = np.split(np.asarray(both, np.float64), 2, axis=1)
    wanted = gate / (1 + np.exp(-gate)) * up
    out = jax.jit(gated_dot)(x, w)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, tolerances.BF16_ELEMENT, 1e-38)
    assert (out == jax.jit(gated_dot)(x, w)).all()
