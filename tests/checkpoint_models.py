"""Small models for the tests of checkpoint formats, made without a single compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from hypothesis import strategies as st

from qjax.checkpoints.layout import Leaf, model_leaves
from qjax.formats import QuantFormat
from qjax.models.config import ModelConfig
from qjax.quantized_array import QuantizedArray

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    attention_bias=True,
    attention_out_bias=True,
    dtype="float32",
)


def random_quantized(
    shape: tuple[int, int],
    fmt: QuantFormat,
    seed: int,
    *,
    act_order: bool = False,
    lowest_zero: int = 0,
    dtype: Any = np.float32,
) -> QuantizedArray:
    """Every code in every place; zero points (unsigned) from ``lowest_zero``.

    With ``act_order``, rows are in canonical order: ascending within each group.
    """
    rng = np.random.default_rng(seed)
    k, n = shape
    half = 2 ** (fmt.bits - 1)
    codes = rng.integers(-half, half, shape).astype(np.int8)
    groups = 1 if fmt.group_size is None else -(-k // fmt.group_size)
    if fmt.scale_steps is None:
        scale = rng.uniform(0.5, 2.0, (groups, n)) * rng.choice([-1.0, 1.0], (groups, n))
    else:
        step = rng.uniform(0.5, 2.0, n).astype(ml_dtypes.bfloat16).astype(np.float32)
        scale = step * rng.integers(1, fmt.scale_steps + 1, (groups, n))
    zero_point = perm = None
    if not fmt.symmetric:
        zero_point = rng.integers(lowest_zero - half, half, (groups, n)).astype(np.int8)
    if act_order:
        g_idx = rng.permutation(np.arange(k) // (fmt.group_size or k))
        perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    parts: dict[str, Any] = {
        "qvalue": codes if fmt.bits == 8 else codes.astype(ml_dtypes.int4),
        "scale": scale.astype(jnp.dtype(fmt.scale_dtype)),
        "zero_point": zero_point,
        "perm": perm,
    }
    return QuantizedArray.make(fmt=fmt, dtype=dtype, **parts)


def random_params(config: ModelConfig, kernel: Callable[[Leaf, int], Any]) -> dict[str, Any]:
    """Parameters of a decoder; ``kernel(leaf, seed)`` makes those of linear layers, or returns None
    for a plain one."""
    params = {}
    for seed, leaf in enumerate(model_leaves(config)):
        value = kernel(leaf, seed) if leaf.is_kernel else None
        if value is None:
            value = np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32)
        params[tuple(leaf.path.split("/"))] = value
    return unflatten_dict(params)


def assert_same_tree(a: Any, b: Any) -> None:
    """Equal structure (formats included), types and bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b), strict=True
    ):
        name = jax.tree_util.keystr(path)
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype, (name, x.dtype, y.dtype)
        if x.dtype == ml_dtypes.int4:  # numpy holds them in bytes, of which four bits count
            x, y = x.astype(np.int8), y.astype(np.int8)
        assert x.shape == y.shape and x.tobytes() == y.tobytes(), name


def json_values() -> st.SearchStrategy[Any]:
    """What a config file may hold in any place."""
    words = ["4", "gemm", "gptq", "gptq_v2", "int32", "(", "-:.*", "a{9999999999}", ""]
    scalars = st.none() | st.booleans() | st.integers(-2, 2**33) | st.floats()
    leaves = scalars | st.sampled_from([2, 3, 4, 8, 16, 128]) | st.sampled_from(words)
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(words), inner, max_size=3)
        ),
        max_leaves=5,
    )
