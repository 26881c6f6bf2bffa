"""Models and caches with random contents at real shapes, made on the device in their final form.

For speed and memory measurements without a checkpoint. Contents are random, never zero: arithmetic
on zeros draws less power, and a GPU then runs at clocks that real weights do not get.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoints.layout import HEAD, head_rules
from qjax.formats import QuantFormat
from qjax.generate import DecodeState
from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.models.config import ModelConfig
from qjax.models.decoder import Decoder
from qjax.nn.rotary import RopeScaling
from qjax.numerics import cast_saturating, fit_scale, scale_step
from qjax.ops.kv import quantize_kv
from qjax.quantize import path_string, quantize, quantized_nbytes
from qjax.quantized_array import QuantizedArray
from qjax.serving.pages import pages_for
from qjax.typing import Array, Params

_LLAMA_31 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_LLAMA_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=_LLAMA_31,
    rms_norm_eps=1e-5,
)
SHAPES: dict[str, ModelConfig] = {
    "llama-3.1-8b": _LLAMA_8B,
    "llama-3.1-70b": dataclasses.replace(
        _LLAMA_8B,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=80,
        num_q_heads=64,
        layer_windows=(),
    ),
    "qwen3-8b": ModelConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_layers=36,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        qk_norm=True,
        model_type="qwen3",
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    ),
}
"""Sizes of published models, by name, and one that runs anywhere."""


def random_params(
    config: ModelConfig,
    fmt: QuantFormat | None,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
    place: Callable[[str, Any], Any] | None = None,
    head: QuantFormat | None = None,
) -> Params:
    """Random parameters of a decoder, quantized as ``load_model`` does.

    Args:
      config: The model.
      fmt: Weight format of kernels but ``lm_head``, or None.
      dtype: Type of what is not quantized; norm weights are float32.
      seed: Of the contents.
      place: Puts each parameter where it shall live, as of ``load_model``.
      head: Weight format of ``lm_head``, or None.

    Returns:
      Parameters whose values have the spread of trained ones, about 0.02.

    Raises:
      ValueError: If there is a format for ``lm_head`` and the model has none of its own.
    """
    head_rules(config, head)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = []
    for i, (key_path, leaf) in enumerate(flat):
        path, key = path_string(key_path), jax.random.key(seed * 1_000_003 + i)
        chosen = head if path == HEAD else fmt
        if path.endswith("/kernel") and chosen is not None:
            leaves.append(_random_quantized(key, leaf.shape, chosen, jnp.dtype(dtype)))
        elif leaf.ndim < 2:
            norm = jax.random.uniform(key, leaf.shape, minval=0.8, maxval=1.2)
            leaves.append(norm if path.endswith("weight") else (norm - 1).astype(dtype))
        else:
            leaves.append(_random_plain(key, leaf.shape, jnp.dtype(dtype)))
        if place is not None:
            leaves[-1] = place(path, leaves[-1])
        # One at a time, or the random bits of all would be in memory together.
        jax.block_until_ready(leaves[-1])
    return jax.tree_util.tree_unflatten(treedef, leaves)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_plain(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return (jax.random.normal(key, shape, jnp.float32) * 0.02).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random_quantized(
    key: Array, shape: tuple[int, ...], fmt: QuantFormat, dtype: Any
) -> QuantizedArray:
    form = jax.eval_shape(
        lambda x: quantize(x, fmt, dtype=dtype), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    codes_key, scale_key, zero_key = jax.random.split(key, 3)
    # Four standard deviations reach the bound, as with absmax scales.
    codes = jax.random.normal(codes_key, shape, jnp.float32) * (fmt.bound / 4)
    codes = cast_saturating(codes, fmt.storage_dtype, lower=fmt.qmin, upper=fmt.qmax)
    spread = jax.random.uniform(scale_key, form.scale.shape, minval=0.8, maxval=1.2)
    scale = fit_scale(spread * (0.08 / fmt.bound), fmt, scale_step(spread * 0.08, fmt, -2))
    zero_point = None
    if form.zero_point is not None:
        zero_point = jax.random.randint(zero_key, form.scale.shape, -1, 2, jnp.int32)
        zero_point = zero_point.astype(jnp.int8)
    return QuantizedArray.make(codes, scale, fmt, zero_point=zero_point, dtype=dtype)


def random_cache(
    config: ModelConfig,
    fmt: KVFormat | Sequence[KVFormat],
    batch: int,
    length: int,
    page_size: int,
    seed: int = 0,
) -> QuantizedKVCache:
    """A cache with ``batch`` sequences of up to ``length`` tokens on shuffled pages, random inside.

    As an engine on a GPU has it: without counters. Contents have a standard deviation of 1 and
    scales, static ones too, that cover four of them.
    """
    formats = (fmt,) * config.num_layers if isinstance(fmt, KVFormat) else tuple(fmt)
    static = []
    for f in formats:
        shape = () if f.granularity == "tensor" else (config.num_kv_heads,)
        pair = (np.full(shape, 4 / f.bound, np.float32),) * 2 if f.mode == "static" else None
        static.append(pair)
    pages_per_seq = pages_for(length, page_size)
    num_pages = batch * pages_per_seq
    cache = QuantizedKVCache.init(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=num_pages,
        page_size=page_size,
        max_seqs=batch,
        pages_per_seq=pages_per_seq,
        fmt=formats,
        static_scales=static,
        counted=False,
    )
    table = np.random.default_rng(seed).permutation(num_pages).astype(np.int32)
    cache = cache.with_page_table(table.reshape(batch, pages_per_seq))
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
    cache = dataclasses.replace(cache, keys=(), values=())  # else they are in memory twice
    layers = range(config.num_layers)

    def contents(part: int) -> tuple[Array, ...]:
        keys = [jax.random.key(seed * 1_000_003 + 2 * i + part) for i in layers]
        return tuple(_random_pages(keys[i], shape, cache.formats[i]) for i in layers)

    def scales(old: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
        pairs = zip(old, cache.formats, strict=True)
        return tuple(None if s is None else jnp.full(s.shape, 4 / f.bound) for s, f in pairs)

    return dataclasses.replace(
        cache,
        keys=contents(0),
        values=contents(1),
        key_scales=scales(cache.key_scales),
        value_scales=scales(cache.value_scales),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_pages(key: Array, shape: tuple[int, ...], fmt: KVFormat) -> Array:
    x = jax.random.normal(key, shape, jnp.float32)
    limit = jnp.full((1,) * len(shape), 4.0)
    scale = limit / fmt.bound if fmt.quantized else None
    return quantize_kv(x, scale, limit, fmt)


def running_state(vocab_size: int, batch: int, length: int, seed: int = 0) -> DecodeState:
    """A decode state in which every slot goes on without end from ``length`` cached tokens."""
    rng = np.random.default_rng(seed)
    return dataclasses.replace(
        DecodeState.init(batch),
        tokens=jnp.asarray(rng.integers(0, vocab_size, batch), jnp.int32),
        lengths=jnp.full((batch,), length, jnp.int32),
        limits=jnp.full((batch,), np.iinfo(np.int32).max, jnp.int32),
        active=jnp.ones((batch,), bool),
    )


def step_bytes(params: Params, cache: QuantizedKVCache, batch: int, context: int) -> int:
    """Bytes that one decode step must read: all weights and the cached tokens of all sequences.

    Of an embedding that is not also the output projection only the rows of the batch are read.
    """
    total = quantized_nbytes(params) + batch * context * cache.bytes_per_token()
    table = params["model"]["embed_tokens"]["embedding"]
    if "lm_head" in params:
        total -= (table.shape[0] - batch) * table.shape[1] * table.dtype.itemsize
    return total
