"""The work of ``paged_decode`` between its copies in jnp, for the Pallas interpreter.

The interpreter knows no inline assembly. This shows copies, barriers, page numbers, ranges and
splits to be right; the instructions themselves are executed by a model in the tests.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels._paged_sizes import LOG2E, Tile
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu


class Twin:
    """Same interface as ``_paged_emit.Emitted``."""

    def __init__(
        self, tile: Tile, gmem: dict[str, Any], buffers: dict[str, Any], merge: Any, transforms: Any
    ) -> None:
        del merge, transforms
        self.tile, self.gmem, self.buffers = tile, gmem, buffers

    def start(self, row: Array, head: Array) -> tuple[Any, Any]:
        tile, gmem = self.tile, self.gmem
        queries = gmem["queries"][row, head].astype(jnp.float32) * jnp.float32(tile.factor)
        if "key_scales" in gmem and not tile.token_scales:
            queries = queries * gmem["key_scales"][head]
        top = jnp.full((tile.ratio, 1), -1e30, jnp.float32)
        out = jnp.zeros((tile.ratio, tile.head_dim), jnp.float32)
        return queries, (out, top, jnp.zeros_like(top))

    def step(
        self, state: Any, constants: Any, slot: Array, position: Array, start: Array, stop: Array
    ) -> Any:
        tile = self.tile
        out, top, total = state
        keys, values = (decode(self.buffers[name][slot], tile) for name in ("keys", "values"))
        where = position + jnp.arange(tile.tokens, dtype=jnp.int32)[None, :]
        seen = (where >= start) & (where < stop)
        x = jax.lax.dot_general(constants, keys, (((1,), (1,)), ((), ())))
        if tile.token_scales:
            x = x * self.buffers["key_scales"][slot][None, :]
        if tile.logit_bias:
            x = x + self.buffers["logit_bias"][slot]
        if tile.soft_cap is not None:
            x = jnp.tanh(x * jnp.float32(0.5 / LOG2E))
            x = x * jnp.float32(tile.soft_cap * LOG2E)
        x = jnp.where(seen, x, -jnp.inf)
        new_top = jnp.maximum(top, x.max(axis=1, keepdims=True))
        fade, weights = jnp.exp2(top - new_top), jnp.exp2(x - new_top)
        total = total * fade + weights.sum(axis=1, keepdims=True)
        if tile.token_scales:
            weights = weights * self.buffers["value_scales"][slot][None, :]
        out = out * fade + jax.lax.dot_general(weights, values, (((1,), (0,)), ((), ())))
        # The interpreter wants a fence between a read of a slot and the next copy into it.
        plgpu.commit_smem()
        return out, new_top, total

    def finish(self, state: Any, split: Array, row: Array, head: Array) -> None:
        out, top, total = state
        target = self.gmem["out"]
        result = jnp.where(total > 0, out / jnp.where(total > 0, total, jnp.float32(1)), 0.0)
        if "value_scales" in self.gmem and not self.tile.token_scales:
            result = result * self.gmem["value_scales"][head]
        target[split, row, head] = result.astype(target.dtype)
        if "lse" in self.gmem:
            self.gmem["lse"][split, row, head] = (top + jnp.log2(total))[:, 0]


def decode(stored: Array, tile: Tile) -> Array:
    """Stored rows ``[tokens, ...]`` as float32 ``[tokens, head_dim]``, in units of their scale."""
    stored = stored.reshape(tile.tokens, -1)
    if tile.kind == "int4":
        both = jax.lax.bitcast_convert_type(stored, jnp.int8)
        low = (both << jnp.int8(4)) >> jnp.int8(4)
        return jnp.concatenate([low, both >> jnp.int8(4)], axis=-1).astype(jnp.float32)
    if tile.kind.startswith("float8"):
        stored = jax.lax.bitcast_convert_type(stored, jnp.dtype(tile.kind))
    return stored.astype(jnp.float32)
