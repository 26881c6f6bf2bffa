"""W4A16, W8A16 and W4A8 with many rows: the packed weights of ``weight_only`` at full speed.

::

  out[m, n] = row_scale[m] * column[n] * sum_k x[m, k] * weight[k, n]

for the same packed weights, so that one copy serves every number of rows. Transposed as there: 64
output features in registers by up to 256 tokens in shared memory. A CTA has two compute warpgroups
(up to four with fewer tokens) and a memory warpgroup, and works through tiles until none is left,
as in ``w8a8``: while one warpgroup unpacks, another's ``wgmma`` runs (with wide tiles they take
turns at it, ``_turns``), and the memory warpgroup loads the next tile while this one is written
out. A step is 64 of the contraction, half a weight tile, or with 8-bit activations all 128::

  slot: words (warpgroups, bits / 2, 256), activations (columns, 64), scales of the step's groups

With ``cluster`` two CTAs with the same tokens load half of them each, for both (multicast). Gated
products, ``silu(gate) * up`` of alternate tiles of features, end in pairs of warpgroups
(``_weight_only_large_store``).

Groups are scaled as in ``weight_only``: weights in float16, sums in bfloat16 (``scaled_sums``). For
the latter the accumulator is divided by the group's scale before its product is added, and
multiplied by it after.

W4A8 multiplies int4 by int8: a code in the upper half of a byte is 16 times its value, so that
unpacking takes three instructions for eight codes (``_unpack.unpack_int8``). Sums of groups are
exact integers, scaled and added to float32 totals: twice the registers, so tiles have up to 128
tokens, or 96 where products overlap with that (``_group_sums``; on an H200 up to 13 % faster than
all else here, at some shapes slower, once by a quarter). Such weights are packed in an order of
their own (``_layout.int8_order``). With ``whole_scales`` codes are multiplied by their group's
multiple while they are unpacked, in seven instructions for eight codes, and all of the contraction
is one integer sum.

References:
  Machete (vLLM): the transposed mixed-type product with ``wgmma``; see also ``w8a8``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax.numpy as jnp

from qjax.pallas_kernels import _codes, _layout, weight_only
from qjax.pallas_kernels.weight_only import SHARED_MEMORY_BYTES, Problem
from qjax.typing import Array, DType

_SM_COUNT = 132
TURNS = ("started", "finished")
_MAX_COLUMNS = 256
_MAX_INTEGER_COLUMNS = 128  # with float32 sums beside the accumulators
_MAX_OVERLAP_COLUMNS = 96  # beside two sets of accumulators


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut up.

    Attributes:
      columns: Tokens of a tile, a multiple of 8 up to 256 (128 for W4A8 with scaled sums).
      stages: Steps of 64 of the contraction in flight, at least 2.
      cluster: 1, or 2 for pairs of CTAs that share the loading of their tokens.
      splits: Parts into which the contraction is cut; their sums are added by XLA.
      warpgroups: Compute warpgroups per CTA, each with 64 output features: 2, 3 or 4.
      raster: Tiles are visited in stripes of so many along the tokens, back and forth.
      turns: Warpgroups multiply in turns, passed on when products have ``"started"`` or
        ``"finished"`` (``_turns``); None leaves it to chance.
      overlap: W4A8 with scaled sums: a group's product runs while those of the last are scaled.
        For two warpgroups and, with a third set of registers, up to 96 tokens.
      ahead: Without scaled sums: weights of a step are unpacked while the product of the one before
        runs, within pieces of so many steps: 2 or 4; 1 for never.
    """

    columns: int
    stages: int
    cluster: int = 1
    splits: int = 1
    warpgroups: int = 2
    raster: int = 8
    turns: str | None = None
    overlap: bool = False
    ahead: int = 1

    def __post_init__(self) -> None:
        if self.ahead not in (1, 2, 4):
            raise ValueError(f"ahead={self.ahead} must be 1, 2 or 4")
        if self.ahead > 1 and (self.turns is not None or self.overlap):
            raise ValueError(f"ahead={self.ahead} goes without turns and overlap")
        if self.stages <= self.ahead > 1:
            raise ValueError(f"ahead={self.ahead} with stages={self.stages}; it must be less")
        if self.turns not in (None, *TURNS):
            raise ValueError(f"turns={self.turns!r} must be None or one of {', '.join(TURNS)}")
        if self.turns is not None and self.overlap:
            raise ValueError(f"turns={self.turns!r} with overlap=True: choose one of them")
        if not 8 <= self.columns <= 256 or self.columns % 8:
            raise ValueError(f"columns={self.columns} must be a multiple of 8 from 8 to 256")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster={self.cluster} must be 1 or 2")
        if self.warpgroups not in (2, 3, 4):
            raise ValueError(f"warpgroups={self.warpgroups} must be 2, 3 or 4")
        if self.splits < 1 or self.raster < 1:
            raise ValueError(f"splits={self.splits} and raster={self.raster} must be positive")

    @property
    def features(self) -> int:
        """Output features of a CTA's tile."""
        return self.warpgroups * _layout.BLOCK_N

    @property
    def registers(self) -> int:
        """Registers per thread of the compute warpgroups; the memory warpgroup has 40."""
        threads = 128 * (self.warpgroups + 1)
        pool = 65536 // threads // 8 * 8 * (self.warpgroups + 1)
        return (pool - 40) // self.warpgroups // 8 * 8

    @property
    def chunk(self) -> int:
        """Tokens that are written out at once."""
        return next(size for size in (64, 32, 16, 8) if self.columns % size == 0)


def step_k(p: Problem) -> int:
    """Contraction length of one step: 128 bytes of activations."""
    return 128 if p.compute == "int8" else 64


def scaled_sums(p: Problem) -> bool:
    """Whether the sums of groups are scaled, and not the weights."""
    return p.group_size is not None and p.compute != "float16" and not p.whole_scales


def max_columns(p: Problem, warpgroups: int = 2, *, overlap: bool = False) -> int:
    """Tokens of the widest tile: what the registers hold."""
    if overlap:
        return _MAX_OVERLAP_COLUMNS
    if scaled_sums(p) and p.compute == "int8":
        return {2: _MAX_INTEGER_COLUMNS, 3: 112, 4: 64}[warpgroups]
    return {2: _MAX_COLUMNS, 3: 160, 4: 80}[warpgroups]


def stored_dtype(p: Problem) -> DType:
    """Type of a group's scale as the kernel reads it; W4A8 takes that of bfloat16.

    Whole multiples come in bfloat16, which holds those up to 256.
    """
    if p.whole_scales:
        return jnp.dtype(jnp.bfloat16)
    return _codes.stored_dtype("bfloat16" if p.compute == "int8" else p.compute)


def unsupported_reason(p: Problem) -> str | None:
    """Why this kernel cannot compute a product; None if it can."""
    reason = weight_only.weight_unsupported_reason(
        p.k, p.n, kind=p.kind, group_size=p.group_size, zero_point=p.zero_point
    )
    if reason is not None:
        return reason
    if p.n % (2 * _layout.BLOCK_N):
        return f"n={p.n} with many rows; must be a multiple of {2 * _layout.BLOCK_N}"
    if p.m < 1:
        return f"m={p.m} rows; at least one is needed"
    if p.whole_scales and (p.compute != "int8" or p.group_size is None):
        return f"whole scales with {p.compute} activations; they are for groups and int8"
    if p.compute == "int8":
        sizes = (32, 64, 128) if p.whole_scales else (None, 128)
        if p.kind != "int4" or p.group_size not in sizes or p.zero_point:
            return (
                "int8 activations are for int4 weights without zero points, in groups of 128 or, "
                "with whole scales, 32, 64 or 128"
            )
    elif p.compute not in _codes.COMPUTE_DTYPES:
        return f"{p.compute} activations; the kernel takes float16, bfloat16 and int8"
    return None


def _align(size: int) -> int:
    return -(-size // 1024) * 1024


def scale_rows(p: Problem) -> int:
    """Groups whose scales a step needs."""
    return 0 if p.group_size is None else max(1, step_k(p) // p.group_size)


def word_rows(p: Problem) -> int:
    """Rows of 256 words of a weight tile that a step needs."""
    return p.bits * step_k(p) // _layout.BLOCK_K


def _operand_bytes(config: Config, p: Problem) -> int:
    rows = config.features
    parts = (2 if p.zero_point else 1) * scale_rows(p)
    buffers = (
        config.stages * config.warpgroups * p.bits * 8 * step_k(p),
        config.stages * config.columns * 128,
        config.stages * parts * rows * stored_dtype(p).itemsize,
        2 * config.stages * 8 + _pair_barriers(config, p) * 8,
    )
    return sum(map(_align, buffers))


def _pair_barriers(config: Config, p: Problem) -> int:
    """At most: two for each pair of warpgroups and buffer of the output."""
    return 2 * (config.warpgroups // 2) * (config.columns // config.chunk) if p.gated else 0


def _chunk_bytes(config: Config, p: Problem) -> int:
    itemsize = 4 if config.splits > 1 else p.out_itemsize
    return _align(config.chunk * _layout.BLOCK_N * itemsize)


def out_buffers(config: Config, p: Problem) -> int:
    """Buffers, of one chunk each, through which a warpgroup writes out: as many as fit."""
    room = SHARED_MEMORY_BYTES - _operand_bytes(config, p)
    wanted = config.columns // config.chunk
    return max(1, min(wanted, room // (config.warpgroups * _chunk_bytes(config, p))))


def smem_bytes(config: Config, p: Problem) -> int:
    """Shared memory of one CTA in bytes (an upper bound: buffers are counted in 1024 bytes)."""
    out = out_buffers(config, p) * config.warpgroups * _chunk_bytes(config, p)
    return _operand_bytes(config, p) + out


def config_unsupported_reason(config: Config, p: Problem) -> str | None:
    """Why a config does not fit a problem; None if it does."""
    if config.overlap and not (scaled_sums(p) and p.compute == "int8"):
        return "overlap=True; it is for int8 activations and weights with scaled sums"
    if config.ahead > 1 and scaled_sums(p):
        return f"ahead={config.ahead}; it is for products without scaled sums"
    if config.overlap and config.warpgroups != 2:
        return f"overlap=True with warpgroups={config.warpgroups}; two have the registers"
    if config.overlap and config.stages < 3:
        return f"stages={config.stages}; two groups are multiplied while one is waited for"
    widest = max_columns(p, config.warpgroups, overlap=config.overlap)
    if config.columns > widest:
        return (
            f"columns={config.columns}; at most {widest} fit into the registers of "
            f"{config.warpgroups} warpgroups"
        )
    if p.gated and (config.warpgroups % 2 or config.splits > 1):
        return "a gated product needs an even number of warpgroups and one split"
    # Written out eight tokens at a time, wider tiles spill registers.
    if p.gated and config.columns > 40 and config.columns % 16:
        return f"columns={config.columns}; gated products have up to 40 or a multiple of 16"
    if p.n % config.features:
        return f"n={p.n} is no multiple of {config.features}"
    if p.compute == "int8" and config.columns > 24 and config.columns % 16:
        return f"columns={config.columns}; int8 products have 8, 24 or a multiple of 16"
    if config.cluster > 1 and config.columns % 16:
        return f"columns={config.columns}; two CTAs share multiples of 16"
    if config.cluster > 1 and p.n % (2 * config.features):
        return f"n={p.n} is no multiple of {2 * config.features}: no pairs of tiles"
    if p.k % (config.splits * _layout.BLOCK_K):
        return f"k={p.k} cannot be cut into {config.splits} multiples of {_layout.BLOCK_K}"
    size = smem_bytes(config, p)
    if size > SHARED_MEMORY_BYTES:
        return f"{size} bytes of shared memory; a CTA has {SHARED_MEMORY_BYTES}"
    return None


def tile_counts(config: Config, p: Problem) -> tuple[int, int]:
    """Tiles along the features (pairs of tiles for clusters) and along the tokens."""
    return p.n // (config.features * config.cluster), -(-p.m // config.columns)


# Constants of the model below, in cycles of a multiprocessor at 1.7 GHz: fitted to 1,079 times of
# an H200 (shapes of Llama-3.1-8B, 8 to 4096 rows), of which it is off by 11 % (root mean square).
# Its choice takes 2 % longer than the best one measured. An operand in registers costs 17 cycles
# per wgmma beside its columns: 64 tokens take 43 cycles where the tensor core would take 32. W4A8
# was fitted to 218 later times, by hand: it takes more cycles than two warpgroups hide.
_CLOCK = 1.7e9
_MEMORY_BYTES_PER_S = 4.3e12
_LAUNCH_SECONDS = 2.0e-6
_TILE_CYCLES = 2500.0
_WAIT_CYCLES = 85.0
_FP8_CYCLES = 400.0  # unpacking it takes five instructions for two weights, integers take two
_SCALE_CYCLES = 16.0


def estimate_seconds(config: Config, p: Problem) -> float:
    """Time by a simple model, to rank configs: tensor cores, unpacking, and DRAM."""
    tiles_a, tiles_b = tile_counts(config, p)
    waves = -(-tiles_a * tiles_b * config.splits // (_SM_COUNT // config.cluster))
    # Four products of 64 rows per step and warpgroup. The tensor core serves one warpgroup at a
    # time; beside its products, each waits, unpacks and scales sums.
    product = 4 * max(0.4 * config.columns + 17, 34)
    alone = _WAIT_CYCLES + (_FP8_CYCLES if p.kind.startswith("float8") else 0)
    if scaled_sums(p) and p.compute == "int8":
        product = 4 * (0.53 * config.columns + 43)
        alone += _SCALE_CYCLES + 2.5 * config.columns
    elif scaled_sums(p):
        alone += (_SCALE_CYCLES + 0.35 * config.columns) * 64 / (p.group_size or 128)
    step = together = config.warpgroups * product
    if not config.overlap:
        step = max(1.06 * together, 0.66 * product + alone) + 0.15 * min(together, product + alone)
    loaded = config.columns * 128 / config.cluster / 64 + config.warpgroups * p.bits * step_k(p) / 8
    steps = p.k // config.splits // step_k(p)
    # Writing a tile out takes its part of the time in which nothing is multiplied.
    # Gating it takes two more passes through shared memory and one exponential for two sums.
    tile = _TILE_CYCLES + config.columns * (6.6 if config.splits > 1 or p.gated else 3.3)
    compute = waves * (steps * (step + 0.033 * loaded) + tile) / _CLOCK
    written = p.m * (p.n // 2 if p.gated else p.n) * p.out_itemsize
    moved = p.k * p.n * p.bits / 8 + p.m * p.k * 128 / step_k(p) + written
    memory = moved / _MEMORY_BYTES_PER_S
    seconds = _LAUNCH_SECONDS + max(compute, memory) + 0.1 * min(compute, memory)
    if config.splits > 1:
        # Read once more, from the L2 cache.
        seconds += 4 * config.splits * p.m * p.n / 3e12
    return seconds


def _candidates(p: Problem) -> list[Config]:
    found = []
    for overlap in (False, True) if scaled_sums(p) and p.compute == "int8" else (False,):
        warpgroups = (2,) if overlap else (2, 3, 4)
        # With any other number of stages the widest tiles spill registers.
        depths = (12, 8, 4) if overlap else (8, 6, 5, 4, 3, 2)
        choices = itertools.product(_widths(p, overlap), (1, 2, 3, 4, 7, 8), warpgroups)
        for columns, splits, count in choices:
            # Splits only help where there are fewer tiles than multiprocessors.
            if splits > 1 and (p.m > 512 or p.k < splits * 512):
                continue
            for stages in depths:
                config = Config(columns, stages, 1, splits, count, overlap=overlap)
                if config_unsupported_reason(config, p) is None:
                    pair = dataclasses.replace(config, cluster=2)
                    if config_unsupported_reason(pair, p) is None:
                        found.append(pair)
                    found.append(config)
                    break  # the deepest that fits
    return found


def _widths(p: Problem, overlap: bool) -> list[int]:
    """Tokens of a tile that make equal tiles, as few as there must be and somewhat more."""
    widest = max_columns(p, overlap=overlap)
    tokens = -(-p.m // 8) * 8
    least = -(-tokens // widest)
    counts = range(least, least + 8 + least // 2)
    sizes = {-(-tokens // count // unit) * unit for count in counts for unit in (8, 16)}
    return sorted((size for size in sizes if size <= widest), reverse=True)


@functools.lru_cache(maxsize=4096)
def heuristic_config(p: Problem) -> Config:
    """The config that ``estimate_seconds`` likes best, for any supported problem."""
    best = min(_candidates(p), key=lambda config: estimate_seconds(config, p))
    if not scaled_sums(p):
        return (_ahead(best, p) or [best])[0]
    if best.overlap or best.warpgroups > 2:
        return best
    if p.compute == "int8" and best.columns >= 64:
        return dataclasses.replace(best, turns="finished")
    if p.kind == "int4" and best.columns >= 128:
        return dataclasses.replace(best, turns="started")
    return best


def _ahead(config: Config, p: Problem) -> list[Config]:
    """The same with weights unpacked ahead, where that is possible."""
    return [
        dataclasses.replace(config, ahead=ahead)
        for ahead in (4, 2)
        if config.stages > ahead and not scaled_sums(p)
    ]


def search_space(p: Problem) -> list[Config]:
    """Configs worth timing for a problem, for an autotuner: the model's best first."""
    ranked = sorted(_candidates(p), key=lambda config: estimate_seconds(config, p))
    plain = [config for config in ranked if not config.overlap]
    overlapping = [config for config in ranked if config.overlap]
    # The number of a slot is a mask instead of a division with a power of two.
    masked = [dataclasses.replace(c, stages=4) for c in plain[:2] if c.stages in (5, 6)]
    # With few columns or more warpgroups they only wait for each other.
    wide = [c for c in (plain[:2] + masked)[:3] if c.warpgroups == 2 and c.columns >= 64]
    turned = [dataclasses.replace(c, turns=turns) for c in wide for turns in TURNS]
    eager = [c for config in plain[:4] for c in _ahead(config, p)]
    first = [ranked[0], *overlapping[:4], *eager, *plain[:2], *turned, *masked]
    return list(dict.fromkeys(first + ranked))


def matmul(
    x: Array,
    words: Array,
    scales: Array | None,
    column: Array,
    row_scale: Array | None = None,
    *,
    kind: str,
    config: Config | None = None,
    out_dtype: DType = jnp.bfloat16,
    keep_splits: bool = False,
    gated: bool = False,
    rows: int | None = None,
    interpret: bool = False,
) -> Array:
    """``x @ weight`` for a packed weight; arguments and result as of ``weight_only.matmul``.

    Args:
      x: Activations ``(m, k)``, float16, bfloat16, or int8 codes.
      words: Packed codes, int32 ``(k / 128, n / 64, bits, 256)``; for int8 activations packed in
        ``_layout.int8_order``.
      scales: ``(groups, 1, n)`` stored scales, or ``(groups, 2, n)`` scales and offsets, in
        ``stored_dtype``; None without groups. With int8 activations bfloat16 ones are whole.
      column: float32 ``(n,)``, applied to the output.
      row_scale: float32 ``(m,)``, applied to the output; None for none.
      kind: Type of the codes.
      config: How the work is cut up; ``heuristic_config`` by default.
      out_dtype: Result type: float32, bfloat16 or float16.
      keep_splits: Return the parts of the contraction unsummed.
      gated: Gate and up alternate and the result is ``silu(gate) * up``, as there.
      rows: Rows of the result, if those of ``x`` beyond them are padding.
      interpret: Run in the Pallas interpreter, on any device.

    Returns:
      ``(rows, n)`` in ``out_dtype``, ``(rows, n / 2)`` if gated; with ``keep_splits``
      ``(splits, rows, n)``, float32 if there are several.

    Raises:
      NotImplementedError: If the kernel or the config does not support the problem; says why.
      ValueError: If there are not so many rows.
    """
    m, k = x.shape
    n = words.shape[1] * _layout.BLOCK_N
    rows = m if rows is None else rows
    if not 0 < rows <= m:
        raise ValueError(f"rows={rows} must be from 1 to the {m} of x")
    problem = Problem(
        m,
        k,
        n,
        kind,
        group_size=None if scales is None else k // scales.shape[0],
        zero_point=scales is not None and scales.shape[1] == 2,
        compute=x.dtype.name,
        out_itemsize=jnp.dtype(out_dtype).itemsize,
        gated=gated,
        whole_scales=x.dtype == jnp.int8 and scales is not None and scales.dtype == jnp.bfloat16,
    )
    reason = unsupported_reason(problem)
    if reason is None:
        config = heuristic_config(problem) if config is None else config
        reason = config_unsupported_reason(config, problem)
    if reason is not None or config is None:
        raise NotImplementedError(f"weight_only_large.matmul: {reason}")
    # Imported on first use: see weight_only.
    from qjax.pallas_kernels import _weight_only_large_body

    # What TMA loads may reach over an edge but not be larger than the matrix, which has whole tiles
    # of 8 rows. Row scales are read without it.
    padded = -(-max(m, config.columns) // 8) * 8
    x = jnp.pad(x, ((0, padded - m), (0, 0)))
    if row_scale is not None:
        whole = -(-padded // config.columns) * config.columns
        row_scale = jnp.pad(row_scale, (0, max(0, whole - row_scale.shape[0])))
    out = _weight_only_large_body.call(
        x,
        words,
        scales,
        column,
        row_scale,
        config=config,
        problem=dataclasses.replace(problem, m=padded),
        out_rows=rows if rows < config.columns == 8 and not interpret else padded,
        out_dtype=jnp.dtype(out_dtype),
        interpret=interpret,
    )
    out = out[..., :rows, :] if out.shape[-2] > rows else out
    if keep_splits:
        return out if config.splits > 1 else out[None]
    return out.sum(0).astype(out_dtype) if config.splits > 1 else out
