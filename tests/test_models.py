"""The decoder: real models against stored logits, with and without cache, and as a Flax module."""

from __future__ import annotations

import dataclasses
import pathlib
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.checkpoints.hf import LoadedModel, load_model
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder, DecoderLayer
from qjax.nn.rotary import RopeScaling, apply_rotary
from tests.tolerances import F32_LOGITS

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def new_cache(config: ModelConfig, pages: int, seqs: int = 1) -> QuantizedKVCache:
    cache = QuantizedKVCache.init(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=pages * seqs,
        page_size=16,
        max_seqs=seqs,
        pages_per_seq=pages,
        fmt=KVFormat("float32", "none"),
    )
    return cache.with_page_table(jnp.arange(pages * seqs, dtype=jnp.int32).reshape(seqs, pages))


def random_params(module: Any, *args: jax.Array) -> Any:
    """Parameters without compiling an initialiser for every shape."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.3), s.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


def jitted(module: Any) -> Any:
    """``module.apply`` under jit; eager calls compile every operation by itself."""
    return jax.jit(
        lambda params, *args, **kwargs: module.apply({"params": params}, *args, **kwargs)
    )


@pytest.fixture(scope="module")
def stories(shared_data: pathlib.Path) -> LoadedModel:
    return load_model(shared_data / "stories260K-hf-converted", progress=False)


@pytest.mark.parametrize(
    ("folder", "file", "ids", "logits"),
    [
        ("stories260K-hf-converted", "reference.npz", "ids64", "logits64"),
        (
            "tinystories-656k-llama-hf",
            "reference_hf_transformers_fp32.npz",
            "greedy_ids",
            "logits",
        ),
    ],
)
def test_stored_logits(
    folder: str, file: str, ids: str, logits: str, shared_data: pathlib.Path
) -> None:
    reference = np.load(shared_data / folder / file)
    model = load_model(shared_data / folder, progress=False)
    out = jitted(model.module)(model.params, jnp.asarray(reference[ids])[None])[0]
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[0], reference[logits], atol=F32_LOGITS, rtol=0)


def test_greedy_text_through_the_cache(stories: LoadedModel, shared_data: pathlib.Path) -> None:
    folder = shared_data / "stories260K-hf-converted"
    expected = np.load(folder / "reference.npz")["greedy_ids"]
    module, steps = stories.module, len(expected) - 1

    @jax.jit
    def generate(params: Any, cache: QuantizedKVCache) -> jax.Array:
        def step(carry: Any, position: jax.Array) -> Any:
            token, cache = carry
            tokens, positions = token.reshape(1, 1), position.reshape(1, 1)
            logits, cache = module.apply({"params": params}, tokens, positions, cache)
            token = jnp.argmax(logits[0, 0]).astype(jnp.int32)
            return (token, cache), token

        start = (jnp.int32(expected[0]), cache)
        return jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))[1]

    ids = np.asarray(generate(stories.params, new_cache(stories.config, pages=13)))
    np.testing.assert_array_equal(ids, expected[1:])
    vocabulary = read_llama2c_vocabulary(folder / "tok512.bin")
    text = b"".join(vocabulary[i] for i in ids).replace(b"<0x0A>", b"\n").decode()
    assert text == (folder / "greedy.txt").read_text()


def read_llama2c_vocabulary(path: pathlib.Path) -> list[bytes]:
    """Tokens of llama2.c's tokenizer.bin: a header, then (score, length, bytes) each."""
    data, at, tokens = path.read_bytes(), 4, []
    while at < len(data):
        _, length = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    return tokens


def test_prefill_in_chunks_equals_one_pass(stories: LoadedModel) -> None:
    tokens = jnp.asarray(np.arange(5, 45).reshape(2, 20), jnp.int32)
    apply, params = jitted(stories.module), stories.params
    whole = apply(params, tokens)[0]
    cache = new_cache(stories.config, pages=2, seqs=2)
    # Slots in other order than rows; the second chunk of row 1 ends in padding.
    slots = jnp.asarray([1, 0], jnp.int32)
    valid = np.ones((2, 10), bool)
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10))
    first, cache = apply(params, tokens[:, :10], positions, cache, slots, valid)
    valid = valid & ((np.arange(10) < 7) | (np.arange(2)[:, None] == 0))
    second, cache = apply(params, tokens[:, 10:], positions + 10, cache, slots, valid)
    np.testing.assert_allclose(first, whole[:, :10], atol=F32_LOGITS, rtol=0)
    np.testing.assert_allclose(second[0], whole[0, 10:], atol=F32_LOGITS, rtol=0)
    np.testing.assert_allclose(second[1, :7], whole[1, 10:17], atol=F32_LOGITS, rtol=0)


def test_sliding_window_through_the_cache() -> None:
    config = dataclasses.replace(TINY, num_layers=2, layer_windows=(3, None), attention_bias=True)
    module = Decoder(config, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 32, (1, 20)).astype(np.int32)
    params, apply = random_params(module, jnp.asarray(tokens)), jitted(module)
    whole = np.asarray(apply(params, tokens)[0])
    full = Decoder(dataclasses.replace(config, layer_windows=()), dtype=jnp.float32)
    assert np.abs(whole - jitted(full)(params, tokens)[0])[0, 3:].max() > 1e-2  # it matters
    cache = new_cache(config, pages=2)
    for i in range(20):
        logits, cache = apply(params, tokens[:, i : i + 1], np.full((1, 1), i, np.int32), cache)
        np.testing.assert_allclose(logits[0, 0], whole[0, i], atol=F32_LOGITS, rtol=0)


def test_logits_at_and_padding() -> None:
    module = Decoder(TINY, dtype=jnp.float32)
    tokens = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)
    params, apply = random_params(module, tokens), jitted(module)
    whole = np.asarray(apply(params, tokens)[0])
    at = np.asarray([1, 3], np.int32)
    picked = apply(params, tokens, logits_at=jnp.asarray(at))[0]
    assert picked.shape == (2, 32)
    np.testing.assert_allclose(picked, whole[np.arange(2), at], atol=F32_LOGITS, rtol=0)
    # Left padding: the same tokens further right, at the same positions.
    shifted = np.asarray([[0, 1, 2, 3]], np.int32)
    positions = np.asarray([[0, 0, 1, 2]], np.int32)
    padded = apply(params, jnp.asarray(shifted), jnp.asarray(positions), valid=shifted > 0)[0]
    np.testing.assert_allclose(padded[0, 1:], whole[0, :3], atol=F32_LOGITS, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=tied, qk_norm=True, mlp_bias=True)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    flat = {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in _leaves(shapes)}
    block = "model/layers_0/"
    assert flat.keys() == (
        {"model/embed_tokens/embedding", "model/norm/weight"}
        | {block + f"self_attn/{n}_proj/kernel" for n in "qkvo"}
        | {block + f"self_attn/{n}_norm/weight" for n in "qk"}
        | {block + f"mlp/{n}_proj/{x}" for n in ("gate", "up", "down") for x in ("kernel", "bias")}
        | {block + f"{n}_layernorm/weight" for n in ("input", "post_attention")}
        | (set() if tied else {"lm_head/kernel"})
    )
    assert all(x.dtype == jnp.float32 for x in flat.values())
    assert flat[block + "self_attn/k_proj/kernel"].shape == (16, 8)


def test_training() -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=True, qk_norm=True)
    module = Decoder(config, remat=True)  # bfloat16 compute, float32 parameters
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8]], jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), tokens)["params"]
    optimizer = optax.sgd(1.0)

    @jax.jit
    def train(params: Any) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            logits = module.apply({"params": params}, tokens[:, :-1])[0]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return jnp.mean(losses)

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=30)[1]

    losses = np.asarray(train(params))
    assert losses[0] == pytest.approx(np.log(32), rel=0.05)  # starts at no opinion
    assert losses[-1] < 0.5 * losses[0]


def _leaves(tree: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_quantized_leaves_and_taps() -> None:
    layer = DecoderLayer(TINY, 0, jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 16)), jnp.float32)
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    params, apply = random_params(layer, x, positions), jitted(layer)
    quantized = qjax.quantize_tree(params, {".*/kernel": qjax.INT8_CHANNEL})
    out, cache, taps = apply(quantized, x, positions)
    same = apply(qjax.dequantize_tree(quantized), x, positions)[0]
    np.testing.assert_allclose(out, same, atol=F32_LOGITS, rtol=0)
    assert cache is None
    # A tap is the input of its layer: applying the kernel by hand gives the layer's result.
    kernels = {f"self_attn/{n}_proj" for n in "qkvo"} | {
        f"mlp/{n}_proj" for n in ("gate", "up", "down")
    }
    assert taps.keys() == kernels | {"self_attn/keys", "self_attn/values"}
    down = taps["mlp/down_proj"] @ qjax.dequantize(quantized["mlp"]["down_proj"]["kernel"])
    o = taps["self_attn/o_proj"] @ qjax.dequantize(quantized["self_attn"]["o_proj"]["kernel"])
    np.testing.assert_allclose(x + o + down, out, atol=F32_LOGITS, rtol=0)
    assert taps["self_attn/keys"].shape == (1, 5, 1, 8)


def test_cache_needs_slots_and_valid() -> None:
    layer = DecoderLayer(TINY, 0, jnp.float32)
    x, positions = jnp.ones((1, 1, 16)), jnp.zeros((1, 1), jnp.int32)
    params = random_params(layer, x, positions)
    with pytest.raises(ValueError, match="needs slots and valid"):
        layer.apply({"params": params}, x, positions, new_cache(TINY, 1))


def test_rotary_is_relative_and_precise_in_bfloat16() -> None:
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 16)), jnp.float32)
    scaling = RopeScaling("yarn", 4.0, 32, attention_factor=1.5)

    def product(shift: int, x: jax.Array) -> jax.Array:
        positions = jnp.asarray([[3 + shift, 10 + shift]], jnp.int32)
        rotated = apply_rotary(x, positions, 10000.0, scaling)
        assert rotated.dtype == x.dtype
        rotated = rotated.astype(jnp.float32)
        return jnp.sum(rotated[:, 0] * rotated[:, 1])

    near, far = product(0, q), product(1000, q)
    np.testing.assert_allclose(near, far, rtol=1e-3)
    # Angles in bfloat16 would be wrong by whole turns at position 1000.
    np.testing.assert_allclose(product(1000, q.astype(jnp.bfloat16)), far, rtol=3e-2)
