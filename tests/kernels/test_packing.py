"""Packing for the Mosaic GPU kernels: layout, scales, exact inverse, refusals. Runs anywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import QuantFormat
from qjax.nn.layers import QuantDense
from qjax.ops.packed import (
    PackedWeight,
    pack_for_mosaic,
    pack_tree,
    pack_unsupported_reason,
    packed_dot,
    unpack_tree,
)
from qjax.pallas_kernels import _codes, _layout
from tests.tolerances import relative_error

FORMATS = {
    "int4_g128": qjax.INT4_G128,
    "int4_g64": qjax.INT4_G64,
    "int4_g32_asym": qjax.INT4_G32_ASYM,
    "int4_channel": qjax.INT4_CHANNEL,
    "int4_channel_asym": qjax.INT4_CHANNEL_ASYM,
    "int3_g128": qjax.INT3_G128,
    "int8_channel": qjax.INT8_CHANNEL,
    "int8_tensor": qjax.INT8_TENSOR,
    "int8_g128": qjax.INT8_G128,
    "e4m3_channel": qjax.FP8_E4M3_CHANNEL,
    "e4m3_block128": qjax.FP8_E4M3_BLOCK128,
    "e5m2_tensor": qjax.FP8_E5M2_TENSOR,
}


def _weight(rng: np.random.Generator, fmt: QuantFormat, shape: tuple[int, int]) -> jax.Array:
    # Columns of very different size, as real weights have.
    values = rng.standard_normal(shape) * np.exp(rng.standard_normal((1, shape[1])))
    return jnp.asarray(values, jnp.float32)


def _assert_equal(a: qjax.QuantizedArray, b: qjax.QuantizedArray) -> None:
    assert (a.fmt, a.dtype) == (b.fmt, b.dtype)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


@pytest.mark.parametrize("bits", [4, 8])
def test_layout_is_the_fragment_order_of_wgmma(bits: int) -> None:
    """Every code lies where the loops below, written from the PTX manual, expect it."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (256, 128), np.uint8)
    words = np.asarray(_layout.pack_words(jnp.asarray(codes), bits)).view(np.uint32)
    assert words.shape == (2, 2, bits, 256)
    for _ in range(300):
        k_tile, n_tile, warp, lane = (int(rng.integers(0, end)) for end in (2, 2, 4, 32))
        step, half, e = (int(rng.integers(0, end)) for end in (128 // 16, 2, 2))
        column = int(rng.integers(0, 2))  # which of the two column tiles of a 16-wide step
        row = 16 * warp + 8 * half + lane // 4
        col = 16 * step + 8 * column + 2 * (lane % 4) + e
        word = step if bits == 4 else 2 * step + column
        shift = 16 * e + 8 * column + 4 * half if bits == 4 else 16 * half + 8 * e
        place = ((word // 4) * 128 + 32 * warp + lane) * 4 + word % 4
        found = (words[k_tile, n_tile].reshape(-1)[place] >> shift) & (2**bits - 1)
        assert found == codes[128 * k_tile + col, 64 * n_tile + row]


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_words_inverts_packing(bits: int, rng: np.random.Generator) -> None:
    codes = jnp.asarray(rng.integers(0, 2**bits, (384, 192)), jnp.uint8)
    assert (_layout.unpack_words(_layout.pack_words(codes, bits), bits) == codes).all()


@pytest.mark.parametrize("compute", _codes.COMPUTE_DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_inverse_is_exact(name: str, compute: str, rng: np.random.Generator) -> None:
    """With scales of 16 bits, as checkpoints hold them; plain channels with any scale."""
    fmt = FORMATS[name]
    if fmt.granularity in ("group", "block") or not fmt.symmetric:
        fmt = fmt.replace(scale_dtype="float16")
    q = qjax.quantize(_weight(rng, fmt, (256, 192)), fmt, dtype=jnp.bfloat16)
    packed = pack_for_mosaic(q, compute=compute)
    assert packed.shape == q.shape and packed.ndim == 2
    _assert_equal(packed.unpack(), q)


@pytest.mark.parametrize("name", ["int4_g32_asym", "int8_channel", "e4m3_block128"])
def test_halves_by_turns(name: str, rng: np.random.Generator) -> None:
    q = qjax.quantize(_weight(rng, FORMATS[name], (128, 384)), FORMATS[name])
    plain, packed = (pack_for_mosaic(q, alternating=yes) for yes in (False, True))
    _assert_equal(packed.unpack(), plain.unpack())
    for tile, wanted in enumerate([0, 3, 1, 4, 2, 5]):
        np.testing.assert_array_equal(packed.words[:, tile], plain.words[:, wanted])
        here, there = (slice(64 * i, 64 * i + 64) for i in (tile, wanted))
        np.testing.assert_array_equal(packed.column[here], plain.column[there])
        if packed.scales is not None and plain.scales is not None:
            np.testing.assert_array_equal(packed.scales[..., here], plain.scales[..., there])


def test_a_plain_array_is_refused() -> None:
    plain: Any = np.ones((128, 128), np.float32)
    with pytest.raises(
        ValueError, match="packs a QuantizedArray, not a ndarray; quantize it first"
    ):
        pack_for_mosaic(plain)


def test_what_cannot_alternate_says_why(rng: np.random.Generator) -> None:
    narrow = qjax.quantize(_weight(rng, qjax.INT8_CHANNEL, (128, 192)), qjax.INT8_CHANNEL)
    with pytest.raises(ValueError, match=r"\(128, 192\) .* cannot alternate: .* multiple of 128"):
        pack_for_mosaic(narrow, alternating=True)
    wide = qjax.quantize(_weight(rng, qjax.INT8_CHANNEL, (128, 256)), qjax.INT8_CHANNEL)
    tree = {"mlp": {"gate_up_proj": {"kernel": narrow}, "down_proj": {"kernel": wide}}}
    packed = pack_tree(tree, gated=["gate_up_proj", "down_proj"])["mlp"]
    assert not packed["gate_up_proj"]["kernel"].alternating
    assert packed["down_proj"]["kernel"].alternating


def test_float32_scales_are_rounded_once(rng: np.random.Generator) -> None:
    q = qjax.quantize(_weight(rng, qjax.INT4_G32_ASYM, (256, 64)), qjax.INT4_G32_ASYM)
    once = pack_for_mosaic(q, compute="float16").unpack()
    assert (once.qvalue == q.qvalue).all() and (once.zero_point == q.zero_point).all()
    ratio = np.abs(np.asarray(once.scale) / np.asarray(q.scale) - 1)
    assert 0 < ratio.max() <= 2.0**-11  # half a unit of an 11-bit significand
    _assert_equal(pack_for_mosaic(once, compute="float16").unpack(), once)


def test_float32_scales_of_sums_are_kept(rng: np.random.Generator) -> None:
    q = qjax.quantize(_weight(rng, qjax.INT4_G32_ASYM, (256, 64)), qjax.INT4_G32_ASYM)
    _assert_equal(pack_for_mosaic(q, compute="bfloat16").unpack(), q)


def test_permutation_and_activation_scale_are_kept(rng: np.random.Generator) -> None:
    inner = qjax.quantize(_weight(rng, qjax.INT8_CHANNEL, (128, 64)), qjax.INT8_CHANNEL)
    q = qjax.QuantizedArray.make(
        inner.qvalue,
        inner.scale,
        inner.fmt,
        perm=jnp.asarray(rng.permutation(128), jnp.int32),
        act_scale=jnp.float32(0.5),
    )
    packed = pack_for_mosaic(q)
    _assert_equal(packed.unpack(), q)
    _assert_equal(packed.astype(jnp.float32).unpack(), q.astype(jnp.float32))


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", list(_codes.CODES))
def test_scales_of_any_size_split_exactly(
    kind: str, compute: str, rng: np.random.Generator
) -> None:
    """Powers of two, so nothing is lost for scales of as many bits as the type has."""
    scale = np.exp2(rng.uniform(-4, 4, (4, 64))) * np.exp2(rng.integers(-60, 60, (1, 64)))
    scale = np.asarray(scale, np.dtype(jnp.bfloat16)).astype(np.float32)
    stored, column = jax.jit(_codes.split_scale, static_argnums=(1, 2))(scale, kind, compute)
    assert np.isfinite(np.asarray(stored, np.float64)).all()
    merged = _codes.merge_scale(stored, column, kind, compute)
    np.testing.assert_array_equal(np.asarray(merged), scale)


def test_bytes_are_those_of_the_codes_and_scales(rng: np.random.Generator) -> None:
    q = qjax.quantize(_weight(rng, qjax.INT4_G128, (512, 128)), qjax.INT4_G128)
    packed = pack_for_mosaic(q, compute="float16")
    assert packed.nbytes == 512 * 128 // 2 + 4 * 128 * 2 + 128 * 4
    assert qjax.quantized_nbytes(packed) == packed.nbytes


def test_products_with_packed_weights_on_any_device(rng: np.random.Generator) -> None:
    """Where the kernels cannot run, XLA multiplies by the unpacked weight, and says why."""
    fmt = qjax.INT4_G64.replace(scale_dtype="float16")
    q = qjax.quantize(_weight(rng, fmt, (128, 64)), fmt)
    x = jnp.asarray(rng.standard_normal((2, 70, 128)), jnp.bfloat16)
    packed = pack_for_mosaic(q)
    out = jax.jit(qjax.quantized_dot)(x, packed)
    assert out.dtype == jnp.bfloat16 and out.shape == (2, 70, 64)
    assert (out == jax.jit(qjax.quantized_dot)(x, q)).all()
    with pytest.raises(NotImplementedError, match="n=64 with many rows; must be a multiple of 128"):
        qjax.quantized_dot(x, packed, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="float32 activations; the kernels take"):
        qjax.quantized_dot(x[0, :4].astype(jnp.float32), packed, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="activations need an unpacked weight"):
        qjax.quantized_dot(x, packed, activation_format=qjax.INT8_PER_TOKEN)


@pytest.mark.skipif(
    jax.devices()[0].platform == "gpu", reason="what a machine without a GPU answers"
)
def test_reason_without_a_gpu(rng: np.random.Generator) -> None:
    packed = pack_for_mosaic(
        qjax.quantize(_weight(rng, qjax.INT8_CHANNEL, (128, 64)), qjax.INT8_CHANNEL)
    )
    x = jnp.ones((1, 128), jnp.bfloat16)
    for call in (
        lambda: packed_dot(x, packed),
        lambda: qjax.quantized_dot(x, packed, backend="mosaic_gpu"),
    ):
        with pytest.raises(NotImplementedError, match="the kernels need an NVIDIA Hopper GPU"):
            call()


def test_refusals_say_why(rng: np.random.Generator) -> None:
    def refusal(fmt: QuantFormat, shape: tuple[int, ...] = (256, 64)) -> str:
        w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        reason = pack_unsupported_reason(qjax.quantize(w, fmt))
        assert reason is not None
        return reason

    assert "must be multiples of (128, 64)" in refusal(qjax.INT8_CHANNEL, (192, 64))
    assert "only matrices" in refusal(qjax.INT8_CHANNEL, (2, 128, 64))
    assert "group_size=16" in refusal(QuantFormat("int4", "group", group_size=16))
    assert "8-bit codes have groups of 128" in refusal(QuantFormat("int8", "group", group_size=64))
    assert "zero points of int8" in refusal(QuantFormat("int8", symmetric=False))
    assert "float4_e2m1fn codes" in refusal(QuantFormat("float4_e2m1fn", "group", group_size=32))
    q = qjax.quantize(jnp.ones((128, 64)), qjax.INT4_G32_ASYM)
    with pytest.raises(ValueError, match="unknown compute='float32'"):
        pack_for_mosaic(q, compute="float32")
    with pytest.raises(NotImplementedError, match="no kernel for group_size=16"):
        pack_for_mosaic(qjax.quantize(jnp.ones((128, 64)), QuantFormat("int4", "group", 16)))


def test_trees_pack_what_has_a_kernel_and_leave_the_rest(rng: np.random.Generator) -> None:
    plain = jnp.ones((4,))
    odd = qjax.quantize(jnp.ones((128, 48)), qjax.INT8_CHANNEL)
    even = qjax.quantize(_weight(rng, qjax.INT8_CHANNEL, (128, 64)), qjax.INT8_CHANNEL)
    packed = pack_tree({"norm": plain, "odd": odd, "even": even})
    assert packed["norm"] is plain and packed["odd"] is odd
    assert isinstance(packed["even"], PackedWeight)
    _assert_equal(unpack_tree(packed)["even"], even)
    assert relative_error(packed["even"].dequantize(), even.dequantize()) == 0.0


def test_linear_layers_take_packed_kernels(rng: np.random.Generator) -> None:
    """Many rows are multiplied by XLA, with the unpacked weight: the same result bit by bit."""
    fmt = qjax.INT4_G32.replace(scale_dtype="float16")
    kernel = qjax.quantize(_weight(rng, fmt, (128, 64)), fmt)
    x = jnp.asarray(rng.standard_normal((2, 80, 128)), jnp.bfloat16)
    layer = QuantDense(64)
    plain = layer.apply({"params": {"kernel": kernel}}, x)
    packed = layer.apply({"params": pack_tree({"kernel": kernel})}, x)
    assert isinstance(plain, jax.Array) and isinstance(packed, jax.Array)
    assert (plain == packed).all()
    with pytest.raises(ValueError, match=r"packed kernel of shape \(128, 64\); the layer needs"):
        QuantDense(128).apply({"params": pack_tree({"kernel": kernel})}, x)
