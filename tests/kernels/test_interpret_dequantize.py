"""Dequantizing once in the Pallas interpreter: every value, and products; see test_interpret.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax.formats import QuantFormat
from qjax.ops.packed import pack_for_mosaic, packed_dot
from qjax.pallas_kernels import dequantize
from qjax.pallas_kernels.dequantize import Config
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX,
    reason=f"jax {jax.__version__} has no Pallas GPU interpreter that runs these kernels",
)

# Format, type in which the weight is packed, type of the matrix, k, n, config, alternating.
CASES: dict[str, tuple[QuantFormat, str, str, int, int, Config, bool]] = {
    "int4_g128": (qjax.INT4_G128, "bfloat16", "bfloat16", 512, 128, Config(2, 1), False),
    "int4_g128_f16": (qjax.INT4_G128, "float16", "float16", 256, 64, Config(1, 1), False),
    "int4_g128_f16_bf16": (qjax.INT4_G128, "float16", "bfloat16", 512, 64, Config(4, 2), False),
    "int4_g64_alternating": (qjax.INT4_G64, "bfloat16", "bfloat16", 256, 256, Config(2, 2), True),
    "int4_g32_asym": (qjax.INT4_G32_ASYM, "bfloat16", "bfloat16", 256, 64, Config(2, 2), False),
    "int4_channel": (qjax.INT4_CHANNEL, "bfloat16", "bfloat16", 128, 128, Config(1, 1), False),
    "int8_channel_f16": (qjax.INT8_CHANNEL, "float16", "float16", 256, 64, Config(1, 1), False),
    "int8_g128": (qjax.INT8_G128, "bfloat16", "bfloat16", 256, 64, Config(2, 1), False),
    "e4m3_block": (qjax.FP8_E4M3_BLOCK128, "bfloat16", "bfloat16", 256, 128, Config(1, 1), False),
    "e5m2_channel": (qjax.FP8_E5M2_CHANNEL, "bfloat16", "bfloat16", 256, 64, Config(2, 2), False),
}


@pytest.mark.parametrize("name", CASES)
def test_every_value_is_rounded_once(name: str, rng: np.random.Generator) -> None:
    fmt, compute, dtype, k, n, config, alternating = CASES[name]
    values = rng.standard_normal((k, n)) * np.exp(rng.standard_normal((1, n)))
    w = pack_for_mosaic(
        qjax.quantize(jnp.asarray(values, jnp.float32), fmt),
        compute=compute,
        alternating=alternating,
    )
    out = dequantize.dequantize(
        w.words,
        w.scales,
        w.column,
        kind=w.kind,
        dtype=dtype,
        alternating=alternating,
        config=config,
        interpret=True,
    )
    assert out.shape == (n, k) and out.dtype == dtype
    # `unpack` gives the scales by which the kernels multiply, in float32.
    exact = np.asarray(w.dequantize(jnp.float32), np.float64).T
    want = exact.astype(np.float32).astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(out), want)


def test_float16_with_zero_points_gives_the_weights_of_the_other_kernels(
    rng: np.random.Generator,
) -> None:
    values = jnp.asarray(rng.standard_normal((128, 64)), jnp.float32)
    w = pack_for_mosaic(qjax.quantize(values, qjax.INT4_G64_ASYM), compute="float16")
    out = dequantize.dequantize(
        w.words, w.scales, w.column, kind=w.kind, dtype="float16", interpret=True
    )
    exact = np.asarray(w.dequantize(jnp.float32), np.float64).T
    assert relative_error(out, exact) < tolerances.F16_ZERO_POINTS


def test_products(rng: np.random.Generator) -> None:
    """Permuted, alternating, and activations of either type for a weight packed for float16."""
    m, k, n = dequantize.MIN_ROWS, 256, 128
    fmt = qjax.INT4_G128
    w = qjax.quantize(jnp.asarray(rng.standard_normal((k, n)), jnp.float32), fmt)
    w = qjax.QuantizedArray.make(
        w.qvalue, w.scale, fmt, perm=jnp.asarray(rng.permutation(k), jnp.int32), dtype=w.dtype
    )
    for alternating, compute, dtype in (
        (True, "bfloat16", "bfloat16"),
        (False, "float16", "float16"),
        (False, "float16", "bfloat16"),
    ):
        packed = pack_for_mosaic(w, compute=compute, alternating=alternating)
        x = jnp.asarray(rng.standard_normal((2, m // 2, k)), dtype)
        out = packed_dot(x, packed, out_dtype=jnp.float32, config=Config(2, 2), interpret=True)
        reference = np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)
        assert out.shape == (2, m // 2, n) and out.dtype == jnp.float32
        tolerance = tolerances.BF16_OUTPUT if dtype == "bfloat16" else tolerances.F16_WEIGHTS
        assert relative_error(out, reference) < tolerance
        splits = packed_dot(x, packed, config=Config(2, 2), keep_splits=True, interpret=True)
        assert splits.shape == (1, 2, m // 2, n) and splits.dtype == dtype
