"""Joined projections and packed weights: the model computes what it computed before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.formats import QuantFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.fusion import fuse_kernels, fuse_unsupported_reason
from qjax.quantize import quantize_tree
from qjax.serving.weights import prepare_weights
from qjax.training.loop import init_params
from qjax.typing import Params
from tests import tolerances

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    attention_bias=True,
)
KERNELS = r".*/layers_\d+/.*/kernel"


def _params(config: ModelConfig, fmt: QuantFormat | None) -> Params:
    params = init_params(Decoder(config), 0)

    def bias(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key != "bias":
            return leaf
        return jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(bias, params)
    return params if fmt is None else quantize_tree(params, {KERNELS: fmt})


TOKENS = np.asarray([[1, 5, 9, 33, 2, 7]], np.int32)


def _logits(module: Decoder, params: Params) -> np.ndarray:
    return np.asarray(module.apply({"params": params}, jnp.asarray(TOKENS))[0])


@pytest.mark.parametrize(
    "fmt", [None, qjax.INT8_CHANNEL, qjax.INT4_G32_ASYM, qjax.W8A8_INT8], ids=str
)
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_joined_projections_give_the_same_logits(fmt: QuantFormat | None, mlp_bias: bool) -> None:
    config = dataclasses.replace(CONFIG, mlp_bias=mlp_bias)
    module = Decoder(config, dtype=jnp.float32)
    expected = _logits(module, _params(config, fmt))
    params, note = prepare_weights(_params(config, fmt), jnp.float32, fuse=True)
    layer = params["model"]["layers_0"]
    assert layer["self_attn"]["qkv_proj"]["kernel"].shape == (128, 256)
    assert layer["mlp"]["gate_up_proj"]["kernel"].shape == (128, 256)
    assert set(layer["self_attn"]["k_proj"]) == {"bias"} and "joined" in note
    np.testing.assert_allclose(_logits(module, params), expected, atol=tolerances.F32_LOGITS)


def test_packed_weights_give_the_same_logits() -> None:
    """Where the kernels do not run, XLA unpacks them in the program."""
    module = Decoder(CONFIG, dtype=jnp.bfloat16)
    fmt = qjax.INT4_G32
    expected = _logits(module, _params(CONFIG, fmt))
    params, _ = prepare_weights(_params(CONFIG, fmt), jnp.bfloat16, fuse=False, pack=True)
    packed = params["model"]["layers_1"]["mlp"]["down_proj"]["kernel"]
    assert isinstance(packed, qjax.PackedWeight) and packed.compute == "bfloat16"
    np.testing.assert_array_equal(_logits(module, params), expected)


def test_gate_and_up_by_turns_give_the_same_logits() -> None:
    module = Decoder(CONFIG, dtype=jnp.bfloat16)
    fmt = qjax.INT4_G32
    expected = _logits(module, prepare_weights(_params(CONFIG, fmt), jnp.bfloat16, fuse=True)[0])
    params, _ = prepare_weights(_params(CONFIG, fmt), jnp.bfloat16, fuse=True, pack=True)
    packed = params["model"]["layers_1"]["mlp"]["gate_up_proj"]["kernel"]
    assert packed.alternating and packed.shape == (128, 256)
    np.testing.assert_array_equal(_logits(module, params), expected)


def test_nothing_happens_to_weights_on_a_cpu() -> None:
    if jax.devices()[0].platform != "cpu":
        pytest.skip("what a machine without an accelerator does")
    params = _params(CONFIG, qjax.INT8_CHANNEL)
    kernel = params["model"]["layers_0"]["self_attn"]["q_proj"]["kernel"]
    prepared, note = prepare_weights(params, jnp.bfloat16)
    assert prepared["model"]["layers_0"]["self_attn"]["q_proj"]["kernel"] is kernel
    assert "0 of 14 quantized matrices use Mosaic GPU kernels; XLA multiplies (the default" in note


def test_different_formats_stay_apart() -> None:
    params = init_params(Decoder(CONFIG), 0)
    rules = {r".*/layers_0/.*/v_proj/kernel": None, KERNELS: qjax.INT8_CHANNEL}
    params, note = prepare_weights(quantize_tree(params, rules), jnp.bfloat16, fuse=True)
    assert "qkv_proj" not in params["model"]["layers_0"]["self_attn"]
    assert "gate_up_proj" in params["model"]["layers_0"]["mlp"]
    assert "qkv_proj" in params["model"]["layers_1"]["self_attn"]
    assert "not in 1 layers: self_attn: some are quantized and some are not" in note


def test_what_cannot_be_joined_says_why() -> None:
    w = jax.random.normal(jax.random.key(0), (128, 64))
    tensor = qjax.quantize(w, qjax.INT8_TENSOR)
    with pytest.raises(ValueError, match=r"\(128, 64\).* one scale for the whole matrix"):
        fuse_kernels([tensor, tensor])
    block = qjax.quantize(jnp.tile(w, (1, 3)), qjax.FP8_E4M3_BLOCK128)
    assert "would lie across" in str(fuse_unsupported_reason([block, block]))
    int8, int4 = qjax.quantize(w, qjax.INT8_CHANNEL), qjax.quantize(w, qjax.INT4_G32)
    assert "formats differ" in str(fuse_unsupported_reason([int8, int4]))
    ordered = dataclasses.replace(int4, perm=jnp.arange(128, dtype=jnp.int32))
    assert "some have a perm" in str(fuse_unsupported_reason([int4, ordered]))
    assert "a perm of its own" in str(fuse_unsupported_reason([ordered, ordered]))
    assert "types differ" in str(fuse_unsupported_reason([w, w.astype(jnp.bfloat16)]))


@pytest.mark.parametrize("fmt", [qjax.INT4_G32, qjax.FP8_E4M3_CHANNEL], ids=str)
def test_normalised_rows_in_float16(fmt: QuantFormat) -> None:
    """As close to the float32 model as with rows in bfloat16: other roundings decide."""
    exact = _logits(Decoder(CONFIG, dtype=jnp.float32), _params(CONFIG, fmt))
    errors = []
    for norm_dtype in (None, jnp.float16):
        params, note = prepare_weights(
            _params(CONFIG, fmt), jnp.bfloat16, fuse=True, pack=True, norm_dtype=norm_dtype
        )
        module = Decoder(CONFIG, dtype=jnp.bfloat16, norm_dtype=norm_dtype)
        logits = _logits(module, params)
        program = jax.jit(lambda params, m=module: m.apply({"params": params}, TOKENS)[0])
        assert ("6x128xf16" in program.lower(params).as_text()) == (norm_dtype is not None)
        errors.append(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
        assert ("4 take normalised rows in float16" in note) == (norm_dtype is not None)
    layer = params["model"]["layers_0"]
    assert layer["self_attn"]["qkv_proj"]["kernel"].compute == "float16"
    assert layer["mlp"]["gate_up_proj"]["kernel"].compute == "float16"
    assert layer["mlp"]["down_proj"]["kernel"].compute == "bfloat16"
    assert errors[1] < 1.1 * errors[0] < 2.2 * tolerances.BF16_OPERANDS


def test_rows_that_float16_may_not_hold_stay_in_bfloat16() -> None:
    params = _params(CONFIG, qjax.INT4_G32)
    # 128 values of a row have a norm of 128**0.5: the largest may be 11.3 * 3000 > 65504 / 2.
    norm = params["model"]["layers_1"]["post_attention_layernorm"]
    norm["weight"] = norm["weight"].at[7].set(-3000)
    params, note = prepare_weights(
        params, jnp.bfloat16, fuse=True, pack=True, norm_dtype=jnp.float16
    )
    assert "3 take normalised rows in float16" in note
    assert params["model"]["layers_1"]["mlp"]["gate_up_proj"]["kernel"].compute == "bfloat16"
    module = Decoder(CONFIG, dtype=jnp.bfloat16, norm_dtype=jnp.float16)
    assert np.isfinite(_logits(module, params)).all()
    with pytest.raises(ValueError, match="norm_dtype=float16 of a model in float32: it is float16"):
        prepare_weights(params, jnp.float32, norm_dtype=jnp.float16)
    with pytest.raises(ValueError, match="no projection is joined, of a weight-only format"):
        prepare_weights(
            _params(CONFIG, qjax.W8A8_INT8),
            jnp.bfloat16,
            fuse=True,
            pack=True,
            norm_dtype=jnp.float16,
        )
