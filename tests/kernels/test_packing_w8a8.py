"""Packing for the kernels with 8-bit activations: exact inverse, refusals. Runs anywhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import QuantFormat
from qjax.ops.packed import pack_for_mosaic, pack_tree, pack_unsupported_reason, unpack_tree
from qjax.ops.packed_w8a8 import PackedW8A8
from qjax.pallas_kernels import weight_only_large
from qjax.pallas_kernels.w8a8 import (
    Config,
    Problem,
    config_unsupported_reason,
    heuristic_config,
    search_space,
    smem_bytes,
    unsupported_reason,
)
from tests.kernels.problems import SHAPES

FORMATS: dict[str, QuantFormat] = {
    "fp8": qjax.W8A8_FP8,
    "int8": qjax.W8A8_INT8,
    "fp8_block": qjax.W8A8_FP8_BLOCK,
    "fp8_tensor": qjax.FP8_E4M3_TENSOR.replace(activation=qjax.FP8_PER_TOKEN),
    "fp8_block_token": qjax.FP8_E4M3_BLOCK128.replace(activation=qjax.FP8_PER_TOKEN),
    "e5m2": qjax.FP8_E5M2_CHANNEL.replace(activation=qjax.FP8_PER_TOKEN),
    "w4a8": qjax.INT4_G128.replace(activation=qjax.INT8_PER_TOKEN),
    "w4a8_whole": qjax.W4A8_INT8,
    "w4a8_whole_g32": qjax.W4A8_INT8.replace(group_size=32),
    "w4a8_channel": qjax.INT4_CHANNEL.replace(activation=qjax.INT8_PER_TOKEN),
}


def _weight(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    values = rng.standard_normal(shape) * np.exp(rng.standard_normal((1, shape[-1])))
    return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_inverse_is_exact(name: str, rng: np.random.Generator) -> None:
    q = qjax.quantize(_weight(rng, (256, 384)), FORMATS[name], dtype=jnp.bfloat16)
    q = dataclasses.replace(
        q, perm=jnp.asarray(rng.permutation(256), jnp.int32), act_scale=jnp.float32(0.5)
    )
    packed = pack_tree({"kernel": q})["kernel"]
    assert packed.shape == q.shape and packed.ndim == 2
    assert isinstance(packed, PackedW8A8) != name.startswith("w4a8")
    back = unpack_tree({"kernel": packed.astype(jnp.bfloat16)})["kernel"]
    assert jax.tree.structure(back) == jax.tree.structure(q)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(q), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def test_products_on_any_device(rng: np.random.Generator) -> None:
    """Where the kernel cannot run, XLA multiplies by the unpacked weight, and says why."""
    q = qjax.quantize(_weight(rng, (256, 128)), qjax.W8A8_INT8)
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.float32)
    packed = pack_for_mosaic(q)
    expected = qjax.quantized_dot(x, q)
    assert (qjax.quantized_dot(x, packed) == expected).all()
    same = qjax.quantized_dot(x, packed, activation_format=qjax.INT8_PER_TOKEN)
    assert (same == expected).all()
    with pytest.raises(ValueError, match="activations need an unpacked weight"):
        qjax.quantized_dot(x, packed, activation_format=qjax.FP8_PER_TOKEN)
    with pytest.raises(NotImplementedError, match="float32 activations; the kernels take"):
        qjax.quantized_dot(x, packed, backend="mosaic_gpu")


def test_refusals_say_why(rng: np.random.Generator) -> None:
    def refusal(fmt: QuantFormat, shape: tuple[int, int] = (256, 128)) -> str:
        reason = pack_unsupported_reason(qjax.quantize(_weight(rng, shape), fmt))
        assert reason is not None
        return reason

    grouped = qjax.FP8_E4M3_CHANNEL.replace(activation=qjax.FP8_TOKEN_G128)
    assert "activation groups of 128" in refusal(grouped)
    assert "scales of (128, 1)" in refusal(qjax.INT8_G128.replace(activation=qjax.INT8_PER_TOKEN))
    assert "must be multiples of (128, 64)" in refusal(qjax.W8A8_FP8, (256, 96))
    assert "at least 128" in refusal(qjax.W8A8_FP8_BLOCK, (256, 64))
    assert "zero points" in refusal(qjax.INT4_G128_ASYM.replace(activation=qjax.INT8_PER_TOKEN))
    g64 = qjax.INT4_G64.replace(activation=qjax.INT8_PER_TOKEN)
    assert "in groups of 128 or" in refusal(g64)
    assert "int8 activations with float8_e4m3fn" in (
        unsupported_reason(Problem(1, 128, 64, "float8_e4m3fn", "int8")) or ""
    )


def test_scales_that_are_not_whole_are_refused(rng: np.random.Generator) -> None:
    q = qjax.quantize(_weight(rng, (256, 128)), qjax.W4A8_INT8)
    q = dataclasses.replace(q, scale=q.scale.at[0, 5].multiply(1.01))
    with pytest.raises(ValueError, match="scales of 1 of 128 columns are no multiples, 1 to 16"):
        pack_for_mosaic(q)


def test_impossible_configs_say_why() -> None:
    p = Problem(4096, 4096, 4096, "float8_e4m3fn")
    blocks = dataclasses.replace(p, blocks=True)
    integers = dataclasses.replace(p, kind="int8", x_kind="int8")
    for config, problem, reason in (
        (Config(64, 64, 2, splits=3), p, "cannot be cut into 3"),
        (Config(64, 256, 2), dataclasses.replace(p, n=128), "less than the tile's 256"),
        (Config(64, 128, 2), blocks, "need promote=True"),
        (Config(64, 192, 2, promote=True), blocks, "whole blocks"),
        (Config(64, 192, 2, swap=True, promote=True), blocks, "too many registers"),
        (Config(64, 128, 2, promote=True), integers, "int8 sums are exact"),
        (Config(64, 40, 2, swap=True), integers, "multiple of 16"),
        (Config(128, 192, 5), p, "bytes of shared memory"),
    ):
        assert reason in (config_unsupported_reason(config, problem) or "")
    for fields, reason in (
        ((96, 64, 2), "rows=96 must be 64 or 128"),
        ((64, 260, 2), "columns=260 must be a multiple of 8"),
        ((128, 256, 2), "need 256 registers"),
        ((64, 64, 1), "stages=1"),
    ):
        with pytest.raises(ValueError, match=reason):
            Config(*fields)
    with pytest.raises(ValueError, match="cluster=3 must be 1 or 2"):
        Config(64, 64, 2, cluster=3)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8"])
def test_every_problem_has_a_config_that_fits(kind: str, blocks: bool) -> None:
    if blocks and kind == "int8":
        pytest.skip("blocks are for fp8")
    for k, n in [*SHAPES.values(), (128, 64), (640, 192), (128, 128)]:
        if blocks and n < 128:
            continue
        for m in (1, 7, 8, 24, 40, 64, 65, 300, 4096, 5000):
            p = Problem(m, k, n, kind, blocks=blocks)
            config = heuristic_config(p)
            assert config_unsupported_reason(config, p) is None, (p, config)
            assert smem_bytes(config, p) <= 232448
            assert all(config_unsupported_reason(c, p) is None for c in search_space(p))


@pytest.mark.parametrize("compute", ["float16", "bfloat16", "int8"])
def test_every_weight_only_problem_has_a_config_that_fits(compute: str) -> None:
    for k, n in [*SHAPES.values(), (128, 128), (640, 384)]:
        for m in (1, 65, 72, 100, 300, 4096, 5000):
            for group_size in (None, 128):
                p = weight_only_large.Problem(m, k, n, "int4", group_size, compute=compute)
                config = weight_only_large.heuristic_config(p)
                assert weight_only_large.config_unsupported_reason(config, p) is None
