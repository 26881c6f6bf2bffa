"""W8A8: 8-bit activations times 8-bit weights (fp8 x fp8, int8 x int8), on Hopper.

::

  out[m, n] = x_scale[m] * w_scale[n] * sum_k x[m, k] * weight[n, k]
  out[m, n] = sum_b x_scale[b, m] * w_scale[n / 128, b] * sum_{k in b} x[m, k] * weight[n, k]

(a scale per token and per output feature, or per 128 of the contraction too). With ``groups``,
for ``w4a8``, a third scale multiplies each sum over 128 of the contraction:

  out[m, n] = x_scale[m] * w_scale[n] * sum_b g_scale[b, n] * sum_{k in b} x[m, k] * weight[n, k]

``wgmma`` wants both 8-bit operands with the contraction contiguous, so the weight is stored
transposed, ``(n, k)``. It has a side of 64 rows and one of 8 to 256 columns. With many tokens these
are the rows; with few, output features are (``swap``), and the tokens are the narrow side.

Three warpgroups in one thread block (CTA) per multiprocessor, which work through output tiles until
none is left::

  memory warpgroup        both operands of one step (128 of k) by TMA into one of `stages` slots;
      |   ^               with the first step of a tile its scales. Runs ahead into the next tile
      |   |               while the others write out this one.
      |   |   ready[slot], consumed[slot]: as in weight_only
      v   |
  compute warpgroup 0, 1  accumulator (rows, columns) += a[slot] @ b[slot].T        (wgmma)
                          last: scale, round, write out by TMA

With ``cluster`` two CTAs whose tiles share their rows load half of them each, for both (multicast).
Tiles may reach over the edges of the matrices: TMA reads zeros there and writes nothing.

The accumulator of Hopper's fp8 tensor cores keeps only some 14 bits: relative errors of 1.3e-3 for
k = 4096 and 2.9e-3 for 14336, measured on an H200, where rounding the operands to fp8 costs 2.6e-2.
So per-channel products do without the remedy, ``promote``: each step's product is added to float32
sums by ordinary instructions. Block scales need that anyway.

With ``splits > 1`` parts of the contraction become float32 partial sums ``(splits, m, n)``, scales
included, which XLA adds in a fixed order: results are the same in every run.

References:
  CUTLASS 3 (persistent cooperative kernels, rasterization); DeepGEMM (promotion every 128 of k).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax.numpy as jnp

from qjax.pallas_kernels.weight_only import SHARED_MEMORY_BYTES
from qjax.typing import Array, DType

BLOCK_K = 128
"""Contraction length of one step, and of a scale block."""
KINDS = ("float8_e4m3fn", "float8_e5m2", "int8")
WARPGROUPS = 2
_SM_COUNT = 132
_MAX_SCALE_BLOCKS = 256  # the extent of a TMA box


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut up.

    Attributes:
      rows: Rows of a warpgroup's tile, 64 or 128; the CTA has two of them.
      columns: Columns of the tile, a multiple of 8 up to 256.
      stages: Steps in flight, at least 2.
      swap: Rows are output features and columns tokens; otherwise the other way round.
      splits: Parts into which the contraction is cut; their sums are added by XLA.
      cluster: 1, or 2 for pairs of CTAs that share the loading of their common rows.
      promote: Add each step's product to float32 sums outside the tensor core.
      raster: Tiles are visited in stripes of so many along the columns, back and forth, so that
        those at work at the same time share operands in the L2 cache.
    """

    rows: int
    columns: int
    stages: int
    swap: bool = False
    splits: int = 1
    cluster: int = 1
    promote: bool = False
    raster: int = 8

    def __post_init__(self) -> None:
        if self.rows not in (64, 128):
            raise ValueError(f"rows={self.rows} must be 64 or 128")
        if not 8 <= self.columns <= 256 or self.columns % 8:
            raise ValueError(f"columns={self.columns} must be a multiple of 8 from 8 to 256")
        # Accumulators and, if promoted, the sums; ptxas needs the rest of 240 registers.
        registers = self.rows * self.columns // 128 * (2 if self.promote else 1)
        if registers > 192:
            raise ValueError(
                f"rows={self.rows}, columns={self.columns}, promote={self.promote} need "
                f"{registers} registers per thread for sums; there are 192: use a smaller tile"
            )
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2")
        if self.splits < 1 or self.raster < 1:
            raise ValueError(f"splits={self.splits} and raster={self.raster} must be positive")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster={self.cluster} must be 1 or 2")

    @property
    def chunk(self) -> int:
        """Columns that are written out at once (without ``swap``)."""
        return next(size for size in (64, 32, 16, 8) if self.columns % size == 0)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product as the kernel sees it: sizes and types, no arrays.

    Attributes:
      m: Rows of activations.
      k: Contraction length.
      n: Output features.
      kind: Type of the weight's codes, one of ``KINDS``.
      x_kind: Type of the activations' codes; that of the weight by default.
      blocks: Scales per 128 of the contraction and, of the weight, 128 output features; otherwise
        per row and per output feature.
      out_itemsize: Bytes of one output.
      groups: A scale per 128 of the contraction and output feature besides (int8).
    """

    m: int
    k: int
    n: int
    kind: str
    x_kind: str = ""
    blocks: bool = False
    out_itemsize: int = 2
    groups: bool = False

    def __post_init__(self) -> None:
        if not self.x_kind:
            object.__setattr__(self, "x_kind", self.kind)

    @property
    def steps(self) -> int:
        return self.k // BLOCK_K


def weight_unsupported_reason(k: int, n: int, *, kind: str, blocks: bool) -> str | None:
    """Why a weight cannot be packed for this kernel; None if it can. See ``Problem``."""
    if kind not in KINDS:
        return f"{kind} codes; there are W8A8 kernels for {', '.join(KINDS)}"
    if k % BLOCK_K or n % 64 or k == 0 or n == 0:
        return f"({k=}, {n=}) must be multiples of ({BLOCK_K}, 64)"
    if blocks and kind == "int8":
        return "int8 blocks; there are kernels for block scales of fp8 codes"
    if blocks and n < BLOCK_K:
        return f"{n=} with block scales; at least {BLOCK_K}"
    if blocks and k > BLOCK_K * _MAX_SCALE_BLOCKS:
        return f"{k=} with block scales; at most {BLOCK_K * _MAX_SCALE_BLOCKS}"
    return None


def unsupported_reason(p: Problem) -> str | None:
    """Why this kernel cannot compute a product; None if it can."""
    reason = weight_unsupported_reason(p.k, p.n, kind=p.kind, blocks=p.blocks)
    if reason is not None:
        return reason
    if p.x_kind not in KINDS or (p.x_kind == "int8") != (p.kind == "int8"):
        return f"{p.x_kind} activations with {p.kind} weights"
    if p.m < 1:
        return f"m={p.m} rows; at least one is needed"
    if p.groups and p.kind != "int8":
        return f"group scales of {p.kind} codes; they are for int8"
    return None


def out_buffers(config: Config, p: Problem) -> int:
    """Buffers, of one chunk each, through which a warpgroup writes out: as many as fit."""
    size, wanted = _out_chunk(config, p)
    room = SHARED_MEMORY_BYTES - _operand_bytes(config, p)
    return max(1, min(wanted, room // (WARPGROUPS * _align(size))))


def _align(size: int) -> int:
    return -(-size // 1024) * 1024


def _out_chunk(config: Config, p: Problem) -> tuple[int, int]:
    """``(bytes, count)`` of the chunks of one warpgroup's tile."""
    itemsize = 4 if config.splits > 1 else p.out_itemsize
    if config.swap:
        return 64 * config.columns * itemsize, config.rows // 64
    return config.rows * config.chunk * itemsize, config.columns // config.chunk


def scale_columns(columns: int) -> int:
    """Scales copied for so many columns: copies by TMA begin at multiples of 128 bytes."""
    return -(-columns // 32) * 32


def _operand_bytes(config: Config, p: Problem) -> int:
    rows = WARPGROUPS * config.rows
    buffers = [
        config.stages * rows * BLOCK_K,
        config.stages * config.columns * BLOCK_K,
        2 * config.stages * 8 + 64,
    ]
    if p.blocks:
        tokens = config.columns if config.swap else rows
        features = rows if config.swap else config.columns
        blocks = max(1, features // 128)
        buffers += [config.stages * scale_columns(tokens) * 4, 2 * blocks * padded_steps(p.k) * 4]
    else:
        buffers += [2 * rows * 4, 2 * scale_columns(config.columns) * 4]
    if p.groups:
        buffers.append(config.stages * rows * 4)
    return sum(map(_align, buffers))


def padded_steps(k: int) -> int:
    """Columns of the weight's block scales, padded likewise."""
    return scale_columns(k // BLOCK_K)


def smem_bytes(config: Config, p: Problem) -> int:
    """Shared memory of one CTA in bytes (an upper bound: buffers are counted in 1024 bytes)."""
    out = out_buffers(config, p) * WARPGROUPS * _align(_out_chunk(config, p)[0])
    return _operand_bytes(config, p) + out


def config_unsupported_reason(config: Config, p: Problem) -> str | None:
    """Why a config does not fit a problem; None if it does."""
    if p.steps % config.splits:
        return f"k={p.k} cannot be cut into {config.splits} multiples of {BLOCK_K}"
    features = WARPGROUPS * config.rows if config.swap else config.columns
    if features > p.n:
        return f"n={p.n} is less than the tile's {features} features"
    if p.kind == "int8" and config.columns > 24 and config.columns % 16:
        return f"columns={config.columns}; int8 products have 8, 24 or a multiple of 16"
    if p.blocks and not config.promote:
        return "block scales need promote=True"
    if config.promote and p.kind == "int8" and not p.groups:
        return "promote is for fp8; int8 sums are exact"
    if p.groups and not (config.promote and config.swap and config.rows == 64):
        return "group scales need promote=True, swap=True and rows=64"
    if p.groups and config.columns > 112:
        return f"columns={config.columns}; registers hold three sums of up to 112"
    if p.groups and config.stages < 3:
        return f"stages={config.stages}; two groups are multiplied while one is waited for"
    if p.blocks and features % 128:
        return f"block scales need tiles of whole blocks, not {features} features"
    if p.blocks and config.swap and config.rows * config.columns // 64 + config.columns // 4 > 200:
        return f"too many registers for sums and scales of {config.rows} x {config.columns}"
    size = smem_bytes(config, p)
    if size > SHARED_MEMORY_BYTES:
        return f"{size} bytes of shared memory; a CTA has {SHARED_MEMORY_BYTES}"
    return None


def tile_counts(config: Config, p: Problem) -> tuple[int, int]:
    """Tiles along rows and along columns (pairs of tiles for clusters)."""
    rows, columns = (p.n, p.m) if config.swap else (p.m, p.n)
    wide = config.columns * config.cluster
    return -(-rows // (WARPGROUPS * config.rows)), -(-columns // wide)


# The model that ranks configs, in cycles of a multiprocessor at 1.7 GHz. Measured on an H200: two
# warpgroups of 128x128 run at 1490 TFLOP/s; a tile costs some 1.2 us besides its steps.
_CLOCK = 1.7e9
_MEMORY_BYTES_PER_S = 4.3e12
_SM_BYTES_PER_S = 4.0e10
_TILE_CYCLES = 1200
_SPLIT_SECONDS = 2.0e-6


def estimate_seconds(config: Config, p: Problem) -> float:
    """Time by a simple model, to rank configs: tensor cores, shared memory, and DRAM."""
    rows = WARPGROUPS * config.rows
    # Per step: one m64nNk32 takes N / 2 cycles, and reads (64 + N) * 32 bytes of shared memory at
    # 128 bytes per cycle, which TMA's writes share.
    products = 4 * WARPGROUPS * config.rows // 64
    matrix = products * max(config.columns / 2, 16)
    traffic = (products * (64 + config.columns) * 32 + (rows + config.columns) * BLOCK_K) / 128
    # What the L2 cache has to deliver: the least certain part, a small push towards clusters.
    shared = (rows / config.cluster + config.columns) * BLOCK_K / 64
    step = max(matrix, traffic * 0.9) * 1.1 + 0.1 * shared
    if p.groups:
        step = max(step, 2 * (60 + 1.25 * config.columns)) * 1.05
    elif config.promote:
        step = max(step * 1.1, step + config.rows * config.columns / 128)
    tiles_a, tiles_b = tile_counts(config, p)
    units = _SM_COUNT // config.cluster
    waves = -(-tiles_a * tiles_b * config.splits // units)
    steps = p.steps // config.splits
    compute = waves * (steps * step + _TILE_CYCLES) / _CLOCK
    moved = p.k * p.n + p.m * p.k + p.m * p.n * p.out_itemsize
    # A multiprocessor without work loads nothing; with few stages it waits for what it loads.
    busy = min(1.0, tiles_a * tiles_b * config.splits / units)
    in_flight = config.stages * (rows + config.columns) * BLOCK_K * _SM_COUNT * busy
    rate = min(_MEMORY_BYTES_PER_S, in_flight / 1.0e-6, busy * _SM_COUNT * _SM_BYTES_PER_S)
    seconds = max(compute, moved / rate) + 0.1 * min(compute, moved / rate)
    if config.splits > 1:
        # Written in float32 and read once more, by one more kernel.
        seconds += _SPLIT_SECONDS + 8 * config.splits * p.m * p.n / _MEMORY_BYTES_PER_S
    return seconds


def _candidates(p: Problem) -> list[Config]:
    if p.groups:
        return _group_candidates(p)
    found = []
    tokens = -(-p.m // 8) * 8
    promote = p.blocks
    for swap, rows in itertools.product((False, True), (64, 128)):
        widest = min(256, (80 if promote else 192) * 128 // rows)
        if swap and tokens <= 1024:
            # All tokens at once, or in as few equal tiles as there must be.
            parts = -(-tokens // widest)
            unit = 8 if tokens <= 24 else 16
            wide: tuple[int, ...] = (-(-tokens // parts // unit) * unit,)
        elif swap:
            # 160 tokens are the most whose scales fit into registers beside promoted sums.
            wide = (128, 144, 160) if promote and rows == 64 else ()
        elif tokens > 64:
            wide = (64, 128, 192) if promote else (64, 96, 112, 128, 160, 176, 192, 256)
        else:
            wide = ()
        for columns, splits in itertools.product(wide, (1, 2, 3, 4, 6, 7, 8, 12, 16)):
            # Splits only help where there are fewer tiles than multiprocessors.
            if splits > 1 and (p.m > 512 or p.steps // splits < 4):
                continue
            if rows * columns // 128 * (2 if promote else 1) > 192:
                continue
            for stages in (12, 8, 6, 4, 3, 2):
                config = Config(rows, columns, stages, swap, splits, promote=promote)
                if config_unsupported_reason(config, p) is None:
                    found.append(config)
                    if splits == 1 and p.m > 512:
                        found.append(dataclasses.replace(config, cluster=2))
                    break  # the deepest that fits
    return found


def _group_candidates(p: Problem) -> list[Config]:
    found = []
    for columns, splits in itertools.product((112, 96, 80, 64), (1, 2, 3, 4, 7)):
        # Splits only help where there are fewer tiles than multiprocessors.
        if splits > 1 and (p.m > 512 or p.steps // splits < 4):
            continue
        for stages in (8, 6, 5, 4, 3):
            # All tiles of tokens meet a tile of the weight while the L2 cache has it.
            config = Config(64, columns, stages, True, splits, promote=True, raster=16)
            if config_unsupported_reason(config, p) is None:
                found += [config, dataclasses.replace(config, cluster=2)]
                break  # the deepest that fits
    return found


@functools.lru_cache(maxsize=4096)
def heuristic_config(p: Problem) -> Config:
    """The config that ``estimate_seconds`` likes best, for any supported problem."""
    found = _candidates(p)
    if not found:
        # Narrow weights: the smallest tile always fits.
        return Config(64, 128 if p.blocks else 64, 4, promote=p.blocks)
    return min(found, key=lambda config: estimate_seconds(config, p))


def search_space(p: Problem) -> list[Config]:
    """Configs worth timing for a problem, for an autotuner: the model's best first."""
    found = sorted(_candidates(p), key=lambda config: estimate_seconds(config, p))
    if p.m <= 64:  # one stripe
        return found[:40]
    others = [dataclasses.replace(config, raster=r) for config in found[:2] for r in (4, 16)]
    return found[:4] + others + found[4:40]


def matmul(
    x: Array,
    weight: Array,
    x_scale: Array,
    w_scale: Array,
    g_scale: Array | None = None,
    *,
    config: Config | None = None,
    out_dtype: DType = jnp.bfloat16,
    keep_splits: bool = False,
    rows: int | None = None,
    interpret: bool = False,
) -> Array:
    """``x @ weight.T`` times the scales.

    Args:
      x: Codes of activations ``(m, k)``: E4M3, E5M2 or int8.
      weight: Codes ``(n, k)``: int8 with int8 activations, E4M3 or E5M2 with either.
      x_scale: float32 ``(m,)``, or ``(k / 128, m)`` with block scales. There may be more than
        ``m``: room for what is read at once, which is added here otherwise.
      w_scale: float32 ``(n,)``, or ``(ceil(n / 128), k / 128)`` with block scales.
      g_scale: float32 ``(k / 128, n)`` scales of sums over 128 of the contraction, which are below
        ``2**21`` (int8, no block scales); None for none.
      config: How the work is cut up; ``heuristic_config`` by default.
      out_dtype: Result type: float32, bfloat16 or float16.
      keep_splits: Leave the sum over splits to the caller.
      rows: Rows of the result, if those of ``x`` beyond them are padding.
      interpret: Run in the Pallas interpreter, on any device.

    Returns:
      ``(rows, n)`` in ``out_dtype``. With ``keep_splits`` ``(s, rows, n)``: one of ``out_dtype``,
      or several of float32 to be summed.

    Raises:
      NotImplementedError: If the kernel or the config does not support the problem; says why.
      ValueError: If there are not so many rows.
    """
    m, k = x.shape
    n = weight.shape[0]
    rows = m if rows is None else rows
    if not 0 < rows <= m:
        raise ValueError(f"rows={rows} must be from 1 to the {m} of x")
    problem = Problem(
        m,
        k,
        n,
        weight.dtype.name,
        x.dtype.name,
        blocks=w_scale.ndim == 2,
        out_itemsize=jnp.dtype(out_dtype).itemsize,
        groups=g_scale is not None,
    )
    reason = unsupported_reason(problem)
    if reason is None:
        config = heuristic_config(problem) if config is None else config
        reason = config_unsupported_reason(config, problem)
    if reason is not None or config is None:
        raise NotImplementedError(f"w8a8.matmul: {reason}")
    # Imported on first use: see weight_only.
    from qjax.pallas_kernels import _w8a8_body

    # What TMA loads may reach over an edge but not be larger than the matrix, which has whole tiles
    # of 8 rows.
    tokens = config.columns if config.swap else WARPGROUPS * config.rows
    padded = -(-max(m, tokens) // 8) * 8
    x = jnp.pad(x, ((0, padded - m), (0, 0)))
    scales = max(padded, scale_columns(tokens))
    room = max(0, scales - x_scale.shape[-1])
    x_scale = jnp.pad(x_scale, (*((0, 0),) * (x_scale.ndim - 1), (0, room)))
    if problem.blocks:
        w_scale = jnp.pad(w_scale, ((0, 0), (0, padded_steps(k) - k // BLOCK_K)))
    few = config.swap and rows < config.columns == 8
    out = _w8a8_body.call(
        x,
        weight,
        x_scale,
        w_scale,
        g_scale,
        config=config,
        problem=dataclasses.replace(problem, m=padded),
        out_rows=rows if few and not interpret else padded,
        out_dtype=jnp.dtype(out_dtype),
        interpret=interpret,
    )
    out = out[..., :rows, :] if out.shape[-2] > rows else out
    if keep_splits:
        return out if config.splits > 1 else out[None]
    return out.sum(0).astype(out_dtype) if config.splits > 1 else out
