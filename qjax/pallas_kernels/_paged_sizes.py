"""Sizes of the paged decode kernel, and how its queries are laid out."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from qjax.typing import Array

KINDS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4")
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes and types of one kernel.

    Attributes:
      kind: Type of the stored values, one of ``KINDS``.
      head_dim: Elements per head, a multiple of 32.
      ratio: Query heads per KV head, 1 to 16.
      tokens: Tokens per tile, a multiple of 64.
      stages: Tiles in flight.
      token_scales: Whether every token has scales of its own.
      soft_cap: Logits become ``soft_cap * tanh(logits / soft_cap)``; None for plain ones.
    """

    kind: str
    head_dim: int
    ratio: int
    tokens: int
    stages: int
    token_scales: bool = False
    soft_cap: float | None = None

    @property
    def narrow(self) -> bool:
        """Whether values have fewer than 16 bits."""
        return self.kind not in ("bfloat16", "float16")

    @property
    def compute(self) -> str:
        """Type of the products' operands, as PTX names it."""
        return "bf16" if self.kind == "bfloat16" else "f16"

    @property
    def row_bytes(self) -> int:
        """Bytes of one token and head."""
        bits = {"int4": 4}.get(self.kind, 8 if self.narrow else 16)
        return self.head_dim * bits // 8

    @property
    def swizzle(self) -> int | None:
        """Bytes of the swizzle pattern of the pages in shared memory; None for plain rows."""
        return next((s for s in (128, 64, 32) if self.row_bytes % s == 0), None)

    @property
    def columns(self) -> int:
        """Column groups of 8 query heads."""
        return -(-self.ratio // 8)

    @property
    def blocks(self) -> int:
        """Blocks of 16 elements of a head."""
        return self.head_dim // 16

    @property
    def quads(self) -> int:
        """Groups of four output registers of a thread."""
        return self.blocks * self.columns

    @property
    def tile_bytes(self) -> int:
        """Bytes of the keys, or of the values, of one tile."""
        return self.tokens * self.row_bytes


def arrange_queries(q: Array, kind: str) -> Array:
    """Queries ``[..., d]`` in the order in which the kernel meets the elements of a key."""
    if kind in ("bfloat16", "float16"):
        return q
    shape = q.shape
    parts = q.reshape(*shape[:-1], shape[-1] // 16, 4, 2, 2)
    if kind == "float8_e4m3fn":  # thread c of four: elements 4c, 4c + 1 and 4c + 2, 4c + 3
        parts = jnp.moveaxis(parts, -2, -3)
    else:  # 4c, 4c + 2 and 4c + 1, 4c + 3
        parts = jnp.moveaxis(parts, -1, -3)
    return parts.reshape(shape)


def logit_factor(scale: float, soft_cap: float | None) -> float:
    """What a product ``q . k`` is multiplied by, so that its exponential is ``2 ** x``."""
    return scale * LOG2E if soft_cap is None else 2 * LOG2E * scale / soft_cap
