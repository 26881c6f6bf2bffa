"""Dequantizing once, then XLA's product, on the GPU; see test_gpu.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import QuantFormat
from qjax.ops.packed import PackedWeight, pack_for_mosaic, packed_dot
from qjax.pallas_kernels import dequantize
from qjax.pallas_kernels.dequantize import Config
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

# Format, type in which the weight is packed.
WEIGHTS: dict[str, tuple[QuantFormat, str]] = {
    "int4_g128": (qjax.INT4_G128, "bfloat16"),
    "int4_g128_f16": (qjax.INT4_G128, "float16"),
    "int4_g64": (qjax.INT4_G64, "bfloat16"),
    "int4_g32_asym": (qjax.INT4_G32_ASYM, "bfloat16"),
    "int4_channel": (qjax.INT4_CHANNEL, "bfloat16"),
    "int8_channel": (qjax.INT8_CHANNEL, "bfloat16"),
    "int8_g128": (qjax.INT8_G128, "bfloat16"),
    "e4m3_channel": (qjax.FP8_E4M3_CHANNEL, "bfloat16"),
    "e4m3_block128": (qjax.FP8_E4M3_BLOCK128, "bfloat16"),
    "e5m2_channel": (qjax.FP8_E5M2_CHANNEL, "bfloat16"),
}


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


def _weight(
    rng: np.random.Generator, k: int, n: int, name: str, *, alternating: bool = False
) -> PackedWeight:
    fmt, compute = WEIGHTS[name]
    values = rng.standard_normal((k, n), np.float32)
    values *= np.exp(rng.standard_normal((1, n))).astype(np.float32)
    w = qjax.quantize(jnp.asarray(values), fmt)
    return pack_for_mosaic(w, compute=compute, alternating=alternating)


def _matrix(w: PackedWeight, dtype: str, config: Config | None = None) -> jax.Array:
    def run(w: PackedWeight) -> jax.Array:
        return dequantize.dequantize(
            w.words,
            w.scales,
            w.column,
            kind=w.kind,
            dtype=dtype,
            alternating=w.alternating,
            config=config,
        )

    return jax.jit(run)(w)


def _expected(w: PackedWeight, dtype: str) -> np.ndarray:
    exact = np.asarray(w.dequantize(jnp.float32)).T
    return exact.astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_value_is_rounded_once(name: str, rng: np.random.Generator) -> None:
    w = _weight(rng, 1024, 320, name)
    for dtype in ("bfloat16", "float16"):
        out = _matrix(w, dtype)
        np.testing.assert_array_equal(np.asarray(out), _expected(w, dtype), err_msg=dtype)


@pytest.mark.parametrize("name", ["int4_g128", "int4_g32_asym", "int8_channel"])
def test_configs(name: str, rng: np.random.Generator) -> None:
    w = _weight(rng, 2048, 256, name, alternating=name != "int4_g32_asym")
    expected = _expected(w, "bfloat16")
    problem = dequantize.Problem(256, 2048, 256, w.kind, compute="bfloat16")
    for config in dequantize.search_space(problem):
        out = _matrix(w, "bfloat16", config)
        np.testing.assert_array_equal(np.asarray(out), expected, err_msg=str(config))


def test_products(rng: np.random.Generator) -> None:
    for name in ("int4_g128", "int4_g128_f16", "int8_channel"):
        w = _weight(rng, 1024, 512, name)
        x = jnp.asarray(rng.standard_normal((515, 1024), np.float32), jnp.bfloat16)
        run = jax.jit(functools.partial(packed_dot, config=Config(2, 2)))
        out = run(x, w)
        assert out.dtype == jnp.bfloat16
        weight = np.asarray(w.dequantize(jnp.float32), np.float64)
        error = relative_error(out, np.asarray(x, np.float64) @ weight)
        print(f"{name} relative error {error:.2e}")
        assert error < tolerances.BF16_OPERANDS
        assert (out == run(x, w)).all(), "results must not differ from run to run"


def test_large_layer(rng: np.random.Generator) -> None:
    """Every value of a layer of an 8B model: many CTAs, and offsets beyond 2**27 bytes."""
    w = _weight(rng, 4096, 28672, "int4_g128")
    out = _matrix(w, "bfloat16")

    @jax.jit
    def differences(out: jax.Array, w: PackedWeight) -> jax.Array:
        # As bits: XLA may compare in float32 and then leave the rounding to bfloat16 out.
        found, expected = (
            jax.lax.bitcast_convert_type(values, jnp.uint16)
            for values in (out, w.dequantize(jnp.bfloat16).T)
        )
        # A zero's sign is that of its code less the zero point in the one, of a sum in the other.
        return ((found != expected) & ((found | expected) << 1 != 0)).sum()

    assert int(differences(out, w)) == 0
