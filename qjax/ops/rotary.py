"""Rotary position embedding of new tokens, and their way from the projections into the KV cache.

Feature ``i`` of the first half of a head and ``i`` of the second half are one pair, rotated by an
angle whose cosine and sine stand in a table: computed once per step, shared by all layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp

from qjax.kv_cache import QuantizedKVCache
from qjax.ops._append import (
    choose_append_backend,
    rotate_and_append_by_kernel,
    rotate_and_append_unsupported_reason,
)
from qjax.ops.kv import append, check_append
from qjax.typing import Array, ArrayLike, DType


def turn(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate pairs of features in the half-split layout.

    Args:
      x: float32 ``[..., head_dim]``.
      cos: float32, broadcastable to ``[..., head_dim // 2]`` and of the same rank.
      sin: Likewise.

    Returns:
      float32 ``[..., head_dim]``.
    """
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotary_table(positions: Array, frequencies: ArrayLike, factor: float = 1.0) -> Array:
    """Cosines and sines of the angles of all pairs.

    Args:
      positions: int32 ``[b, t]``.
      frequencies: float32 ``[head_dim // 2]``, angle per position.
      factor: Multiplies them, and so what is rotated (YaRN).

    Returns:
      float32 ``[b, t, head_dim]``: the cosines, then the sines.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)[None, None, :]
    both = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return both * jnp.float32(factor)


def rotate_heads(x: Array, table: Array) -> Array:
    """Rotate queries or keys to their positions, in float32.

    Args:
      x: ``[b, t, heads, head_dim]``.
      table: ``rotary_table`` of their positions.

    Returns:
      Same shape and dtype as ``x``.
    """
    cos, sin = jnp.split(table[:, :, None, :], 2, axis=-1)
    return turn(x.astype(jnp.float32), cos, sin).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Projected:
    """Queries, keys and values of new tokens as their projections leave them.

    Attributes:
      products: ``[s, b, t, features]``, to be summed over ``s``, as ``quantized_dot(keep_splits=
        True)`` returns them: one for queries, keys and values joined, or one for each.
      biases: For queries, keys and values ``[heads * head_dim]`` of ``dtype``, or None for what
        needs none.
      dtype: Type to which sums, and sums with biases, are rounded.
    """

    products: tuple[Array, ...]
    biases: tuple[Array | None, Array | None, Array | None]
    dtype: DType

    def heads(self, q_heads: int, kv_heads: int, head_dim: int) -> list[Array]:
        """Queries, keys and values, ``[b, t, heads, head_dim]`` of ``dtype``, not rotated."""
        parts = [_total(product).astype(self.dtype) for product in self.products]
        if len(parts) == 1:
            ends = [q_heads * head_dim, (q_heads + kv_heads) * head_dim]
            parts = jnp.split(parts[0], ends, axis=-1)
        result = []
        for part, bias in zip(parts, self.biases, strict=True):
            part = part if bias is None else part + bias.reshape(1, 1, -1)
            result.append(part.reshape(*part.shape[:2], -1, head_dim))
        return result


def _total(parts: Array) -> Array:
    """The sum over the first axis in float32, in order; one part alone as it is."""
    if parts.shape[0] == 1:
        return parts[0]
    return functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])


def rotate_and_append(
    cache: QuantizedKVCache,
    layer: int,
    q: Array,
    k: Array,
    v: Array,
    table: Array,
    positions: Array,
    slots: Array,
    valid: Array,
    *,
    projected: Projected | None = None,
    mix: Callable[[Array], Array] | None = None,
    backend: str | None = None,
) -> tuple[Array, Array, QuantizedKVCache]:
    """Rotate new queries and keys, and store keys and values in one layer, quantized.

    Args:
      cache: The cache; see ``ops.kv.append`` for it and for the rules of what is stored.
      layer: Layer index, a Python int.
      q: Queries ``[b, t, q_heads, head_dim]``, not rotated.
      k: Keys ``[b, t, kv_heads, head_dim]``, not rotated.
      v: Values ``[b, t, kv_heads, head_dim]``.
      table: ``rotary_table(positions, ...)``.
      positions: int32 ``[b, t]``.
      slots: int32 ``[b]``.
      valid: bool ``[b, t]``; False for padding.
      projected: Where ``q``, ``k`` and ``v`` come from, if they are its ``heads`` unchanged: the
        kernel reads this in their place.
      mix: Changes rotated queries and keys, of shape and type alike, before keys are stored; for
        formats that have ``mixes_keys``.
      backend: ``"mosaic_gpu"`` (one token per row, on Hopper), ``"xla"``, or None for the kernel
        where it can run: ``ops._append.rotate_and_append_unsupported_reason``.

    Returns:
      Queries as attention over the cache needs them; the rotated keys, not mixed, which cost
      nothing under jit where they are not used; and the new cache.

    Raises:
      ValueError: If the layer or the backend does not exist, or shapes disagree.
      NotImplementedError: If the named backend cannot run; says why.
    """
    keys = rotate_heads(k, table)
    check_append(cache, layer, k, v, positions, slots, valid)

    def reason() -> str | None:
        if mix is not None:
            return "keys that are mixed after their rotation; the kernel does not"
        if projected is None:
            return "keys that were changed after their projection; the kernel reads its result"
        return rotate_and_append_unsupported_reason(
            cache, layer, projected.products, projected.dtype
        )

    if choose_append_backend("rotate_and_append", backend, reason) == "mosaic_gpu":
        assert projected is not None
        queries, cache = rotate_and_append_by_kernel(
            cache,
            layer,
            projected.products,
            projected.biases,
            projected.dtype,
            table,
            positions,
            slots,
            valid,
        )
        return queries.reshape(q.shape), keys, cache
    queries, stored = rotate_heads(q, table), keys
    if mix is not None:
        queries, stored = mix(queries), mix(stored)
    return queries, keys, append(cache, layer, stored, v, positions, slots, valid, backend=backend)
