"""The weight-only kernel for many rows in the Pallas interpreter: see test_interpret.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax.formats import QuantFormat
from qjax.ops.packed import pack_for_mosaic, packed_dot, packed_unsupported_reason
from qjax.pallas_kernels import weight_only_large
from qjax.pallas_kernels.weight_only_large import Config
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX,
    reason=f"jax {jax.__version__} has no Pallas GPU interpreter that runs these kernels",
)

# Format, rows, k, n, config, type of activations and products, tolerance.
CASES: dict[str, tuple[QuantFormat, int, int, int, Config, str, float]] = {
    "int4_g128": (
        qjax.INT4_G128, 72, 384, 128, Config(40, 3), "bfloat16", tolerances.F32_SUM
    ),
    "int4_g32_asym": (
        qjax.INT4_G32_ASYM, 72, 128, 128, Config(72, 2), "bfloat16", tolerances.F32_SUM
    ),
    "int4_g64_f16": (
        qjax.INT4_G64_ASYM, 70, 256, 256, Config(72, 2), "float16", tolerances.F16_ZERO_POINTS
    ),
    "int4_g128_splits": (
        qjax.INT4_G128, 24, 256, 256, Config(24, 3, splits=2, warpgroups=4), "bfloat16",
        tolerances.F32_SUM,
    ),
    "int8_cluster": (
        qjax.INT8_CHANNEL, 130, 256, 256, Config(128, 3, cluster=2), "bfloat16", tolerances.F32_SUM
    ),
    "int8_ahead": (
        qjax.INT8_CHANNEL, 30, 384, 128, Config(32, 3, ahead=2), "bfloat16", tolerances.F32_SUM
    ),
    "e4m3_block": (
        qjax.FP8_E4M3_BLOCK128, 72, 256, 128, Config(72, 2), "bfloat16", tolerances.F32_SUM
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_float32_product(name: str, rng: np.random.Generator) -> None:
    fmt, m, k, n, config, dtype, tolerance = CASES[name]
    values = rng.standard_normal((k, n)) * np.exp(rng.standard_normal((1, n)))
    w = pack_for_mosaic(qjax.quantize(jnp.asarray(values, jnp.float32), fmt), compute=dtype)
    x = jnp.asarray(rng.standard_normal((m, k)), dtype)
    assert packed_unsupported_reason(x, w, interpret=True) is None
    out = packed_dot(x, w, out_dtype=jnp.float32, config=config, interpret=True)
    assert out.shape == (m, n) and out.dtype == jnp.float32
    reference = np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)
    assert relative_error(out, reference) < tolerance


# Format, rows, k, n, config, shared memory. Several chunks of a tile, as many buffers or two.
GATED: dict[str, tuple[QuantFormat, int, int, int, Config, int]] = {
    "int4_g128": (qjax.INT4_G128, 40, 256, 256, Config(24, 3), 232448),
    "two_buffers": (qjax.INT8_CHANNEL, 56, 128, 256, Config(24, 2), 28 * 1024),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_products(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One multiprocessor for all tiles: every buffer and barrier is used again."""
    fmt, m, k, n, config, shared_memory = GATED[name]
    monkeypatch.setattr("qjax.pallas_kernels._weight_only_large_body._SM_COUNT", 1)
    monkeypatch.setattr("qjax.pallas_kernels.weight_only_large.SHARED_MEMORY_BYTES", shared_memory)
    w = qjax.quantize(jnp.asarray(rng.standard_normal((k, n)), jnp.float32), fmt)
    w = pack_for_mosaic(w, compute="bfloat16", alternating=True)
    x = jnp.asarray(rng.standard_normal((m, k)) / 16, jnp.bfloat16)
    both = np.asarray(packed_dot(x, w, config=config, interpret=True), np.float64)
    gate, up = np.split(both, 2, axis=1)
    out = packed_dot(x, w, config=config, gated=True, interpret=True)
    assert out.shape == (m, n // 2) and out.dtype == x.dtype
    wanted = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted, tolerances.BF16_ELEMENT, atol=1e-38
    )


def test_turns() -> None:
    """Two warpgroups with wide tiles, and kinds of weights for which they were measured to help."""

    def turns(m: int, compute: str, kind: str = "int4") -> str | None:
        group_size = 128 if kind == "int4" else None
        problem = weight_only_large.Problem(m, 4096, 28672, kind, group_size, compute=compute)
        return weight_only_large.heuristic_config(problem).turns

    assert turns(256, "int8") == "finished"
    many = weight_only_large.Problem(4096, 4096, 28672, "int4", 128, compute="int8")
    assert weight_only_large.heuristic_config(many).overlap and turns(4096, "int8") is None
    assert turns(4096, "bfloat16") == "started" and turns(64, "bfloat16") is None
    assert turns(4096, "float16") is turns(4096, "bfloat16", "int8") is None
    with pytest.raises(ValueError, match="turns='last' must be None or one of started, finished"):
        Config(64, 4, turns="last")
    with pytest.raises(ValueError, match="turns='started' with overlap=True: choose one"):
        Config(64, 4, turns="started", overlap=True)
