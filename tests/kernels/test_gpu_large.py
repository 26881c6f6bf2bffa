"""The weight-only kernel for many rows on the GPU; see test_gpu.py."""

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
from qjax.ops.gated import gated_config, gated_dot
from qjax.ops.packed import pack_for_mosaic, packed_dot
from qjax.pallas_kernels import weight_only_large
from qjax.pallas_kernels.weight_only_large import Config
from tests import tolerances
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

# Format, type of the products, tolerance of a float32 output.
WEIGHTS: dict[str, tuple[QuantFormat, str, float]] = {
    "int4_g128": (qjax.INT4_G128, "bfloat16", tolerances.F32_SUM_GPU),
    "int4_g128_f16": (qjax.INT4_G128, "float16", tolerances.F16_WEIGHTS),
    "int4_g64": (qjax.INT4_G64, "bfloat16", tolerances.F32_SUM_GPU),
    "int4_g32_asym": (qjax.INT4_G32_ASYM, "bfloat16", tolerances.F32_SUM_GPU),
    "int4_g32_asym_f16": (qjax.INT4_G32_ASYM, "float16", tolerances.F16_ZERO_POINTS),
    "int4_channel": (qjax.INT4_CHANNEL, "bfloat16", tolerances.F32_SUM_GPU),
    "int8_channel": (qjax.INT8_CHANNEL, "bfloat16", tolerances.F32_SUM_GPU),
    "int8_g128": (qjax.INT8_G128, "bfloat16", tolerances.F32_SUM_GPU),
    "e4m3_channel": (qjax.FP8_E4M3_CHANNEL, "bfloat16", tolerances.F32_SUM_GPU),
    "e4m3_block128": (qjax.FP8_E4M3_BLOCK128, "bfloat16", tolerances.F32_SUM_GPU),
    "e5m2_channel": (qjax.FP8_E5M2_CHANNEL, "float16", tolerances.F32_SUM_GPU),
}
# The last of a tile's tokens lie over the edge; more and fewer stages than steps.
CONFIGS: dict[str, tuple[str, Config]] = {
    "wide": ("int8_channel", Config(256, 4)),
    "wide_cluster": ("int4_channel", Config(256, 5, cluster=2)),
    "narrow_deep_raster": ("e4m3_channel", Config(72, 12, raster=2)),
    "sums": ("int4_g128", Config(256, 5)),
    "splits": ("int8_channel", Config(112, 4, cluster=2, splits=4)),
    "sums_splits": ("int4_g128", Config(152, 4, splits=2)),
    "sums_cluster": ("int4_g128", Config(128, 5, cluster=2)),
    "sums_of_short_groups": ("int4_g32_asym", Config(256, 4, cluster=2)),
    "four_warpgroups": ("int4_g128", Config(64, 6, cluster=2, warpgroups=4)),
    "four_warpgroups_splits": ("int4_g32_asym", Config(80, 4, splits=2, warpgroups=4)),
    "three_warpgroups": ("int8_g128", Config(160, 4, warpgroups=3)),
    "f16_cluster": ("int4_g128_f16", Config(208, 5, cluster=2)),
    "started": ("int8_channel", Config(256, 4, turns="started")),
    "started_sums": ("int4_g128", Config(256, 5, cluster=2, turns="started")),
    "started_short_groups": ("int4_g32_asym", Config(256, 4, turns="started")),
    "started_two_stages": ("int4_g128", Config(192, 2, turns="started")),
    "ahead": ("e4m3_channel", Config(128, 8, ahead=4)),
    "ahead_rest": ("int8_channel", Config(192, 5, cluster=2, splits=2, ahead=4)),
    "ahead_four_warpgroups": ("int4_g128_f16", Config(64, 6, cluster=2, warpgroups=4, ahead=2)),
    "finished_three": ("int8_g128", Config(160, 4, warpgroups=3, turns="finished")),
    "finished_four": ("int4_g128", Config(64, 6, cluster=2, warpgroups=4, turns="finished")),
}


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


# Four and two warpgroups, pairs of CTAs, one and several tiles per CTA and chunks per tile, in as
# many buffers or in fewer, and the edge. (The type of activations int8 is W4A8.)
GATED: dict[str, tuple[str, int, int, Config]] = {
    "decode": ("int4_g128", 64, 33 * 512, Config(64, 8, cluster=2, warpgroups=4)),
    "decode_tiles": ("int4_g128", 200, 33 * 512, Config(64, 6, cluster=2, warpgroups=4)),
    "decode_edge": ("int4_g128", 40, 33 * 512, Config(80, 6, warpgroups=4)),
    "short_chunks": ("int4_g128", 40, 33 * 512, Config(40, 8, warpgroups=4)),
    "tiles": ("int4_g32_asym", 300, 33 * 256, Config(80, 4)),
    "two_buffers": ("int8_channel", 520, 33 * 256, Config(192, 6)),
    "one_buffer": ("int8_channel", 520, 33 * 256, Config(256, 5, cluster=2)),
    "f16": ("int4_g128_f16", 200, 16 * 256, Config(112, 4)),
    # Turns across the barriers by which pairs of warpgroups meet at the end of a tile.
    "started": ("int8_channel", 520, 33 * 256, Config(192, 6, turns="started")),
    "started_one_buffer": ("int8_channel", 520, 33 * 256, Config(256, 5, 2, turns="started")),
    "finished_four": ("int4_g128", 200, 33 * 512, Config(64, 6, 2, 1, 4, turns="finished")),
    "ahead": ("int8_channel", 520, 33 * 256, Config(192, 6, ahead=4)),
    "ahead_four": ("int4_channel", 64, 33 * 512, Config(64, 8, 2, 1, 4, ahead=2)),
    "e4m3": ("e4m3_block128", 200, 33 * 512, Config(64, 4, warpgroups=4)),
}


def _operands(
    rng: np.random.Generator, m: int, k: int, n: int, name: str
) -> tuple[jax.Array, qjax.PackedWeight]:
    fmt, compute, _ = WEIGHTS[name]
    values = rng.standard_normal((k, n), np.float32)
    values *= np.exp(rng.standard_normal((1, n))).astype(np.float32)
    w = pack_for_mosaic(qjax.quantize(jnp.asarray(values), fmt), compute=compute)
    x = rng.standard_normal((m, k), np.float32)
    return jnp.asarray(x, jnp.bfloat16), w


def _check(x: jax.Array, w: qjax.PackedWeight, out: jax.Array, tolerance: float) -> None:
    weight = np.asarray(w.dequantize(jnp.float32), np.float64)
    reference = np.asarray(x, np.float64) @ weight
    error = relative_error(out, reference)
    print(f"relative error {error:.2e} of {tolerance:.2e}")
    assert error < tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str, rng: np.random.Generator) -> None:
    weight, config = CONFIGS[name]
    x, w = _operands(rng, 300, 1024, 1536, weight)
    run = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32, config=config))
    out = run(x, w)
    _check(x, w, out, WEIGHTS[weight][2])
    assert (out == run(x, w)).all(), "results must not differ from run to run"


@pytest.mark.parametrize("m", [65, 128, 515])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_and_rows(name: str, m: int, rng: np.random.Generator) -> None:
    tolerance = WEIGHTS[name][2]
    x, w = _operands(rng, m, 1024, 512, name)
    run = jax.jit(packed_dot)
    out = run(x, w)
    assert out.dtype == jnp.bfloat16
    _check(x, w, out, tolerance + tolerances.BF16_OUTPUT)
    assert (out == run(x, w)).all(), "results must not differ from run to run"


def test_groups_of_scale_zero(rng: np.random.Generator) -> None:
    """Sums are divided by scales; groups whose scale is zero contribute nothing."""
    x, w = _operands(rng, 100, 1024, 256, "int4_g128")
    assert w.scales is not None
    w = dataclasses.replace(w, scales=w.scales.at[2:5, :, ::3].set(0.0).at[7, :, 1].mul(-1.0))
    out = jax.jit(lambda x, w: packed_dot(x, w, out_dtype=jnp.float32))(x, w)
    _check(x, w, out, tolerances.F32_SUM_GPU)


@pytest.mark.parametrize("name", ["int4_g128", "int4_g32_asym", "int8_channel"])
def test_large_layers(name: str, rng: np.random.Generator) -> None:
    """Many tiles per CTA, and few rows that would lack registers, for layers of an 8B model."""
    for m, k, n in ((2048, 4096, 6144), (128, 14336, 4096), (64, 4096, 28672), (40, 14336, 4096)):
        x, w = _operands(rng, m, k, n, name)
        out = jax.jit(packed_dot)(x, w)

        @functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
        def error(x: jax.Array, w: qjax.PackedWeight, out: jax.Array) -> jax.Array:
            wide, highest = x.astype(jnp.float32), jax.lax.Precision.HIGHEST
            reference = jnp.dot(wide, w.dequantize(jnp.float32), precision=highest)
            off = jnp.linalg.norm(out.astype(jnp.float32) - reference)
            return off / jnp.linalg.norm(reference)

        found = float(error(x, w, out))
        print(f"{m=} {k=} {n=} relative error {found:.2e}")
        assert found < WEIGHTS[name][2] + tolerances.BF16_OUTPUT
        assert (out == jax.jit(packed_dot)(x, w)).all()


def _alternating(
    rng: np.random.Generator, m: int, k: int, n: int, name: str
) -> tuple[jax.Array, qjax.PackedWeight]:
    x, w = _operands(rng, m, k, n, name)
    # Of a size where silu is neither its argument nor zero.
    x = x / (32 * jnp.abs(x).max(axis=1, keepdims=True).astype(x.dtype))
    return x, pack_for_mosaic(w.unpack(), compute=w.compute, alternating=True)


def _check_gated(out: jax.Array, gate: jax.Array, up: jax.Array) -> None:
    wide = np.asarray(gate, np.float64)
    wanted = wide / (1 + np.exp(-wide)) * np.asarray(up, np.float64)
    found = np.asarray(out, np.float64)
    np.testing.assert_allclose(found, wanted, tolerances.BF16_ELEMENT, 1e-38)


@pytest.mark.parametrize("name", GATED)
def test_gated(name: str, rng: np.random.Generator) -> None:
    weight, m, n, config = GATED[name]
    x, w = _alternating(rng, m, 1024, n, weight)
    run = jax.jit(lambda x, w: packed_dot(x, w, config=config, gated=True))
    out = run(x, w)
    # The same config, so that sums are added in the same order.
    both = jax.jit(lambda x, w: packed_dot(x, w, config=config))(x, w)
    _check_gated(out, *jnp.split(both, 2, axis=1))
    for _ in range(20):
        assert (out == run(x, w)).all(), "results must not differ from run to run"


@pytest.mark.parametrize("config", [Config(64, 4, 2, warpgroups=4), Config(128, 4)])
@pytest.mark.parametrize("fmt", [qjax.INT4_G128, qjax.INT4_CHANNEL])
def test_gated_int8(fmt: QuantFormat, config: Config, rng: np.random.Generator) -> None:
    """Integer sums with scales of rows; activations in any order, as both products have it."""
    n = 33 * 512
    values = jnp.asarray(rng.standard_normal((1024, n), np.float32))
    w = pack_for_mosaic(qjax.quantize(values, fmt), compute="bfloat16", alternating=True)
    x = jnp.asarray(rng.integers(-127, 128, (330, 1024)), jnp.int8)
    row_scale = jnp.asarray(rng.uniform(1e-4, 1e-3, 330), jnp.float32)

    @functools.partial(jax.jit, static_argnames="gated")
    def run(x: jax.Array, row_scale: jax.Array, gated: bool) -> jax.Array:
        operands = x, w.words, w.scales, w.column, row_scale
        return weight_only_large.matmul(*operands, kind="int4", config=config, gated=gated)

    out = run(x, row_scale, gated=True)
    pairs = run(x, row_scale, gated=False).reshape(330, n // 128, 2, 64)
    _check_gated(out, pairs[:, :, 0].reshape(330, -1), pairs[:, :, 1].reshape(330, -1))
    assert (out == run(x, row_scale, gated=True)).all()


@pytest.mark.parametrize("m", [33, 64, 100, 515])
def test_gated_dot(m: int, rng: np.random.Generator) -> None:
    """With the config that is chosen for gate and up of an 8B model."""
    x, w = _alternating(rng, m, 4096, 28672, "int4_g128")
    config = gated_config(x, w)
    print(config)
    assert isinstance(config, Config)
    out = jax.jit(lambda x, w: gated_dot(x, w))(x, w)
    both = jax.jit(lambda x, w: packed_dot(x, w, config=config))(x, w)
    _check_gated(out, *jnp.split(both, 2, axis=1))
