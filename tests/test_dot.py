"""quantized_dot against float32 products of the same quantized operands."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import FORMATS, FP8_PER_TENSOR, FP8_PER_TOKEN, INT8_PER_TOKEN, QuantFormat
from tests import tolerances
from tests.tolerances import relative_error

WEIGHT_ONLY = {
    name: fmt
    for name, fmt in FORMATS.items()
    if fmt is not None and fmt.activation is None and name not in ("int4_g128",)
} | {
    "int8_channel_asym": QuantFormat("int8", symmetric=False),
    "int4_tensor_asym": QuantFormat("int4", "tensor", symmetric=False),
    "nvfp4": QuantFormat("float4_e2m1fn", "group", group_size=16, scale_dtype="float8_e4m3fn"),
    "mxfp4": QuantFormat("float4_e2m1fn", "group", group_size=32, scale_dtype="float8_e8m0fnu"),
}


def _normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: type = jnp.float32
) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def _reference(x: jax.Array, w: qjax.QuantizedArray) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_matches_float32(name: str, rng: np.random.Generator) -> None:
    """Few rows and many rows take different forms of the algebra; both are exact to float32."""
    w = qjax.quantize(_normal(rng, (256, 48), jnp.float32), WEIGHT_ONLY[name])
    for rows in (1, 40):
        x = _normal(rng, (rows, 256), jnp.float32)
        out = jax.jit(qjax.quantized_dot)(x, w)
        assert out.shape == (rows, 48) and out.dtype == jnp.float32
        assert relative_error(out, _reference(x, w)) < tolerances.F32_SUM


@pytest.mark.parametrize("name", ["fp8", "fp8_block", "int8", "int4", "int4_g32_asym"])
@pytest.mark.parametrize("rows", [1, 130])
def test_bf16_activations(name: str, rows: int, rng: np.random.Generator) -> None:
    w = qjax.quantize(_normal(rng, (384, 64), jnp.float32), WEIGHT_ONLY[name])
    x = _normal(rng, (rows, 384), jnp.bfloat16)
    out = jax.jit(qjax.quantized_dot)(x, w)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, _reference(x, w)) < tolerances.BF16_OPERANDS


@pytest.mark.parametrize("shape", [(300, 130), (172, 64), (32, 8)])
@pytest.mark.parametrize("name", ["int4", "fp8_block", "w8a8_fp8_block"])
def test_cut_last_tiles(name: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    fmt = FORMATS[name]
    assert fmt is not None
    w = qjax.quantize(_normal(rng, shape, jnp.float32), fmt)
    x = _normal(rng, (3, shape[0]), jnp.float32)
    out = qjax.quantized_dot(x, w)
    if fmt.activation is not None:
        x = qjax.quantize(x, fmt.activation, axis=-1).dequantize()
    assert relative_error(out, _reference(x, w)) < tolerances.F32_SUM


@pytest.mark.parametrize(
    ("weight", "activation"),
    [
        ("fp8", FP8_PER_TOKEN),
        ("fp8_e5m2_tensor", FP8_PER_TOKEN),
        ("int8", INT8_PER_TOKEN),
        ("int4_g32", INT8_PER_TOKEN),
        ("int4_g32_asym", INT8_PER_TOKEN),
        ("int8_channel_asym", INT8_PER_TOKEN),
        ("fp8_block", qjax.FP8_TOKEN_G128),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_quantized_activations(
    weight: str, activation: QuantFormat, rng: np.random.Generator
) -> None:
    """The product of the quantized operands, not of the originals, is what must come out."""
    w = qjax.quantize(_normal(rng, (256, 48), jnp.float32), WEIGHT_ONLY[weight])
    x = _normal(rng, (2, 5, 256), jnp.float32)
    out = jax.jit(lambda x, w: qjax.quantized_dot(x, w, activation_format=activation))(x, w)
    assert out.shape == (2, 5, 48)
    xq = qjax.quantize(x, activation, axis=-1).dequantize()
    assert relative_error(out, _reference(xq, w)) < tolerances.F32_SUM


def test_static_activations_use_the_stored_scale_and_saturate(rng: np.random.Generator) -> None:
    fmt = qjax.FP8_E4M3_TENSOR.replace(activation=FP8_PER_TENSOR)
    codes = qjax.quantize(_normal(rng, (64, 32), jnp.float32), fmt)
    with pytest.raises(ValueError, match="carries no act_scale"):
        qjax.quantized_dot(jnp.ones((1, 64)), codes)
    w = qjax.QuantizedArray.make(
        codes.qvalue, codes.scale, fmt, act_scale=jnp.float32(0.01), dtype=jnp.float32
    )
    x = _normal(rng, (4, 64), jnp.float32).at[0, 0].set(1e6)
    expected = jnp.clip(x / 0.01, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32) * 0.01
    out = qjax.quantized_dot(x, w)
    assert relative_error(out, _reference(expected, w)) < tolerances.F32_SUM


def test_activation_order_and_global_scale(rng: np.random.Generator) -> None:
    """Row i of the codes is row perm[i] of the original."""
    x = _normal(rng, (3, 128), jnp.float32)
    values = _normal(rng, (128, 16), jnp.float32)
    perm = jnp.asarray(rng.permutation(128), jnp.int32)
    inner = qjax.quantize(values[perm], qjax.INT4_G32)
    w = qjax.QuantizedArray.make(
        inner.qvalue, inner.scale, inner.fmt, perm=perm, global_scale=jnp.float32(3.0)
    )
    expected = np.zeros((128, 16))
    expected[np.asarray(perm)] = 3.0 * np.asarray(inner.dequantize(jnp.float32))
    assert relative_error(w.dequantize(jnp.float32), expected) < 1e-7
    assert relative_error(qjax.quantized_dot(x, w), np.asarray(x) @ expected) < tolerances.F32_SUM


def test_plain_weight_and_output_type(rng: np.random.Generator) -> None:
    x, w = _normal(rng, (4, 32), jnp.bfloat16), _normal(rng, (32, 8))
    out = qjax.quantized_dot(x, w, out_dtype=jnp.float32)
    assert out.dtype == jnp.float32
    assert relative_error(out, np.asarray(x, np.float64) @ np.asarray(w)) < tolerances.BF16_OPERANDS


def test_gradient_reaches_the_activations(rng: np.random.Generator) -> None:
    w = qjax.quantize(_normal(rng, (64, 16), jnp.float32), qjax.INT4_G32)
    x = _normal(rng, (2, 64), jnp.float32)
    grad = jax.grad(lambda x: qjax.quantized_dot(x, w).sum())(x)
    expected = np.broadcast_to(np.asarray(w.dequantize()).sum(1), (2, 64))
    assert relative_error(grad, expected) < tolerances.F32_SUM


def test_stacked_weights_through_vmap(rng: np.random.Generator) -> None:
    stacked = _normal(rng, (3, 64, 16), jnp.float32)
    w = qjax.quantize(stacked, qjax.INT4_G32)
    x = _normal(rng, (3, 2, 64), jnp.float32)
    out = jax.vmap(qjax.quantized_dot)(x, w)
    assert relative_error(out, np.asarray(x) @ np.asarray(w.dequantize())) < tolerances.F32_SUM


def test_errors_name_the_values() -> None:
    w = qjax.quantize(jnp.ones((8, 4)), qjax.INT8_CHANNEL)
    with pytest.raises(ValueError, match=r"x.shape=\(2, 9\) and w.shape=\(8, 4\) do not match"):
        qjax.quantized_dot(jnp.ones((2, 9)), w)
    with pytest.raises(ValueError, match="unknown backend='cuda'"):
        qjax.quantized_dot(jnp.ones((2, 8)), w, backend="cuda")
    with pytest.raises(NotImplementedError, match="pack it first"):
        qjax.quantized_dot(jnp.ones((2, 8)), w, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="cannot meet int8_channel weights"):
        qjax.quantized_dot(jnp.ones((2, 8)), w, activation_format=FP8_PER_TOKEN)
    with pytest.raises(ValueError, match="need a quantized weight"):
        qjax.quantized_dot(jnp.ones((2, 8)), jnp.ones((8, 4)), activation_format=FP8_PER_TOKEN)


def test_no_float_copy_of_the_weight_on_the_gpu_path(rng: np.random.Generator) -> None:
    """What XLA is given never holds a dequantized weight that outlives its fusion.

    On the CPU XLA cannot fuse a cast into a dot; the check is on the traced program: between the
    codes and the product stand only a cast and (many rows) the scale, all elementwise.
    """
    w = qjax.quantize(_normal(rng, (256, 64), jnp.float32), qjax.INT4_G128)
    jaxpr = jax.make_jaxpr(qjax.quantized_dot)(jnp.ones((1, 256), jnp.bfloat16), w)
    wide = [
        eqn.primitive.name
        for eqn in jaxpr.jaxpr.eqns
        for var in eqn.outvars
        if (aval := cast(Any, var.aval)).size == w.size and jnp.issubdtype(aval.dtype, jnp.floating)
    ]
    assert set(wide) <= {"convert_element_type", "reshape"}, wide
