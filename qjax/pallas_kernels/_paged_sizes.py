"""Sizes of the paged decode kernel."""

from __future__ import annotations

import dataclasses
import math

KINDS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int4")
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes and types of one kernel.

    Attributes:
      kind: Type of the stored values, one of ``KINDS``.
      query: Type of the queries, ``"bfloat16"`` or ``"float16"``.
      head_dim: Elements per head, a multiple of 32.
      ratio: Query heads per KV head, 1 to 16.
      tokens: Tokens per tile, a multiple of 64.
      stages: Tiles in flight.
      token_scales: Whether every token has scales of its own.
      per_row: Tokens per row of shared memory; see ``tokens_per_row``.
      factor: What ``q . k`` is multiplied by; see ``logit_factor``.
      soft_cap: Logits become ``soft_cap * tanh(logits / soft_cap)``; None for plain ones.
      logit_bias: Whether every query head and token has a number that is added to its logit.
    """

    kind: str
    query: str
    head_dim: int
    ratio: int
    tokens: int
    stages: int
    token_scales: bool = False
    per_row: int = 1
    factor: float = 1.0
    soft_cap: float | None = None
    logit_bias: bool = False

    @property
    def narrow(self) -> bool:
        """Whether values have fewer than 16 bits."""
        return self.kind not in ("bfloat16", "float16")

    @property
    def biased(self) -> bool:
        """Whether keys are multiplied with a constant added, which is taken back afterwards.

        Not where the registers for that would be lacking.
        """
        return self.kind in ("int8", "int4") and self.quads <= 16

    @property
    def factors(self) -> int:
        """Constants of a thread that belong to the queries."""
        return self.columns * (4 if self.biased else 2)

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
        size = self.row_bytes * self.per_row
        return next((s for s in (128, 64, 32) if size % s == 0), None)

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

    @property
    def added_bytes(self) -> int:
        """Bytes of what is added to the logits of one tile."""
        return 4 * self.ratio * self.tokens * self.logit_bias


def tokens_per_row(row_bytes: int, page_size: int) -> int:
    """How many neighbouring tokens are copied as one row of 128 bytes: 1, 2 or 4.

    TMA works row by row, so that short rows take as long as full ones. Copies must be whole tiles
    of 8 rows.
    """
    if row_bytes not in (32, 64) or page_size * row_bytes % 1024:
        return 1
    return 128 // row_bytes


def logit_factor(scale: float, soft_cap: float | None) -> float:
    """What a product ``q . k`` is multiplied by, so that its exponential is ``2 ** x``."""
    return scale * LOG2E if soft_cap is None else 2 * LOG2E * scale / soft_cap
