"""Kernels for 8-bit activations in the Pallas interpreter: tiles, edges, splits, scales, packing.

The interpreter multiplies in numpy whatever the types, so that this proves nothing about the tensor
core: test_aot_w8a8.py compiles it and test_gpu_w8a8.py runs it.
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
from qjax.pallas_kernels import w4a8, weight_only_large
from qjax.pallas_kernels.w8a8 import Config
from qjax.quantize import quantize
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX,
    reason=f"jax {jax.__version__} has no Pallas GPU interpreter that runs these kernels",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product, small: the interpreter takes milliseconds for each copy."""

    fmt: QuantFormat
    m: int
    k: int
    n: int
    config: Config | weight_only_large.Config


W4A8 = qjax.INT4_G128.replace(activation=qjax.INT8_PER_TOKEN)
W4A8_CHANNEL = qjax.INT4_CHANNEL.replace(activation=qjax.INT8_PER_TOKEN)
CASES = {
    "fp8": Case(qjax.W8A8_FP8, 128, 384, 64, Config(64, 64, 2)),
    "fp8_edges_cluster": Case(qjax.W8A8_FP8, 200, 256, 192, Config(64, 64, 2, cluster=2)),
    "int8_edges": Case(qjax.W8A8_INT8, 150, 256, 192, Config(64, 160, 3)),
    "fp8_few_rows_splits": Case(qjax.W8A8_FP8, 5, 512, 128, Config(64, 8, 2, True, 2)),
    "int8_few_rows_edges": Case(qjax.W8A8_INT8, 37, 256, 192, Config(64, 24, 2, True)),
    "fp8_promoted": Case(qjax.W8A8_FP8, 130, 384, 128, Config(64, 128, 2, promote=True)),
    "blocks": Case(qjax.W8A8_FP8_BLOCK, 130, 384, 128, Config(64, 128, 2, promote=True)),
    "blocks_few_rows": Case(qjax.W8A8_FP8_BLOCK, 9, 512, 320, Config(64, 16, 2, True, 2, 1, True)),
    "w4a8": Case(W4A8, 70, 384, 128, weight_only_large.Config(48, 2)),
    "w4a8_overlap": Case(W4A8, 30, 896, 128, weight_only_large.Config(32, 3, overlap=True)),
    "w4a8_expanded": Case(W4A8, 30, 896, 128, w4a8.Config(64, 32, 3, swap=True, promote=True)),
    "w4a8_expanded_edges": Case(W4A8, 40, 512, 256, w4a8.Config(64, 32, 3, True, 2, 2, True)),
    "w4a8_splits": Case(W4A8, 5, 512, 256, weight_only_large.Config(16, 2, 2, 2)),
    "w4a8_whole": Case(qjax.W4A8_INT8, 70, 384, 128, weight_only_large.Config(48, 2)),
    "w4a8_whole_g32": Case(
        qjax.W4A8_INT8.replace(group_size=32), 24, 256, 128, weight_only_large.Config(24, 2)
    ),
    "w4a8_whole_ahead": Case(
        qjax.W4A8_INT8.replace(group_size=64),
        40,
        512,
        128,
        weight_only_large.Config(48, 3, ahead=2),
    ),
    "w4a8_channel": Case(W4A8_CHANNEL, 24, 256, 128, weight_only_large.Config(24, 2)),
}


def _operands(case: Case, rng: np.random.Generator) -> tuple[jax.Array, qjax.QuantizedArray]:
    values = rng.standard_normal((case.k, case.n)) * np.exp(rng.standard_normal((1, case.n)))
    x = rng.standard_normal((case.m, case.k)) * np.exp(rng.standard_normal((case.m, 1)))
    return jnp.asarray(x, jnp.bfloat16), quantize(jnp.asarray(values, jnp.float32), case.fmt)


def _reference(x: jax.Array, w: qjax.QuantizedArray) -> np.ndarray:
    assert w.fmt.activation is not None
    xq = quantize(x, w.fmt.activation, axis=-1).dequantize(jnp.float32)
    return np.asarray(xq, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)


@pytest.mark.parametrize("name", CASES)
def test_matches_float32_product(name: str, rng: np.random.Generator) -> None:
    case = CASES[name]
    x, w = _operands(case, rng)
    packed = pack_for_mosaic(w)
    assert packed_unsupported_reason(x, packed, interpret=True) is None
    out = packed_dot(x, packed, out_dtype=jnp.float32, config=case.config, interpret=True)
    assert out.shape == (case.m, case.n) and out.dtype == jnp.float32
    reference = _reference(x, w)
    size = np.linalg.norm(reference, axis=1, keepdims=True)
    assert relative_error(np.asarray(out) / size, reference / size) < tolerances.F32_SUM


def test_static_scale_permutation_and_leading_axes(rng: np.random.Generator) -> None:
    """With the default config; the XLA backend multiplies the same codes."""
    assert qjax.W8A8_INT8.activation is not None
    fmt = qjax.W8A8_INT8.replace(
        activation=qjax.W8A8_INT8.activation.replace(granularity="tensor", dynamic=False)
    )
    x, w = _operands(Case(fmt, 6, 256, 128, Config(64, 8, 2)), rng)
    w = dataclasses.replace(
        w, perm=jnp.asarray(rng.permutation(256), jnp.int32), act_scale=jnp.float32(0.02)
    )
    x = x.reshape(2, 3, 256)
    out = packed_dot(x, pack_for_mosaic(w), out_dtype=jnp.float32, interpret=True)
    expected = qjax.quantized_dot(x, w, out_dtype=jnp.float32)
    assert relative_error(out, expected) < tolerances.F32_SUM


def test_no_data_race_and_the_same_twice(rng: np.random.Generator) -> None:
    """Slots are reused three times by two warpgroups."""
    races: Any = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    case = Case(qjax.W8A8_INT8, 128, 768, 64, Config(64, 64, 2))
    x, w = _operands(case, rng)
    packed = pack_for_mosaic(w)

    def run() -> jax.Array:
        return packed_dot(x, packed, config=case.config, interpret=True)

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        first = run()
        assert not races.get_races().races_found
    assert (first == run()).all()
