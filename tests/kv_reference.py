"""Small caches, padded appends and the independent NumPy model that the KV cache tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.kv_cache import QuantizedKVCache
from qjax.kv_format import KVFormat
from qjax.ops.kv import append, read

PLAIN = [KVFormat("float32"), KVFormat("bfloat16"), KVFormat("float16")]
CODES = ["float8_e5m2", "float8_e4m3fn", "int8", "int4"]
QUANTIZED = [KVFormat(d, m) for d in CODES for m in ("dynamic", "tracked", "static")]
BOUND = {"float8_e5m2": 57344.0, "float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0}
HEADS, DIM, PAGE = 2, 8, 4
STATIC = (np.array([0.02, 0.5], np.float32), np.array([0.3, 0.04], np.float32))

jit_append = jax.jit(append, static_argnums=1)
jit_read = jax.jit(read, static_argnums=(1, 3))


def ident(fmt: KVFormat) -> str:
    return fmt.name


def make(fmt: KVFormat | Sequence[KVFormat], **kw: Any) -> QuantizedKVCache:
    """Two slots of three pages in a scattered order; slot 1 lacks its last page."""
    arguments: dict[str, Any] = {
        "num_layers": 1,
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "num_pages": 8,
        "page_size": PAGE,
        "max_seqs": 2,
        "pages_per_seq": 3,
        "fmt": fmt,
        "static_scales": [STATIC] if getattr(fmt, "mode", None) == "static" else None,
    }
    cache = QuantizedKVCache.init(**(arguments | kw))
    return cache.with_page_table(np.array([[5, 2, 7], [1, 0, cache.num_pages]], np.int32))


def tokens(seed: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values whose magnitude varies from token to token by up to 2**6."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *shape, HEADS, DIM)) * 2.0 ** rng.integers(-3, 4, (2, *shape, 1, 1))
    return x[0].astype(np.float32), x[1].astype(np.float32)


def add(cache, keys, values, start: Any = 0, valid=None, slots=(0, 1), layer=0):
    """Append a chunk of consecutive tokens per row, from position ``start`` on.

    Padded to two rows of one or twelve tokens, so that a format compiles twice in this whole file.
    """
    b, t = keys.shape[:2]
    grow = ((0, 2 - b), (0, (1 if t == 1 else 12) - t))
    positions = np.asarray(start, np.int32).reshape(-1, 1) + np.arange(12, dtype=np.int32)[None]
    valid = np.ones((b, t), bool) if valid is None else valid
    return jit_append(
        cache,
        layer,
        jnp.asarray(np.pad(keys, (*grow, (0, 0), (0, 0)), constant_values=np.nan)),
        jnp.asarray(np.pad(values, (*grow, (0, 0), (0, 0)), constant_values=np.nan)),
        jnp.asarray(np.broadcast_to(positions, (2, 12))[:, : t + grow[1][1]]),
        jnp.asarray(np.pad(np.asarray(slots, np.int32), grow[0], constant_values=-1)),
        jnp.asarray(np.pad(valid, grow)),
    )


def stored(cache, layer=0) -> tuple[np.ndarray, np.ndarray]:
    """Dequantized keys and values of both slots, ``[2, 12, heads, dim]``."""
    keys, values = jit_read(cache, layer, jnp.arange(2, dtype=jnp.int32), 12)
    return np.asarray(keys), np.asarray(values)


def expected(
    x: np.ndarray,
    fmt: KVFormat,
    static: np.ndarray,
    start: np.ndarray | None = None,
    keys: bool = True,
):
    """Decoded keys or values of a sequence ``[t, heads, dim]``, and the running statistic after."""
    if fmt.mode == "none":
        return x.astype(getattr(ml_dtypes, fmt.dtype, fmt.dtype)).astype(np.float32), None
    bound = np.float32(BOUND[fmt.dtype])
    running = np.zeros(HEADS, np.float32) if start is None else start
    out = np.zeros_like(x)
    for t in range(x.shape[0]):
        absmax = np.abs(x[t]).max(-1)
        running = np.maximum(absmax, running / 2)
        top = running if fmt.mode == "tracked" else absmax
        scale = np.where(top > 0, top * np.float32(1 / bound), np.float32(1))
        scale = (static if fmt.mode == "static" else scale)[:, None]
        lowest = -bound
        if fmt.dtype == "int4" and fmt.mode != "static":
            scale, lowest = clipping_scale(x[t], scale, keys), np.float32(-8)
        ratio = np.clip(x[t] / scale, lowest, bound)
        if fmt.dtype.startswith("int"):
            codes = np.rint(ratio)
        else:
            codes = ratio.astype(getattr(ml_dtypes, fmt.dtype)).astype(np.float32)
        out[t] = codes * scale
    return out, running


def clipping_scale(x: np.ndarray, scale: np.ndarray, signed: bool) -> np.ndarray:
    """What int4 tries for codes -8..7, the first with the least squared error."""
    tried, errors = [], []
    for sign in (1, -1) if signed else (1,):
        for factor in np.array([1, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64], np.float32):
            other = scale * (sign * factor)
            error = x / other - np.clip(np.rint(x / other), -8, 7)
            steps = np.rint(error * error * 512).sum(-1, keepdims=True)
            tried.append(other)
            errors.append(steps.astype(np.float32) * (factor * factor))
    return np.take_along_axis(np.stack(tried), np.argmin(errors, axis=0)[None], axis=0)[0]


def same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
