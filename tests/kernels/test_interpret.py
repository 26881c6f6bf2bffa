"""The weight-only kernel in the Pallas interpreter: copies, barriers, loops, scales, output.

Register unpacking and ``wgmma`` are replaced by the same arithmetic in jnp, which the interpreter
needs; what they become on the GPU is compiled by test_aot.py and run by test_gpu.py.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax.formats import QuantFormat
from qjax.ops.packed import pack_for_mosaic, packed_dot, packed_unsupported_reason
from qjax.pallas_kernels.weight_only import Config
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX,
    reason=f"jax {jax.__version__} has no Pallas GPU interpreter that runs these kernels",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product; ``k`` of few steps, because the interpreter takes milliseconds for each copy."""

    fmt: QuantFormat
    m: int
    k: int
    n: int
    config: Config
    tolerance: float
    x_dtype: str = "bfloat16"
    compute: str = "float16"
    perm: bool = False


CASES = {
    "int4_g128_pipelined": Case(
        qjax.INT4_G128, 3, 512, 128, Config(2, 2, 1, True), tolerances.F16_WEIGHTS
    ),
    "int4_g32_asym_perm_splits": Case(
        qjax.INT4_G32_ASYM, 8, 512, 64, Config(1, 3, 2), tolerances.F16_ZERO_POINTS, perm=True
    ),
    "int4_g128_bf16_pipelined": Case(
        qjax.INT4_G128, 3, 512, 64, Config(1, 2, 1, True), tolerances.F32_SUM, compute="bfloat16"
    ),
    "int4_g32_asym_bf16": Case(
        qjax.INT4_G32_ASYM, 9, 256, 64, Config(1, 2), tolerances.F32_SUM, compute="bfloat16"
    ),
    "int4_g64_bf16_many_rows": Case(
        qjax.INT4_G64, 33, 256, 64, Config(1, 2), tolerances.F32_SUM, compute="bfloat16"
    ),
    "int4_channel_f16": Case(
        qjax.INT4_CHANNEL, 1, 256, 64, Config(1, 2), tolerances.F32_SUM, x_dtype="float16"
    ),
    "int8_channel": Case(qjax.INT8_CHANNEL, 2, 256, 128, Config(1, 2), tolerances.F32_SUM),
    "e4m3_block": Case(qjax.FP8_E4M3_BLOCK128, 2, 256, 64, Config(1, 2), tolerances.F16_WEIGHTS),
    "e5m2_tensor": Case(qjax.FP8_E5M2_TENSOR, 2, 128, 64, Config(1, 2), tolerances.F32_SUM),
}


def _operands(case: Case, rng: np.random.Generator) -> tuple[jax.Array, qjax.PackedWeight]:
    values = rng.standard_normal((case.k, case.n)) * np.exp(rng.standard_normal((1, case.n)))
    q = qjax.quantize(jnp.asarray(values, jnp.float32), case.fmt)
    if case.perm:
        perm = jnp.asarray(rng.permutation(case.k), jnp.int32)
        q = dataclasses.replace(q, perm=perm)
    # Rows of very different size: bfloat16 ones would overflow float16 without their scale.
    x = rng.standard_normal((case.m, case.k))
    if case.x_dtype == "bfloat16":
        x *= np.exp2(rng.integers(-40, 40, (case.m, 1)))
    return jnp.asarray(x, case.x_dtype), pack_for_mosaic(q, compute=case.compute)


@pytest.mark.parametrize("name", CASES)
def test_matches_float32_product(name: str, rng: np.random.Generator) -> None:
    case = CASES[name]
    x, w = _operands(case, rng)
    assert packed_unsupported_reason(x, w, interpret=True) is None
    out = packed_dot(x, w, out_dtype=jnp.float32, config=case.config, interpret=True)
    assert out.shape == (case.m, case.n) and out.dtype == jnp.float32
    reference = np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)
    # Every row counts, whatever its size.
    size = np.linalg.norm(reference, axis=1, keepdims=True)
    assert relative_error(np.asarray(out) / size, reference / size) < case.tolerance


def test_no_data_race_and_the_same_twice(rng: np.random.Generator) -> None:
    """Slots are reused three times by two warpgroups; the interpreter watches every access."""
    races: Any = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    case = Case(qjax.INT4_G128, 8, 768, 128, Config(2, 2, 1, True), 0.0)
    x, w = _operands(case, rng)

    def run() -> jax.Array:
        return packed_dot(x, w, config=case.config, interpret=True)

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        first = run()
        assert not races.get_races().races_found
    assert (first == run()).all()


def test_zero_infinite_and_nan_rows(rng: np.random.Generator) -> None:
    """The float16 copy of the activations keeps zeros zero and non-finite rows non-finite."""
    case = Case(qjax.INT4_G128, 4, 128, 64, Config(1, 2), 0.0)
    x, w = _operands(case, rng)
    x = x.at[0].set(0).at[1, 3].set(jnp.inf).at[2, 5].set(jnp.nan)
    out = np.asarray(packed_dot(x, w, interpret=True, config=case.config), np.float32)
    assert (out[0] == 0).all()
    assert not np.isfinite(out[1:3]).any()
    assert np.isfinite(out[3]).all()


GATED = {
    "int4_g128": Case(qjax.INT4_G128, 3, 512, 256, Config(2, 2, 1, True), 0.0, compute="bfloat16"),
    "int8": Case(qjax.INT8_CHANNEL, 9, 256, 256, Config(2, 2), 0.0),
    "int4_g32_asym": Case(qjax.INT4_G32_ASYM, 2, 256, 128, Config(2, 2), 0.0, perm=True),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_products(name: str, rng: np.random.Generator) -> None:
    case = GATED[name]
    x, w = _operands(case, rng)
    x = x / jnp.abs(x).max(axis=1, keepdims=True).astype(x.dtype)
    w = pack_for_mosaic(w.unpack(), compute=case.compute, alternating=True)
    out = packed_dot(x, w, config=case.config, gated=True, interpret=True)
    both = packed_dot(x, w, config=case.config, interpret=True)
    gate, up = np.split(np.asarray(both, np.float64), 2, axis=1)
    assert out.dtype == x.dtype
    wanted = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted, tolerances.BF16_ELEMENT, atol=1e-38
    )
