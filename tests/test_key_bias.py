"""Keys with a large constant part: kept out of the quantized cache, and found automatically."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.evaluation import score
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.nn.rotary import RopeScaling, apply_rotary, rope_frequencies
from qjax.ops import attention as attention_module
from qjax.ops.attention import attention, paged_attention
from qjax.ops.key_bias import KeyBias
from qjax.ops.kv import append, read
from qjax.quantize import quantize_tree
from qjax.sampling import SamplingParams
from qjax.serving import Engine, EngineConfig, Request
from qjax.serving.key_bias import describe, leave_out_biases, outlier_biases
from qjax.serving.weights import prepare_weights
from tests.tolerances import F32_SCORE, F32_SUM, relative_error

QWEN2 = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    attention_bias=True,
    model_type="qwen2",
)


@functools.cache
def qwen2_params(outlier: float = 300.0) -> Any:
    """Random weights; layer 0 has a few key features with a huge bias, as the real models do.

    Queries are small there, or attention would see nothing but position: logits stay near 10.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Decoder(QWEN2).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spread = rng.normal(size=leaf.shape) * (0.2 if leaf.ndim == 2 else 0.1)
        return jnp.asarray(spread + (leaf.ndim == 1), jnp.float32)

    params = jax.tree.map(values, shapes["params"])
    attn = params["model"]["layers_0"]["self_attn"]
    bias, damped = np.array(attn["k_proj"]["bias"]).reshape(2, 16), np.ones((4, 16), np.float32)
    for head, features in ((0, (1, 9, 6)), (1, (7, 12))):
        bias[head, features] = outlier * np.array([1, -0.7, 0.4])[: len(features)]
        for pair in features:
            damped[2 * head : 2 * head + 2, [pair % 8, pair % 8 + 8]] = 0.1
    attn["k_proj"]["bias"] = jnp.asarray(bias.reshape(-1))
    attn["q_proj"] = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) * damped.reshape(-1)), attn["q_proj"]
    )
    return params


def test_only_layers_with_an_outlier_are_found_whatever_the_weight_format():
    params = qwen2_params()
    for weights in (
        params,
        quantize_tree(params, {".*layers_0.*k_proj/kernel": qjax.INT8_CHANNEL}),
    ):
        (found,) = outlier_biases(weights, QWEN2)
        assert found.layer == 0 and found.largest == pytest.approx(300) and found.ratio > 50
    assert outlier_biases(qwen2_params(2.0), QWEN2) == []
    assert outlier_biases(params, dataclasses.replace(QWEN2, qk_norm=True)) == []
    assert outlier_biases(params, dataclasses.replace(QWEN2, attention_bias=False)) == []


def test_formats_change_in_quantized_layers_only():
    plain, int8 = KVFormat("bfloat16"), KVFormat("int8", "tracked")
    formats, found = leave_out_biases((int8, int8), qwen2_params(), QWEN2)
    assert [f.name for f in formats] == ["int8-tracked-unbiased", "int8-tracked"]
    assert describe(found) == (
        "key biases kept apart from the quantized cache in layer 0: up to 300, "
        f"{found[0].ratio:.0f} times the spread of the keys"
    )
    assert leave_out_biases((plain, int8), qwen2_params(), QWEN2) == ((plain, int8), [])
    assert leave_out_biases((plain, plain), qwen2_params(), QWEN2) == ((plain, plain), [])


@functools.cache
def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 96, n).astype(np.int32) for n in (90, 71)]


def scores(formats: tuple[KVFormat, ...]):
    module = Decoder(QWEN2, dtype=jnp.float32)
    params = qwen2_params()
    return score(
        module, params, sequences(), kv_format=formats, reference=(module, params), chunk=32
    )


@pytest.mark.parametrize(("dtype", "times"), [("float8_e4m3fn", 5), ("int8", 1000)])
def test_the_model_keeps_its_predictions(dtype, times):
    """KL against a float32 cache, 0.028 and 0.35 with the bias in the cache, falls to what the
    other layer and the values cost, 0.0035 and 0.00014."""
    fmt = KVFormat(dtype, "tracked")
    kept, apart = scores((fmt, fmt)), scores(leave_out_biases((fmt, fmt), qwen2_params(), QWEN2)[0])
    assert kept.kl is not None and apart.kl is not None
    assert kept.kl > 0.02 and apart.kl < kept.kl / times


def test_joined_projections_leave_out_the_bias_too():
    formats, _ = leave_out_biases((KVFormat("int8", "tracked"),) * 2, qwen2_params(), QWEN2)
    module = Decoder(QWEN2, dtype=jnp.float32)
    joined, _ = prepare_weights(copy.deepcopy(qwen2_params()), jnp.float32, fuse=True)
    assert "qkv_proj" in joined["model"]["layers_0"]["self_attn"]
    scored = [
        score(module, p, sequences()[:1], kv_format=formats) for p in (qwen2_params(), joined)
    ]
    assert scored[0].nll == pytest.approx(scored[1].nll, rel=F32_SCORE)


def filled(fmt: KVFormat, length: int, keys: np.ndarray, values: np.ndarray) -> QuantizedKVCache:
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=2,
        head_dim=8,
        num_pages=6,
        page_size=4,
        max_seqs=2,
        pages_per_seq=3,
        fmt=fmt,
    ).with_page_table(np.array([[5, 2, 0], [1, 4, 6]], np.int32))
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    slots = jnp.arange(2, dtype=jnp.int32)
    return append(cache, 0, jnp.asarray(keys), jnp.asarray(values), at, slots, at < length)


@pytest.mark.parametrize("form", ["decode", "prefill", "chunks"])
def test_logits_are_those_of_keys_with_their_bias(form, monkeypatch):
    if form == "chunks":
        monkeypatch.setattr(attention_module, "_CHUNK_TOKENS", 4)
    scaling = RopeScaling("yarn", 4.0, 64, attention_factor=1.3)
    rng = np.random.default_rng(2)
    keys, values, q = (rng.normal(size=(2, 8, n, 8)).astype(np.float32) for n in (2, 2, 4))
    bias = rng.normal(size=(2, 8)).astype(np.float32) * 20
    at = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    cache = filled(KVFormat("int8", "dynamic", without_key_bias=True), 8, keys, values)
    stored, held = read(cache, 0, jnp.arange(2, dtype=jnp.int32), 8)
    known = apply_rotary(jnp.broadcast_to(bias, (2, 8, 2, 8)), at, 100.0, scaling)
    want = attention(jnp.asarray(q), stored + known, held, scale=0.3, window=6)
    last = slice(7, 8) if form == "decode" else slice(2, 8)
    got = paged_attention(
        jnp.asarray(q)[:, last],
        cache,
        0,
        at[:, last],
        jnp.arange(2, dtype=jnp.int32),
        jnp.full((2,), 8, jnp.int32),
        scale=0.3,
        window=6,
        key_bias=KeyBias(jnp.asarray(bias), rope_frequencies(8, 100.0, scaling), 1.3),
    )
    assert relative_error(got, want[:, last]) < 10 * F32_SUM  # logits of 20 magnify their rounding


def test_a_bias_must_be_given_where_it_is_missing_and_nowhere_else():
    x = np.ones((2, 1, 2, 8), np.float32)
    at, slots = jnp.zeros((2, 1), jnp.int32), jnp.arange(2, dtype=jnp.int32)
    bias = KeyBias(jnp.ones((2, 8)), rope_frequencies(8, 100.0, None))
    fmt = KVFormat("int8", "dynamic")
    for cache, given in (
        (filled(fmt, 1, x, x), bias),
        (filled(dataclasses.replace(fmt, without_key_bias=True), 1, x, x), None),
    ):
        with pytest.raises(ValueError, match="where, and only where, keys are stored without it"):
            paged_attention(
                jnp.ones((2, 1, 2, 8)), cache, 0, at, slots, slots + 1, scale=1.0, key_bias=given
            )
    with pytest.raises(ValueError, match="only quantized keys gain"):
        KVFormat("bfloat16", without_key_bias=True)


def test_layers_without_a_bias_refuse_the_format():
    config = dataclasses.replace(QWEN2, attention_bias=False, model_type="llama")
    fmt = KVFormat("int8", "tracked", without_key_bias=True)
    engine = Engine(
        Decoder(config, dtype=jnp.float32),
        {"model": {}},
        EngineConfig(max_running_requests=1, max_model_len=32),
        fmt,
    )
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="int8-tracked-unbiased, but its keys have no bias"):
        jax.eval_shape(
            lambda key, cache: engine.module.init(key, tokens, None, cache),
            jax.random.key(0),
            engine.cache,
        )


def test_tokens_do_not_depend_on_the_batch():
    engine = Engine(
        Decoder(dataclasses.replace(QWEN2, num_layers=1, layer_windows=()), dtype=jnp.float32),
        qwen2_params(),
        EngineConfig(max_running_requests=3, max_model_len=32, page_size=8),
        KVFormat("float8_e4m3fn", "tracked", without_key_bias=True),
        eos_ids=(),
    )
    rng = np.random.default_rng(3)
    work = [
        Request(rng.integers(0, 96, n).tolist(), SamplingParams(max_new_tokens=12))
        for n in (3, 9, 12, 16)
    ]
    together = [c.token_ids for c in engine.generate(work)]
    assert [engine.generate([r])[0].token_ids for r in work] == together
