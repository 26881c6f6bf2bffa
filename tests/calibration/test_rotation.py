"""Rotated models compute the same, and outlier channels no longer cost much."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import calibration as c
from qjax.formats import W8A8_INT8, QuantFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.quantize import path_string, quantize_tree
from tests.tolerances import F32_LOGITS, F32_SUM, relative_error

LLAMA = ModelConfig(  # every bias there is, and a size that is no power of two
    vocab_size=40,
    hidden_size=48,
    intermediate_size=32,
    num_layers=1,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=12,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    dtype="float32",
)
QWEN3 = dataclasses.replace(
    LLAMA,
    hidden_size=32,
    head_dim=8,
    attention_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_word_embeddings=True,
    model_type="qwen3",
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 12)), jnp.int32)


def _params(config: ModelConfig) -> dict[str, Any]:
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(1)

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        middle = 1.0 if path_string(path).endswith("weight") else 0.0
        return jnp.asarray(middle + 0.3 * rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any) -> jax.Array:
    return Decoder(config, jnp.float32).apply({"params": params}, TOKENS)[0]  # type: ignore


def _rotated(config: ModelConfig, params: Any) -> tuple[ModelConfig, dict[str, Any]]:
    residual, heads = c.random_hadamard(config.hidden_size), c.random_hadamard(config.head_dim, 1)
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    return untied, c.rotate_decoder(params, residual, heads)


@pytest.mark.parametrize("size", [1, 12, 256])
def test_rotations_are_orthogonal_and_spread_every_channel(size: int) -> None:
    rotation = c.random_hadamard(size, seed=3)
    eye = np.eye(size, dtype=np.float32)
    matrix = np.asarray(c.rotate(jnp.asarray(eye), rotation))
    assert relative_error(matrix @ matrix.T, eye) < F32_SUM
    # Along the first axis it is the transpose that multiplies.
    np.testing.assert_allclose(c.rotate(jnp.asarray(eye), rotation, axis=0), matrix.T, atol=1e-6)
    power = size & -size
    assert np.abs(matrix).max() <= power**-0.5 * (1 + 1e-6)


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3-tied"])
def test_the_rotated_model_computes_the_same(config: ModelConfig) -> None:
    params = _params(config)
    untied, rotated = _rotated(config, params)
    before, after = _logits(config, params), _logits(untied, rotated)
    assert np.abs(np.asarray(after - before)).max() < F32_LOGITS
    # And it is another model: nothing passes because nothing was done.
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    old, new = (p["model"]["layers_0"]["self_attn"] for p in (params, rotated))
    assert all(relative_error(new[n]["kernel"], old[n]["kernel"]) > 0.5 for n in names)
    assert (np.asarray(rotated["model"]["layers_0"]["input_layernorm"]["weight"]) == 1).all()


@pytest.mark.parametrize(
    ("where", "fmt", "share"),
    [
        ("norm", QuantFormat("int4", "group", group_size=16), 0.6),
        ("norm", W8A8_INT8, 0.2),
        ("stream", W8A8_INT8, 0.8),
    ],
    ids=["int4", "w8a8_int8", "w8a8_int8-stream"],
)
def test_outlier_channels_cost_less(where: str, fmt: QuantFormat, share: float) -> None:
    """Channels 50 times larger behind the norms, or 30 times already in the residual stream."""
    params = _params(LLAMA)
    outliers = np.ones(LLAMA.hidden_size, np.float32)
    outliers[[5, 20]] = 50 if where == "norm" else 30
    block = params["model"]["layers_0"]
    if where == "norm":  # with smaller weights behind them: the unquantized model is the same
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[norm]["weight"] = block[norm]["weight"] * outliers
        for part, names in {"self_attn": "qkv", "mlp": ("gate", "up")}.items():
            for name in names:
                dense = block[part][f"{name}_proj"]
                dense["kernel"] = dense["kernel"] / outliers[:, None]
    else:
        embed = params["model"]["embed_tokens"]
        embed["embedding"] = embed["embedding"] * outliers[None, :]
    reference = _logits(LLAMA, params)

    def error(tree: Any) -> float:
        quantized = quantize_tree(tree, {r"model/layers_\d+/.*/kernel": fmt})
        return relative_error(_logits(LLAMA, quantized), reference)

    assert error(_rotated(LLAMA, params)[1]) < share * error(params)


def test_refusals() -> None:
    params = _params(QWEN3)
    with pytest.raises(ValueError, match=r"32 channels and the rotation 48; use random_hadamard"):
        c.rotate_decoder(params, c.random_hadamard(48))
    with pytest.raises(ValueError, match=r"shape \(32, 16\) is no multiple of the rotation's size"):
        c.rotate_decoder(params, c.random_hadamard(32), c.random_hadamard(12))
    quantized = quantize_tree(params, {r"model/layers_0/.*/kernel": W8A8_INT8})
    with pytest.raises(ValueError, match="rotate first, then quantize"):
        c.rotate_decoder(quantized, c.random_hadamard(32))
    with pytest.raises(ValueError, match="size=0 must be positive"):
        c.random_hadamard(0)
