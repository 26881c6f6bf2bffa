"""Kernels that give 8-bit codes of activations: against NumPy, and on their way through a model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import formats
from qjax._compat import JAX_VERSION, MOSAIC_GPU_MIN_JAX
from qjax.formats import QuantFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.ops import activations
from qjax.ops import norm as norm_op
from qjax.ops.activations import QuantizedActivation, quantize_activation
from qjax.pallas_kernels import _token_codes, add_rms_norm, token_codes
from qjax.quantize import quantize
from qjax.serving.weights import prepare_weights
from tests import tolerances
from tests.tolerances import relative_error

needs_interpreter = pytest.mark.skipif(
    JAX_VERSION < MOSAIC_GPU_MIN_JAX, reason="this jax has no Pallas GPU interpreter"
)
FORMATS: dict[str, QuantFormat] = {
    "e4m3": qjax.FP8_PER_TOKEN,
    "e5m2": QuantFormat("float8_e5m2", "token"),
    "int8": qjax.INT8_PER_TOKEN,
    "e4m3_blocks": formats.FP8_TOKEN_G128,
}
CASES = [("e4m3", False), ("e5m2", False), ("int8", False), ("e4m3", True)]


def expected(x: jax.Array, kind: str, blocks: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes as float32 ``(m, k)`` and scales ``(m, groups)``, by NumPy from the definition.

    Not by ``quantize`` alone: XLA for CPUs may divide by multiplying with a reciprocal, which turns
    a ratio next to a tie the other way.
    """
    kind = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}.get(kind, kind)
    wide = np.asarray(x.astype(jnp.float32))
    wide = wide.reshape(*wide.shape[:-1], -1, 128 if blocks else wide.shape[-1])
    largest = np.where(np.isfinite(wide), np.abs(wide), np.float32(0)).max(-1, keepdims=True)
    bound = np.float32(_token_codes.bound(kind))
    scale = largest * (np.float32(1) / bound)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    ratio = np.clip(np.nan_to_num(wide / scale, nan=0.0), -bound, bound)
    codes = np.rint(ratio) if kind == "int8" else ratio.astype(jnp.dtype(kind))
    return codes.astype(np.float32).reshape(x.shape), scale[..., 0]


def check_codes(x: jax.Array, codes: jax.Array, scale: jax.Array, kind: str, blocks: bool) -> None:
    """Codes and scales of a kernel are those of ``x``, and of ``quantize`` but for near ties."""
    rows = x.shape[0]
    assert codes.shape == (_token_codes.padded_rows(rows), x.shape[1])
    assert scale.shape[-1] == _token_codes.padded_scales(rows)
    wide = np.asarray(codes.astype(jnp.float32))
    want, want_scale = expected(x, kind, blocks)
    np.testing.assert_array_equal(wide[:rows], want)
    np.testing.assert_array_equal(np.atleast_2d(scale).T[:rows], want_scale)
    # The room beyond holds repetitions.
    np.testing.assert_array_equal(wide[rows:], np.broadcast_to(want[-1], wide[rows:].shape))
    fmt = FORMATS[kind + "_blocks" * blocks]
    xq = quantize(x, fmt, axis=-1)
    np.testing.assert_array_equal(xq.scale, want_scale)
    theirs = np.asarray(xq.qvalue.astype(jnp.float32), np.float64)
    differ = theirs != want
    spread = np.repeat(want_scale, x.shape[1] // want_scale.shape[1], axis=1)
    ratio = (np.asarray(x.astype(jnp.float32), np.float64) / spread)[differ]
    distance = np.abs(theirs[differ] - ratio) - np.abs(want[differ] - ratio)
    assert (np.abs(distance) < 1e-6 * np.abs(ratio)).all()


def rows_of(rng: np.random.Generator, rows: int, columns: int) -> jax.Array:
    """Rows of very different size, one of zeros, and one with infinities and a NaN."""
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-20, 20, (rows, 1)))
    x[0] = 0
    x[-1, 5:8] = np.inf, -np.inf, np.nan
    return jnp.asarray(x, jnp.bfloat16)


def gated_values(pair: jax.Array) -> jax.Array:
    """``silu(gate) * up`` in float32, rounded once."""
    gate, up = jnp.split(pair.astype(jnp.float32), 2, axis=-1)
    return (gate / (1 + jnp.exp(-gate)) * up).astype(pair.dtype)


def kernel_kind(kind: str) -> str:
    return FORMATS[kind].storage_dtype.name


@needs_interpreter
@pytest.mark.parametrize(("kind", "blocks"), CASES)
def test_rows_in_the_interpreter(kind: str, blocks: bool, rng: np.random.Generator) -> None:
    x = rows_of(rng, 3, 1024)
    run = functools.partial(token_codes.token_codes, kind=kernel_kind(kind), interpret=True)
    check_codes(x, *run(x, blocks=blocks), kind, blocks)


@needs_interpreter
@pytest.mark.parametrize(("kind", "blocks"), [("int8", False), ("e4m3", True)])
def test_gated_in_the_interpreter(kind: str, blocks: bool, rng: np.random.Generator) -> None:
    pair = jnp.asarray(rng.standard_normal((2, 2048)) * 3, jnp.bfloat16)
    run = functools.partial(token_codes.token_codes, kind=kernel_kind(kind), interpret=True)
    codes, scale = run(pair, blocks=blocks, gated=True)
    fmt = FORMATS[kind + "_blocks" * blocks]
    found = QuantizedActivation(codes, scale, fmt, (2, 1024), pair.dtype).unpack()
    exact = np.asarray(gated_values(pair), np.float64)
    # Both are off by as much as the format: half a step, or 2**-4 of the value.
    error = relative_error(np.asarray(found.dequantize(jnp.float32), np.float64), exact)
    ours = quantize(jnp.asarray(exact, jnp.float32), fmt, axis=-1).dequantize(jnp.float32)
    assert error < 1.01 * relative_error(np.asarray(ours, np.float64), exact)


@needs_interpreter
@pytest.mark.parametrize(("kind", "blocks"), CASES)
def test_normalised_in_the_interpreter(kind: str, blocks: bool, rng: np.random.Generator) -> None:
    residual = jnp.asarray(rng.standard_normal((3, 1024)), jnp.bfloat16)
    delta = jnp.asarray(rng.standard_normal((2, 3, 1024)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, 1024), jnp.float32)
    run = functools.partial(add_rms_norm.add_rms_norm, eps=1e-5, interpret=True)
    out, normed = run(residual, delta, weight)
    again, codes, scale = run(residual, delta, weight, codes=kernel_kind(kind), blocks=blocks)
    np.testing.assert_array_equal(out, again)
    check_codes(normed, codes, scale, kind, blocks)


@needs_interpreter
@pytest.mark.parametrize("columns", [896, 7936])
def test_other_columns_in_the_interpreter(columns: int, rng: np.random.Generator) -> None:
    """Loads of less than 16 bytes; rows that two warpgroups share; weights of 16 bits."""
    residual = jnp.asarray(rng.standard_normal((1, columns)), jnp.bfloat16)
    delta = jnp.asarray(rng.standard_normal((1, 1, columns)), jnp.bfloat16)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, columns), jnp.bfloat16)
    run = functools.partial(add_rms_norm.add_rms_norm, eps=1e-5, interpret=True)
    out, normed = run(residual, delta, weight)
    want, want_normed = norm_op.add_rms_norm(residual, delta, weight, 1e-5, backend="xla")
    np.testing.assert_array_equal(out, want)
    assert relative_error(normed, want_normed) < tolerances.BF16_OUTPUT
    _, codes, scale = run(residual, delta, weight, codes="int8")
    check_codes(normed, codes, scale, "int8", False)


@pytest.mark.parametrize("rows", [1, 5, 8, 16, 24, 33, 256])
def test_room_for_whole_copies(rows: int) -> None:
    assert rows <= _token_codes.padded_rows(rows) < rows + 8
    scales = _token_codes.padded_scales(rows)
    assert scales % _token_codes.padded_rows(rows) == 0
    assert scales >= -(-rows // 32) * 32


def test_what_the_kernels_do_not_take() -> None:
    reason = token_codes.unsupported_reason
    assert reason(16, 14336, jnp.bfloat16, "int8") is None
    assert reason(16, 14336, jnp.bfloat16, "float8_e4m3fn", True) is None
    assert "float32 activations" in str(reason(1, 1024, jnp.float32, "int8"))
    assert "int4 codes" in str(reason(1, 1024, jnp.bfloat16, "int4"))
    assert "block scales" in str(reason(1, 1024, jnp.bfloat16, "int8", True))
    assert reason(5000, 1024, jnp.bfloat16, "int8") is None
    assert "300 rows" in str(add_rms_norm.unsupported_reason(300, 1024, jnp.bfloat16))
    assert "100 columns" in str(reason(1, 100, jnp.bfloat16, "int8"))
    assert "multiples of 1024" in str(reason(1, 1280, jnp.bfloat16, "float8_e4m3fn", True))
    with pytest.raises(NotImplementedError, match="token_codes: 100 columns"):
        token_codes.token_codes(jnp.zeros((1, 100), jnp.bfloat16), kind="int8")
    static = FORMATS["int8"].replace(dynamic=False, granularity="tensor")
    unsupported = activations.codes_unsupported_reason
    assert "dynamic" in str(unsupported(1, 1024, jnp.dtype("bfloat16"), static))
    small = QuantFormat("float8_e4m3fn", "group", group_size=64)
    assert "each 64 values" in str(unsupported(1, 1024, jnp.dtype("bfloat16"), small))


@pytest.mark.parametrize("name", ["w8a8_fp8", "w8a8_int8", "w8a8_fp8_block", "w4a8_int8"])
def test_product_of_codes(name: str, rng: np.random.Generator) -> None:
    """A product takes the codes that it would have made, and no others."""
    fmt = formats.FORMATS[name]
    assert fmt is not None and fmt.activation is not None
    x = jnp.asarray(rng.standard_normal((2, 3, 256)), jnp.bfloat16)
    w = qjax.pack_for_mosaic(
        quantize(jnp.asarray(rng.standard_normal((256, 128)), jnp.float32), fmt)
    )
    xq = quantize_activation(x, fmt.activation)
    assert xq.shape == x.shape and xq.ndim == 3 and xq.rows == 6
    for splits in (False, True):
        dot: Any = functools.partial(qjax.quantized_dot, w=w, keep_splits=splits)
        np.testing.assert_array_equal(dot(xq), dot(x))
    with pytest.raises(ValueError, match=r"meet a weight in .* that takes codes in"):
        other = QuantFormat("float8_e5m2", "token")
        qjax.quantized_dot(quantize_activation(x, other), w)
    with pytest.raises(ValueError, match="that takes values: give it values"):
        qjax.quantized_dot(xq, jnp.zeros((256, 128), jnp.bfloat16))


def test_way_through_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalisation and gated product hand codes over, and the logits stay what they were."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
    )
    model = Decoder(config)
    tokens = jnp.arange(2, dtype=jnp.int32).reshape(1, 2)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = qjax.quantize_tree(params, {"model/.*/kernel": qjax.W8A8_INT8})
    params, _ = prepare_weights(params, jnp.bfloat16, fuse=True, pack=True)
    plain = jax.jit(model.apply)({"params": params}, tokens)[0]
    made: list[str] = []

    def normalise(residual: Any, delta: Any, weight: Any, eps: float, fmt: QuantFormat) -> Any:
        made.append("norm")
        out, normed = norm_op.add_rms_norm(residual, delta, weight, eps)
        return out, quantize_activation(normed, fmt)

    def gate(pair: jax.Array, fmt: QuantFormat) -> QuantizedActivation:
        made.append("gated")
        return quantize_activation(gated_values(pair), fmt)

    monkeypatch.setattr("qjax.nn.layers.codes_by_kernel", lambda *_: True)
    monkeypatch.setattr("qjax.nn.layers.add_rms_norm_codes", normalise)
    monkeypatch.setattr("qjax.nn.layers.quantize_gated", gate)
    ours = jax.jit(lambda *arguments: model.apply(*arguments))({"params": params}, tokens)[0]
    # The first layer's input is normalised without an addition, the last norm has no such product.
    assert made == ["norm", "gated", "norm", "norm", "gated"]
    assert relative_error(ours, plain) < tolerances.BF16_OUTPUT * 8
    made.clear()
    by_xla = Decoder(config, dot_backend="xla")
    jax.eval_shape(by_xla.apply, {"params": params}, tokens)
    assert not made
