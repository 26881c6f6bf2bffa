"""The kernels for 8-bit activations on the GPU, against float64 products of the same operands."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.formats import QuantFormat
from qjax.ops.packed import pack_for_mosaic, packed_dot
from qjax.pallas_kernels import w4a8, weight_only_large
from qjax.pallas_kernels.w8a8 import Config
from qjax.quantize import quantize
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

STATIC_INT8 = QuantFormat("int8", "tensor", dynamic=False)
FORMATS: dict[str, QuantFormat] = {
    "fp8": qjax.W8A8_FP8,
    "int8": qjax.W8A8_INT8,
    "fp8_block": qjax.W8A8_FP8_BLOCK,
    "int8_static": qjax.W8A8_INT8.replace(activation=STATIC_INT8),
    "fp8_tensor": qjax.FP8_E4M3_TENSOR.replace(activation=qjax.FP8_PER_TOKEN),
    "w4a8": qjax.INT4_G128.replace(activation=qjax.INT8_PER_TOKEN),
    "w4a8_whole": qjax.W4A8_INT8,
    "w4a8_whole_g32": qjax.W4A8_INT8.replace(group_size=32),
    "w4a8_channel": qjax.INT4_CHANNEL.replace(activation=qjax.INT8_PER_TOKEN),
    "e5m2": qjax.FP8_E5M2_CHANNEL.replace(activation=qjax.FP8_PER_TOKEN),
}
# Every branch of the kernel; the last of a tile's columns, rows and features lie over the edges.
CONFIGS: dict[str, tuple[str, Config | weight_only_large.Config]] = {
    "fp8_64x64": ("fp8", Config(64, 64, 4)),
    "fp8_64x256": ("fp8", Config(64, 256, 3)),
    "fp8_128x128": ("fp8", Config(128, 128, 3)),
    "fp8_128x128_cluster": ("fp8", Config(128, 128, 3, cluster=2)),
    "fp8_128x176_cluster": ("fp8", Config(128, 176, 3, cluster=2)),
    "fp8_128x192_raster": ("fp8", Config(128, 192, 2, raster=3)),
    "fp8_splits": ("fp8", Config(64, 96, 3, splits=4)),
    "fp8_promoted": ("fp8", Config(64, 192, 4, cluster=2, promote=True)),
    "fp8_swapped": ("fp8", Config(64, 48, 5, swap=True)),
    "fp8_swapped_splits": ("fp8", Config(128, 64, 3, swap=True, splits=2)),
    "int8_64x256": ("int8", Config(64, 256, 3)),
    "int8_128x160_cluster": ("int8", Config(128, 160, 3, cluster=2)),
    "int8_swapped": ("int8", Config(64, 112, 4, swap=True)),
    "int8_swapped_splits": ("int8", Config(128, 24, 6, swap=True, splits=4)),
    "block": ("fp8_block", Config(64, 128, 4, promote=True)),
    "block_cluster": ("fp8_block", Config(64, 128, 4, cluster=2, promote=True)),
    "block_swapped": ("fp8_block", Config(64, 160, 3, swap=True, cluster=2, promote=True)),
    "block_swapped_splits": ("fp8_block", Config(128, 40, 4, True, 2, 1, True)),
    "w4a8_cluster": ("w4a8", weight_only_large.Config(128, 4, 2)),
    "w4a8_splits": ("w4a8", weight_only_large.Config(48, 8, splits=2)),
    "w4a8_channel": ("w4a8_channel", weight_only_large.Config(256, 4)),
    "w4a8_turns": ("w4a8", weight_only_large.Config(128, 4, 2, turns="finished")),
    "w4a8_overlap": ("w4a8", weight_only_large.Config(96, 8, 2, overlap=True)),
    "w4a8_overlap_few_stages": ("w4a8", weight_only_large.Config(64, 3, overlap=True)),
    "w4a8_overlap_splits": ("w4a8", weight_only_large.Config(96, 4, splits=4, overlap=True)),
    "w4a8_expanded": ("w4a8", w4a8.Config(64, 112, 4, swap=True, promote=True)),
    "w4a8_expanded_cluster": ("w4a8", w4a8.Config(64, 96, 6, True, 1, 2, True)),
    "w4a8_expanded_splits": ("w4a8", w4a8.Config(64, 64, 3, True, 4, 1, True, 2)),
    "w4a8_whole": ("w4a8_whole", weight_only_large.Config(256, 4, 2)),
    "w4a8_whole_few": ("w4a8_whole", weight_only_large.Config(64, 6, warpgroups=4)),
    "w4a8_whole_splits": ("w4a8_whole", weight_only_large.Config(48, 8, splits=2)),
    "w4a8_whole_turns": ("w4a8_whole", weight_only_large.Config(256, 4, turns="started")),
    "w4a8_whole_ahead": ("w4a8_whole", weight_only_large.Config(224, 5, 2, ahead=4)),
    "w4a8_whole_ahead_few": ("w4a8_whole", weight_only_large.Config(64, 5, 1, 2, 4, ahead=2)),
    "w4a8_whole_g32": ("w4a8_whole_g32", weight_only_large.Config(128, 4, 2)),
    "w4a8_channel_turns": ("w4a8_channel", weight_only_large.Config(256, 4, turns="started")),
}


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


def _operands(
    rng: np.random.Generator, m: int, k: int, n: int, fmt: QuantFormat
) -> tuple[jax.Array, qjax.QuantizedArray]:
    values = rng.standard_normal((k, n), np.float32)
    values *= np.exp(rng.standard_normal((1, n))).astype(np.float32)
    w = quantize(jnp.asarray(values), fmt)
    x = rng.standard_normal((m, k), np.float32)
    assert fmt.activation is not None
    if fmt.activation.dynamic:
        x *= np.exp2(rng.integers(-20, 20, (m, 1))).astype(np.float32)
    else:
        w = dataclasses.replace(w, act_scale=jnp.float32(4 / 127))
    return jnp.asarray(x, jnp.bfloat16), w


def _tolerance(fmt: QuantFormat, k: int, promoted: bool) -> float:
    if not fmt.is_float:
        return tolerances.F32_SUM
    return tolerances.FP8_PROMOTED_SUM if promoted else tolerances.fp8_sum(k)


def _check(x: jax.Array, w: qjax.QuantizedArray, out: jax.Array, tolerance: float) -> None:
    assert w.fmt.activation is not None
    scale = None if w.act_scale is None else w.act_scale.reshape(1, 1)
    xq = quantize(x, w.fmt.activation, axis=-1, scale=scale).dequantize(jnp.float32)
    weight = np.asarray(w.dequantize(jnp.float32), np.float64)
    reference = np.asarray(xq, np.float64) @ weight
    size = np.linalg.norm(reference, axis=1, keepdims=True)
    error = relative_error(np.asarray(out, np.float64) / size, reference / size)
    print(f"relative error {error:.2e} of {tolerance:.2e}")
    assert error < tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, rng: np.random.Generator) -> None:
    fmt, config = FORMATS[CONFIGS[name][0]], CONFIGS[name][1]
    wide = 768 if fmt.bits == 4 else 832
    for m, k, n in ((300, 1024, wide), (37, 512, 256)):
        x, w = _operands(rng, m, k, n, fmt)
        run = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32, config=config))
        packed = pack_for_mosaic(w)
        out = run(x, packed)
        promoted = isinstance(config, Config) and config.promote
        _check(x, w, out, _tolerance(fmt, k // config.splits, promoted))
        assert (out == run(x, packed)).all(), "results must not differ from run to run"


@pytest.mark.parametrize("m", [1, 17, 65, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_rows(name: str, m: int, rng: np.random.Generator) -> None:
    """With the configs that the heuristic chooses, and results of both sizes."""
    fmt = FORMATS[name]
    x, w = _operands(rng, m, 1024, 768, fmt)
    packed = pack_for_mosaic(w)
    run = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32))
    out = run(x, packed)
    tolerance = _tolerance(fmt, 1024, w.tiles[0] == 128)
    _check(x, w, out, tolerance)
    assert (out == run(x, packed)).all(), "results must not differ from run to run"
    half = jax.jit(packed_dot)(x, packed)
    assert half.dtype == jnp.bfloat16
    _check(x, w, half, tolerance + tolerances.BF16_OUTPUT)


@pytest.mark.parametrize("name", ["fp8", "int8", "fp8_block", "w4a8"])
def test_large_layers(name: str, rng: np.random.Generator) -> None:
    """Many tiles per CTA, and more work than one wave, for layers of an 8B model."""
    fmt = FORMATS[name]
    for m, k, n in ((4096, 4096, 6144), (1024, 14336, 4096), (16, 4096, 28672)):
        values = jax.random.normal(jax.random.key(0), (k, n))
        x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
        w = quantize(values, fmt)
        packed = pack_for_mosaic(w)
        out = jax.jit(packed_dot)(x, packed)

        # Codes leave one program before the next reads them: within one, XLA on GPUs takes the
        # rounding to fp8 and back for excess and drops it.
        assert fmt.activation is not None
        xq = quantize(x, fmt.activation, axis=-1)

        @functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
        def error(xq: qjax.QuantizedArray, w: qjax.QuantizedArray, out: jax.Array) -> jax.Array:
            wide, weight = xq.dequantize(jnp.float32), w.dequantize(jnp.float32)
            reference = jnp.dot(wide, weight, precision=jax.lax.Precision.HIGHEST)
            off = jnp.linalg.norm(out.astype(jnp.float32) - reference)
            return off / jnp.linalg.norm(reference)

        found = float(error(xq, w, out))
        tolerance = _tolerance(fmt, k, w.tiles[0] == 128) + tolerances.BF16_OUTPUT
        print(f"{m=} {k=} {n=} relative error {found:.2e} of {tolerance:.2e}")
        assert found < tolerance
        assert (out == jax.jit(packed_dot)(x, packed)).all()


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_quantized_dot_chooses_the_kernel(name: str, rng: np.random.Generator) -> None:
    """And both backends multiply the same codes."""
    fmt = FORMATS[name]
    x, w = _operands(rng, 100, 512, 256, fmt)
    packed = pack_for_mosaic(w)
    assert "mosaic_gpu" in jax.jit(qjax.quantized_dot).lower(x, packed).as_text()
    ours = np.asarray(qjax.quantized_dot(x, packed, out_dtype=jnp.float32))
    xla = jax.jit(lambda x, w: qjax.quantized_dot(x, w, out_dtype=jnp.float32, backend="xla"))
    theirs = np.asarray(xla(x, w))
    size = np.linalg.norm(theirs, axis=1, keepdims=True)
    assert relative_error(ours / size, theirs / size) < 2 * _tolerance(fmt, 512, False)


def test_inside_a_loop(rng: np.random.Generator) -> None:
    """Many calls in one program, each depending on the last."""
    x, w = _operands(rng, 130, 512, 512, qjax.W8A8_FP8)
    packed = pack_for_mosaic(w)

    @jax.jit
    def chain(x: jax.Array, w: qjax.PackedWeight) -> jax.Array:
        def step(_: jax.Array, y: jax.Array) -> jax.Array:
            out = packed_dot(y, w, out_dtype=jnp.float32)
            return (out / jnp.abs(out).max()).astype(y.dtype)

        return jax.lax.fori_loop(0, 20, step, x)

    first = chain(x, packed)
    assert np.isfinite(np.asarray(first, np.float64)).all()
    assert (first == chain(x, packed)).all()
