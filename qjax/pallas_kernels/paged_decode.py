"""Attention of one new token per sequence over its pages of 16, 8 or 4 bits, on Hopper.

::

  out[b, h] = sum_t p[t] * sv[t] * v[t]      p = softmax(cap(scale * sk[t] * (q[b, h] . k[t])))

The time is that of reading the visible part of the cache once. A thread block has one KV head of
one sequence (or a share of its tokens, ``splits``), all query heads that share it, and four warps::

  TMA: page -> slot of shared memory        `stages` tiles of 64 or 128 tokens in flight
      |   ready[slot]: keys, values and scales of a tile have landed
  every warp, a quarter of the tile's tokens  (_paged_tile)
      codes -> float16 in registers, q . k and p . v by `mma.sync`, float32 sums, softmax
  all warps done with the slot: copy the next tile there
  last: merge the four warps, normalize, store

``mma.sync`` and not ``wgmma``: the products are a twentieth of what either can do, and warps that
need nothing of each other exchange nothing. Codes are exact in float16; scales of keys multiply the
logits, scales of values the probabilities (by their logarithm, so that nothing underflows). Splits
write normalized partial results and the logarithms of their sums, merged in a fixed order by a
second kernel: two runs are equal to the bit, and a sequence's result does not depend on the others.

Measured on an H200, 64 sequences of 8192 tokens, 32 query heads, 8 KV heads of 128: 479 us with
bfloat16 pages (4.49 TB/s), fp8 251 us (4.28), int8 with scales per token 264 us (4.20).

Keys stored without their bias: its part of the logits, ``[b, kv_heads, ratio, tokens]`` in float32,
is copied beside each tile and added in the multiplication by the scales. At 64 x 8192 tokens and 32
query heads these are 67 MB beside 1074 MB of fp8, and the product that makes them is 13 GFLOP in
TF32 (26 us by the data sheet). The other way, a table of the rotations inside a page times queries
turned back to its start, needs both in two float16 parts to be exact: 24 more ``mma.sync`` per 16
tokens beside 16, about 100 instructions per tile to turn and split the queries, and 32 KB of table
in the place of two stages. It would cost more here, but grow with the lengths of the sequences and
not, as the array does, with the width of the page table.

References:
  FlashDecoding (Dao et al., 2023) for the splits; FlashInfer (arXiv:2501.01005) for pages.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qjax.pallas_kernels._paged_sizes import KINDS, Tile, logit_factor, tokens_per_row
from qjax.typing import Array, DType

SHARED_MEMORY_BYTES = 232448
"""Largest shared memory of one block on sm_90."""
_SM_COUNT = 132
_SM_SHARED_BYTES = 233472
# Registers allow four blocks of 128 threads per multiprocessor at up to 128 registers.
_BLOCKS_PER_SM = 4
# Four blocks per multiprocessor for one sequence with 4 KV heads; the merge reads 0.5 KB of each.
_MAX_SPLITS = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut up.

    Attributes:
      tokens: Tokens per tile, 64 or 128.
      stages: Tiles in flight per block, 2 to 8.
      splits: Blocks that share the tokens of one sequence and KV head.
    """

    tokens: int
    stages: int
    splits: int = 1

    def __post_init__(self) -> None:
        if self.tokens not in (64, 128):
            raise ValueError(f"tokens={self.tokens} must be 64 or 128")
        if not 2 <= self.stages <= 8:
            raise ValueError(f"stages={self.stages} must be between 2 and 8")
        if not 1 <= self.splits <= 256:
            raise ValueError(f"splits={self.splits} must be between 1 and 256")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A decode step as the kernel sees it: sizes and types, no arrays.

    Attributes:
      batch: Sequences.
      kv_heads: KV heads.
      ratio: Query heads per KV head.
      head_dim: Elements per head.
      page_size: Tokens per page.
      pages_per_seq: Width of the page table.
      kind: Type of the stored values.
      query: Type of the queries and of the result.
      token_scales: Whether every token has scales of its own.
      logit_bias: Whether a number for every query head and token is added to its logit.
    """

    batch: int
    kv_heads: int
    ratio: int
    head_dim: int
    page_size: int
    pages_per_seq: int
    kind: str
    query: str
    token_scales: bool = False
    logit_bias: bool = False

    def tile(self, config: Config, factor: float = 1.0, soft_cap: float | None = None) -> Tile:
        tile = Tile(
            self.kind,
            self.query,
            self.head_dim,
            self.ratio,
            config.tokens,
            config.stages,
            self.token_scales,
            factor=factor,
            soft_cap=soft_cap,
            logit_bias=self.logit_bias,
        )
        per_row = tokens_per_row(tile.row_bytes, self.page_size)
        return dataclasses.replace(tile, per_row=per_row)


def unsupported_reason(p: Problem) -> str | None:
    """Why this kernel cannot compute a problem; None if it can."""
    if p.kind not in KINDS:
        return f"{p.kind} pages; there are kernels for {', '.join(KINDS)}"
    if p.query not in ("bfloat16", "float16"):
        return f"{p.query} queries; the kernel takes bfloat16 and float16"
    if p.kind in ("bfloat16", "float16") and p.query != p.kind:
        return f"{p.query} queries with {p.kind} pages; 16-bit types must be the same"
    if p.head_dim not in (64, 96, 128, 256):
        return f"head_dim={p.head_dim}; there are kernels for 64, 96, 128 and 256"
    if not 1 <= p.ratio <= 16:
        return f"{p.ratio} query heads per KV head; there are kernels for 1 to 16"
    least = 32 if p.token_scales else 8
    if p.page_size not in (8, 16, 32, 64) and p.page_size % 128 or p.page_size < least:
        sizes = [size for size in (8, 16, 32, 64) if size >= least]
        return f"page_size={p.page_size}; it must be one of {sizes} or a multiple of 128"
    return None


def smem_bytes(config: Config, p: Problem) -> int:
    """Shared memory of one block in bytes (an upper bound)."""
    tile = p.tile(config)
    scales = 8 * tile.tokens if p.token_scales else 0
    stage = 2 * tile.tile_bytes + scales + tile.added_bytes + 8
    return config.stages * stage + 256 * tile.columns + 4 * 1024


def config_unsupported_reason(config: Config, p: Problem) -> str | None:
    """Why a config does not fit a problem; None if it does."""
    if p.page_size % config.tokens and config.tokens % p.page_size:
        return f"tiles of {config.tokens} tokens do not fit pages of {p.page_size}"
    size = smem_bytes(config, p)
    if size > SHARED_MEMORY_BYTES:
        return f"{size} bytes of shared memory; a block has {SHARED_MEMORY_BYTES}"
    if config.stages * p.tile(config).tile_bytes < 8192:
        return "the merge of the warps needs 8192 bytes; use more stages or tokens"
    return None


def heuristic_config(p: Problem) -> Config:
    """A config for any supported problem; each branch says what decides it."""
    # Four bits: the fixed costs of a tile would be as large as its arithmetic with 64 tokens.
    tokens = 128 if p.kind == "int4" and p.head_dim <= 128 else 64
    pair = 2 * p.tile(Config(tokens, 2)).tile_bytes
    # About 48 KB in flight per block lets four of them share a multiprocessor.
    stages = 2
    for candidate in (3, 4, 6):
        if candidate * pair <= 56 * 1024 or (candidate == 3 and 3 * pair <= 100 * 1024):
            stages = candidate
    config = Config(tokens, stages)
    blocks = min(_BLOCKS_PER_SM, _SM_SHARED_BYTES // (smem_bytes(config, p) + 1024))
    # Splits only fill multiprocessors that would idle, in one wave. Shorter than four tiles, a
    # split is mostly filling its stages. More stages would not help then: at 1 x 32768 tokens of
    # fp8 and 8 heads, 512 blocks have 25 MB in flight, and 4.5 TB/s times a latency of 1 us is 4.5
    # MB. Fewer blocks would not either: each of them computes one tile after the other.
    room = max(1, blocks) * _SM_COUNT // (p.batch * p.kv_heads)
    tiles = -(-p.page_size * p.pages_per_seq // tokens)
    splits = max(1, min(room, tiles // 4, _MAX_SPLITS))
    if splits * p.batch * p.kv_heads < _SM_COUNT:  # a short context: what counts is latency
        splits = max(splits, min(_SM_COUNT // (p.batch * p.kv_heads), tiles // 2))
    splits = -(-tiles // -(-tiles // splits))  # as many as full sequences keep busy
    config = dataclasses.replace(config, splits=splits)
    if config_unsupported_reason(config, p) is not None:
        raise AssertionError(f"{config} does not fit {p}")
    return config


def bias_length(tokens: int) -> int:
    """Positions for which ``decode`` takes a ``logit_bias``: whole tiles of any size."""
    return -(-tokens // 128) * 128


def search_space(p: Problem) -> list[Config]:
    """Configs worth timing for a problem, for an autotuner."""
    first = heuristic_config(p)
    splits = {first.splits, 1, max(1, first.splits // 2), min(256, first.splits * 2)}
    # One wave of one to four blocks per multiprocessor.
    waves = (n * _SM_COUNT // (p.batch * p.kv_heads) for n in range(1, _BLOCKS_PER_SM + 1))
    splits |= {s for s in waves if 1 <= s <= 256}
    # One or two tiles for each block: what a short context might want.
    tiles = -(-p.page_size * p.pages_per_seq // first.tokens)
    splits |= {s for s in (tiles, -(-tiles // 2)) if s <= 64}
    configs = [
        Config(tokens, stages, s)
        for tokens in (64, 128)
        for stages in (2, 3, 4, 6, 8)
        for s in sorted(splits)
    ]
    return [config for config in configs if config_unsupported_reason(config, p) is None]


def decode(
    q: Array,
    keys: Array,
    values: Array,
    key_scales: Array | None,
    value_scales: Array | None,
    table: Array,
    start: Array | None,
    stop: Array,
    *,
    kind: str,
    scale: float,
    soft_cap: float | None = None,
    logit_bias: Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """Attention of one query per sequence over its pages.

    Args:
      q: ``[b, kv_heads, ratio, head_dim]``, bfloat16 or float16.
      keys: Pages ``[num_pages, kv_heads, page_size, head_dim]`` as ``QuantizedKVCache`` holds them.
      values: Likewise.
      key_scales: float32 ``[num_pages, kv_heads, page_size]`` (per token and head), ``[kv_heads]``,
        or None.
      value_scales: Likewise.
      table: int32 ``[b, pages_per_seq]``, page of every ``page_size`` positions.
      start: int32 ``[b]``, first visible position, not negative; None for 0.
      stop: int32 ``[b]``, position behind the last visible one; 0 for nothing.
      kind: Type of the values: one of ``KINDS``.
      scale: Multiplier of the logits.
      soft_cap: Logits become ``soft_cap * tanh(logits / soft_cap)``; None for plain ones.
      logit_bias: float32 ``[b, kv_heads, ratio, bias_length(...)]``, added to the logits before the
        soft cap, in units of ``logit_factor``: ``q . k`` times that is what it is added to. Finite,
        also where nothing is visible. None for nothing to add.
      config: How the work is cut up; ``heuristic_config`` by default.
      interpret: Run in the Pallas interpreter, on any device.

    Returns:
      ``[b, kv_heads, ratio, head_dim]`` in ``q.dtype``; zeros where nothing is visible.

    Raises:
      NotImplementedError: If the kernel or the config does not support the problem; says why.
    """
    b, heads, ratio, head_dim = q.shape
    token_scales = key_scales is not None and key_scales.ndim == 3
    problem = Problem(
        b,
        heads,
        ratio,
        head_dim,
        keys.shape[2],
        table.shape[1],
        kind,
        q.dtype.name,
        token_scales,
        logit_bias is not None,
    )
    if logit_bias is not None:
        expected = (b, heads, ratio, bias_length(table.shape[1] * keys.shape[2]))
        if logit_bias.shape != expected or logit_bias.dtype != jnp.float32:
            raise ValueError(
                f"logit_bias {logit_bias.dtype}{logit_bias.shape} must be float32{expected}"
            )
    reason = unsupported_reason(problem)
    if reason is None:
        config = heuristic_config(problem) if config is None else config
        reason = config_unsupported_reason(config, problem)
    if reason is not None or config is None:
        raise NotImplementedError(f"paged_decode.decode: {reason}")
    # Imported on first use: Mosaic GPU takes a third of a second to import and is not part of
    # every jaxlib.
    from qjax.pallas_kernels import _paged_body

    first = jnp.zeros_like(stop) if start is None else start
    out, lse = _paged_body.call(
        problem.tile(config, logit_factor(scale, soft_cap), soft_cap),
        q,
        # One array and so one small kernel, which all layers of a model share.
        jnp.concatenate([first[:, None], stop[:, None], table], axis=1),
        keys,
        values,
        key_scales,
        value_scales,
        logit_bias,
        splits=config.splits,
        out_dtype=jnp.dtype(jnp.float32 if config.splits > 1 else q.dtype),
        with_lse=config.splits > 1,
        from_zero=start is None,
        interpret=interpret,
    )
    if lse is None:
        return out[0]
    if interpret:
        return merge(out, lse, q.dtype)
    from qjax.pallas_kernels import _paged_merge

    return _paged_merge.call(out, lse, q.dtype)


def merge(out: Array, lse: Array, dtype: DType) -> Array:
    """Normalized partial results as one.

    Args:
      out: float32 ``[parts, ..., head_dim]``.
      lse: float32 ``[parts, ...]``, log2 of the sums of exponentials, ``-inf`` for nothing.
      dtype: Result type.

    Returns:
      ``[..., head_dim]``; zeros where no part saw anything.
    """
    with jax.named_scope("merge_splits"):
        top = jnp.max(lse, axis=0, keepdims=True)
        weights = jnp.exp2(lse - jnp.where(top == -jnp.inf, jnp.float32(0), top))
        total = jnp.sum(weights, axis=0, keepdims=True)
        weights = weights / jnp.where(total > 0, total, jnp.float32(1))
        return jnp.sum(out * weights[..., None], axis=0).astype(dtype)
