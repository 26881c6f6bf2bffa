"""Learned roundings and scales: one kernel, and one block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.calibrate.learn import learn_block
from qjax.calibrate.linears import Batch, get_at, set_at
from qjax.calibrate.settings import Settings
from qjax.calibration import finish_rounding, init_rounding, rounded
from qjax.calibration.learned_rounding import Rounding
from qjax.formats import FP8_E4M3_CHANNEL, QuantFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import DecoderLayer
from qjax.quantize import quantize

G16 = QuantFormat("int4", "group", group_size=16)
ASYM = G16.replace(symmetric=False, scale_dtype="bfloat16")
CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=2,
    head_dim=16,
    dtype="float32",
)


@pytest.mark.parametrize("fmt", [G16, ASYM], ids=["symmetric", "asymmetric"])
def test_starts_at_the_start_and_ends_where_it_says(
    fmt: QuantFormat, rng: np.random.Generator
) -> None:
    w = jnp.asarray(rng.standard_t(4, size=(40, 12)).astype(np.float32))
    start = quantize(w, fmt)
    for weight in (w, None):
        grid, learned = init_rounding(weight, start)
        np.testing.assert_array_equal(finish_rounding(grid, learned).qvalue, start.qvalue)
        np.testing.assert_allclose(rounded(grid, learned), start.dequantize(), rtol=1e-6)

    grid, learned = init_rounding(w, start)
    moved = Rounding(
        jnp.asarray(rng.uniform(-1, 1, w.shape).astype(np.float32)),
        jnp.asarray(rng.uniform(0.9, 1.1, start.scale.shape).astype(np.float32)),
    )
    result = finish_rounding(grid, moved)
    assert jax.tree.structure(result) == jax.tree.structure(start)
    assert result.scale.dtype == start.scale.dtype
    np.testing.assert_allclose(rounded(grid, moved), result.dequantize(), rtol=1e-6)
    changed = np.asarray(result.qvalue, np.int8) != np.asarray(start.qvalue, np.int8)
    assert 0.2 < changed.mean() < 0.8


def test_gradients_pass_rounding_and_stop_at_saturation() -> None:
    w = jnp.asarray(np.linspace(-1, 1, 16, dtype=np.float32)[:, None])
    start = quantize(w, G16, scale=jnp.full((1, 1), 0.1, jnp.float32))  # codes up to 7
    grid, learned = init_rounding(w, start)
    grads = jax.grad(lambda x: rounded(grid, x).sum())(learned)
    inside = np.abs(np.rint(np.asarray(w) / np.float32(0.1))) <= 7
    np.testing.assert_allclose(grads.offset, np.where(inside, 0.1, 0.0), rtol=1e-6)
    np.testing.assert_allclose(grads.stretch, start.dequantize().sum(), rtol=1e-4, atol=1e-5)


def test_refusals(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.normal(size=(32, 8)).astype(np.float32))
    with pytest.raises(ValueError, match="not equally spaced; use gptq"):
        init_rounding(w, quantize(w, FP8_E4M3_CHANNEL))
    init_rounding(None, quantize(w, FP8_E4M3_CHANNEL))  # scales can be learned
    with pytest.raises(ValueError, match="must be the same matrix"):
        init_rounding(w[:16], quantize(w, G16))
    with pytest.raises(ValueError, match="autoround learns roundings to integers"):
        Settings(FP8_E4M3_CHANNEL, "autoround")
    with pytest.raises(ValueError, match="steps=0 must be positive"):
        Settings(G16, "gptq+scales", steps=0)


def test_learning_lowers_the_error_of_the_block(rng: np.random.Generator) -> None:
    module = DecoderLayer(CONFIG, 0, jnp.float32)
    x = jnp.asarray(rng.normal(size=(6, 8, 32)).astype(np.float32))
    positions = jnp.zeros((6, 8), jnp.int32)
    params = module.init(jax.random.key(0), x, positions)["params"]
    params = jax.tree.map(lambda a: 8 * a if a.ndim == 2 else a, params)  # layers that matter
    valid = jnp.arange(8)[None, :] < jnp.asarray([8, 8, 5, 8, 8, 1])[:, None]
    paths = ["self_attn/v_proj/kernel", "mlp/up_proj/kernel", "mlp/down_proj/kernel"]
    start = params
    for path in paths:
        start = set_at(start, path, quantize(get_at(params, path), G16))
    batches = [Batch(x[:4], valid[:4]), Batch(x[4:], valid[4:])]

    both = learn_block(module, params, start, batches, paths, steps=30, offsets=True)
    assert both.after < 0.9 * both.before
    again = learn_block(module, params, both.params, batches, paths, steps=10, offsets=False)
    assert again.before == pytest.approx(both.after, rel=1e-5) and again.after <= again.before
    for path in paths:
        kernels = [get_at(found.params, path) for found in (both, again)]
        np.testing.assert_array_equal(kernels[0].qvalue, kernels[1].qvalue)
        assert jax.tree.structure(kernels[0]) == jax.tree.structure(get_at(start, path))
