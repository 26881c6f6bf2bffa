"""The kernels that give codes of activations on the GPU, and what the model makes of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import formats
from qjax._device import mosaic_gpu_unsupported_reason
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.nn import layers
from qjax.ops import activations, norm
from qjax.ops.activations import QuantizedActivation
from qjax.pallas_kernels import _token_codes, add_rms_norm, token_codes
from qjax.quantize import quantize
from qjax.serving.weights import prepare_weights
from tests import tolerances
from tests.kernels.test_token_codes import FORMATS, kernel_kind, rows_of
from tests.tolerances import relative_error

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=1024,
    intermediate_size=2048,
    num_layers=2,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=128,
)
CASES = [("e4m3", False), ("e5m2", False), ("int8", False), ("e4m3", True)]


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    reason = mosaic_gpu_unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


def _check(x: jax.Array, codes: jax.Array, scale: jax.Array, kind: str, blocks: bool) -> None:
    """Codes are those that XLA makes of ``x`` on this device."""
    fmt = FORMATS[kind + "_blocks" * blocks]
    rows = x.shape[0]
    assert scale.shape[-1] == _token_codes.padded_scales(rows)
    ours = QuantizedActivation(codes, scale, fmt, x.shape, x.dtype).unpack()
    theirs = quantize(x, fmt, axis=-1)
    np.testing.assert_array_equal(ours.scale, theirs.scale)
    ours, theirs = (np.asarray(q.qvalue.astype(jnp.float32)) for q in (ours, theirs))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 4096), (16, 14336), (33, 8192), (256, 1024), (1000, 4096)]
)
@pytest.mark.parametrize(("kind", "blocks"), CASES)
def test_rows(kind: str, blocks: bool, rows: int, columns: int, rng: np.random.Generator) -> None:
    x = rows_of(rng, rows, columns)
    run = jax.jit(functools.partial(token_codes.token_codes, kind=kernel_kind(kind), blocks=blocks))
    codes, scale = run(x)
    _check(x, codes, scale, kind, blocks)
    again = run(x)
    for first, second in zip((codes, scale), again, strict=True):
        np.testing.assert_array_equal(first.astype(jnp.float32), second.astype(jnp.float32))
    # The room beyond the rows holds repetitions, so that nothing in it is undefined.
    beyond = np.asarray(codes.astype(jnp.float32))[rows:]
    np.testing.assert_array_equal(
        beyond, np.broadcast_to(np.asarray(codes[rows - 1].astype(jnp.float32)), beyond.shape)
    )


@pytest.mark.parametrize("columns", [1024, 14336, 28672])
@pytest.mark.parametrize(("kind", "blocks"), CASES)
def test_gated(kind: str, blocks: bool, columns: int, rng: np.random.Generator) -> None:
    pair = jnp.asarray(rng.standard_normal((5, 2 * columns)) * 3, jnp.bfloat16)
    run = functools.partial(
        token_codes.token_codes, kind=kernel_kind(kind), blocks=blocks, gated=True
    )
    codes, scale = jax.jit(run)(pair)
    fmt = FORMATS[kind + "_blocks" * blocks]
    found = QuantizedActivation(codes, scale, fmt, (5, columns), pair.dtype).unpack()
    # In float64: exponentials differ by a bit, which moves a rounding here and there.
    gate, up = np.split(np.asarray(pair, np.float64), 2, axis=-1)
    exact = gate / (1 + np.exp(-gate)) * up
    ours = quantize(jnp.asarray(exact, jnp.bfloat16), fmt, axis=-1).dequantize(jnp.float32)
    error = relative_error(np.asarray(found.dequantize(jnp.float32), np.float64), exact)
    assert error < 1.01 * relative_error(np.asarray(ours, np.float64), exact)


@pytest.mark.parametrize(
    ("rows", "columns", "splits"), [(1, 4096, 8), (16, 8192, 4), (64, 1024, 1), (5, 5120, 2)]
)
@pytest.mark.parametrize(("kind", "blocks"), CASES)
def test_normalised(
    kind: str, blocks: bool, rows: int, columns: int, splits: int, rng: np.random.Generator
) -> None:
    residual = jnp.asarray(rng.standard_normal((rows, columns)) * 3, jnp.bfloat16)
    delta = jnp.asarray(rng.standard_normal((splits, rows, columns)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, columns), jnp.bfloat16)
    run = functools.partial(add_rms_norm.add_rms_norm, eps=1e-5)
    out, normed = jax.jit(run)(residual, delta, weight)
    coded = jax.jit(functools.partial(run, codes=kernel_kind(kind), blocks=blocks))
    again, codes, scale = coded(residual, delta, weight)
    np.testing.assert_array_equal(out, again)
    # With blocks the mean square is summed in another order, which moves a rounding now and then.
    if blocks:
        fmt = FORMATS["e4m3_blocks"]
        found = QuantizedActivation(codes, scale, fmt, normed.shape, normed.dtype).unpack()
        theirs = quantize(normed, fmt, axis=-1).dequantize(jnp.float32)
        assert relative_error(found.dequantize(jnp.float32), theirs) < 1e-2
    else:
        _check(normed, codes, scale, kind, blocks)


@pytest.mark.parametrize("columns", [896, 3584, 5120, 7936, 8192])
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_other_sizes(columns: int, weight_dtype: str, rng: np.random.Generator) -> None:
    """Loads of less than 16 bytes, and weights of 16 bits."""
    residual = jnp.asarray(rng.standard_normal((7, columns)), jnp.bfloat16)
    delta = jnp.asarray(rng.standard_normal((3, 7, columns)), jnp.float32)
    weight = jnp.asarray(rng.uniform(0.5, 1.5, columns), weight_dtype)
    run = jax.jit(functools.partial(add_rms_norm.add_rms_norm, eps=1e-5))
    out, normed = run(residual, delta, weight)
    want, _ = norm.add_rms_norm(residual, delta, weight, 1e-5, backend="xla")
    np.testing.assert_array_equal(out, want)
    exact = np.asarray(out, np.float64)
    exact /= np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-5)
    error = relative_error(
        np.asarray(normed, np.float64), exact * np.asarray(weight.astype(jnp.float32))
    )
    assert error < tolerances.BF16_OUTPUT
    assert (normed == run(residual, delta, weight)[1]).all()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", ["w8a8_fp8", "w8a8_int8", "w8a8_fp8_block", "w4a8_int8"])
def test_model(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model with the kernels is as far from one with exact activations as without them.

    Not logit by logit: where two ways of summing round a value apart its code may differ, and a few
    such differences move everything after them by as much as the format does.
    """
    model = Decoder(MODEL)
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None]
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = qjax.quantize_tree(params, {"model/.*/kernel": formats.FORMATS[name]})
    exact = qjax.dequantize_tree(params, jnp.bfloat16)
    forward = jax.jit(lambda params: model.apply({"params": params}, tokens)[0])
    reference = np.asarray(forward(exact), np.float64)
    params, _ = prepare_weights(params, jnp.bfloat16, fuse=True, pack=True)
    errors = []
    for by_kernel in (True, False):
        if not by_kernel:
            for module in (activations, layers):
                monkeypatch.setattr(module, "codes_by_kernel", lambda *_: False)
        program = jax.jit(lambda params: model.apply({"params": params}, tokens)[0])
        lowered = program.lower(params)
        assert ("gated_codes" in lowered.as_text()) == by_kernel
        logits = np.asarray(lowered.compile()(params), np.float64)
        errors.append(relative_error(logits, reference))
    print(name, batch, errors)
    assert 0 < errors[0] < 1.25 * errors[1] < 0.15


@pytest.mark.parametrize("batch", [1, 64, 100])
@pytest.mark.parametrize("name", ["int4", "fp8", "int8"])
def test_model_with_float16_rows(name: str, batch: int) -> None:
    """By kernels as by XLA."""
    tokens = jnp.arange(batch, dtype=jnp.int32)[:, None]
    params = jax.jit(Decoder(MODEL).init)(jax.random.key(0), tokens)["params"]
    params = qjax.quantize_tree(params, {"model/.*/kernel": formats.FORMATS[name]})
    exact = qjax.dequantize_tree(params, jnp.float32)
    reference = Decoder(MODEL, dtype=jnp.float32).apply({"params": exact}, tokens)[0]
    params, _ = prepare_weights(params, jnp.bfloat16, fuse=True, pack=True, norm_dtype=jnp.float16)
    model = Decoder(MODEL, norm_dtype=jnp.float16)
    program = jax.jit(lambda params: model.apply({"params": params}, tokens)[0]).lower(params)
    kernels = program.as_text()
    assert "float16_mosaic_gpu" in kernels.replace("bfloat16", "")
    logits = np.asarray(program.compile()(params), np.float64)
    assert relative_error(logits, np.asarray(reference, np.float64)) < 3 * tolerances.BF16_OPERANDS
