"""Tensor parallelism over two host devices computes what one device computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import qjax
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.models.sharding import leaf_spec, param_specs, placer, shard_cache, shard_params
from tests.tolerances import F32_LOGITS

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    attention_bias=True,
    attention_out_bias=True,
)
KERNELS = r".*(proj|lm_head)/kernel"
TOKENS = jnp.asarray(np.arange(24).reshape(2, 12) % 64, jnp.int32)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    module = Decoder(CONFIG, dtype=jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.2), s.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    assert len(jax.devices()) >= 2, "conftest asks for four host devices"
    return Mesh(np.asarray(jax.devices()[:2]), ("model",))


def new_cache() -> QuantizedKVCache:
    cache = QuantizedKVCache.init(
        num_layers=1,
        num_kv_heads=2,
        head_dim=8,
        num_pages=4,
        page_size=8,
        max_seqs=2,
        pages_per_seq=2,
        fmt=KVFormat("int8", "tracked"),
    )
    return cache.with_page_table(jnp.arange(4, dtype=jnp.int32).reshape(2, 2))


def test_same_logits(params: dict[str, Any], mesh: Mesh) -> None:
    # One layer with every kind of leaf: groups with zero points, W8A8, a plain lm_head.
    rules = {
        ".*self_attn/.*/kernel": qjax.INT4_G32_ASYM.replace(group_size=16),
        ".*mlp/.*/kernel": qjax.W8A8_INT8,
    }
    params = qjax.quantize_tree(params, rules)
    module = Decoder(CONFIG, dtype=jnp.float32)
    apply = jax.jit(lambda p, cache: module.apply({"params": p}, TOKENS, None, cache))
    expected, one = apply(params, new_cache())
    sharded = shard_params(params, CONFIG, mesh)
    logits, two = apply(sharded, shard_cache(new_cache(), mesh))
    np.testing.assert_allclose(logits, expected, atol=F32_LOGITS, rtol=0)
    # The cache stays cut by heads, and holds the same codes but where a sum rounded differently.
    assert two.keys[0].sharding.spec[1] == "model"
    steps = np.abs(np.asarray(one.keys[0], np.int32) - np.asarray(two.keys[0], np.int32))
    assert steps.max() <= 1
    kernel = sharded["model"]["layers_0"]["mlp"]["down_proj"]["kernel"]
    assert kernel.qvalue.addressable_shards[0].data.shape == (32, 32)


def test_scales_are_cut_with_their_codes(params: dict[str, Any]) -> None:
    params = qjax.quantize_tree(params, {KERNELS: qjax.INT4_G32_ASYM})
    specs = param_specs(params, CONFIG, 2)["model"]["layers_0"]
    down, up = specs["mlp"]["down_proj"]["kernel"], specs["mlp"]["up_proj"]["kernel"]
    assert down.qvalue == down.scale == down.zero_point == P("model", None)
    assert up.qvalue == up.scale == up.zero_point == P(None, "model")
    assert specs["self_attn"]["q_proj"]["bias"] == P("model")
    assert specs["self_attn"]["o_proj"]["bias"] == P()
    assert specs["input_layernorm"]["weight"] == P()


def test_channel_scales_of_row_parallel_layers_stay_whole() -> None:
    w = qjax.quantize(jnp.ones((64, 32)), qjax.INT8_CHANNEL)
    spec = leaf_spec("model/layers_0/mlp/down_proj/kernel", w, CONFIG, 2)
    assert spec.qvalue == P("model", None) and spec.scale == P()


@pytest.mark.parametrize(
    ("features", "group", "works"), [(192, 128, "groups of 32"), (172, 128, "groups of 86")]
)
def test_cut_group_is_refused(features: int, group: int, works: str) -> None:
    w = qjax.quantize(jnp.ones((features, 8)), qjax.INT4_G128.replace(group_size=group))
    with pytest.raises(ValueError, match=f"layers_3/mlp/down_proj.*{works}"):
        leaf_spec("model/layers_3/mlp/down_proj/kernel", w, CONFIG, 2)


def test_heads_and_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="num_q_heads=4 .* 3 devices"):
        leaf_spec("model/norm/weight", jnp.ones(32), CONFIG, 3)
    odd = dataclasses.replace(CONFIG, num_kv_heads=1)
    assert leaf_spec("model/layers_0/self_attn/k_proj/kernel", jnp.ones((32, 8)), odd, 2) == P()
    with pytest.raises(ValueError, match=r"up_proj/kernel of shape \(32, 63\)"):
        leaf_spec("model/layers_0/mlp/up_proj/kernel", jnp.ones((32, 63)), CONFIG, 2)


def test_placer_puts_each_parameter_on_its_devices(mesh: Mesh) -> None:
    place = placer(CONFIG, mesh)
    w = place("model/layers_0/mlp/up_proj/kernel", qjax.quantize(jnp.ones((32, 64)), qjax.INT4_G32))
    assert w.qvalue.sharding.spec == P(None, "model") and len(w.scale.sharding.device_set) == 2
