"""W4A16 and W8A16: a few rows of 16-bit activations times a packed weight, on Hopper.

::

  out[m, n] = row_scale[m] * column[n] * sum_k x[m, k] * weight[k, n]
  weight[k, n] = value[k, n]                        without groups; with groups see ``_codes``

For decoding: with ``m <= 64`` rows the time is that of reading the weights once. The product is
taken transposed, ``out.T = weight.T @ x.T``: output features fill the 64 rows of ``wgmma``, the
tokens its narrow side, and the weights go from memory to registers without a detour (``_layout``),
where two or three instructions per pair make them 16-bit numbers (``_codes``, ``_unpack``).

Roles in one thread block (CTA) of ``warpgroups + 1`` warpgroups; it computes
``64 * warpgroups`` output features over ``k / splits`` of the contraction::

  memory warpgroup          words, scales, activations of one step (128 of k) by TMA
      |   ^                 into one of `stages` slots of shared memory
      |   |   ready[slot]: all copies of a step have landed
      v   |   consumed[slot]: every compute warpgroup is done with it
  compute warpgroup i       registers <- 64 x 128 codes -> 16-bit weights
                            accumulator (64, m) += weights @ x[slot].T       (wgmma)
                            last: scale, transpose, copy out by TMA

With ``splits > 1`` the CTAs of one output tile write float32 partial sums ``(splits, m, n)``, which
XLA adds up in a fixed order: results are the same in every run.

Tested on the GPU; without one, compiled for sm_90a and checked in the Pallas interpreter (which
replaces the register unpacking and ``wgmma`` by the same arithmetic in jnp).

References:
  Marlin (arXiv:2408.11743): weights reordered offline, scale and zero point folded into the
  conversion. Machete (vLLM): the same with ``wgmma`` and the transposed product.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax.numpy as jnp

from qjax.pallas_kernels import _codes, _layout
from qjax.typing import Array, DType

MAX_ROWS = 64
SHARED_MEMORY_BYTES = 232448
"""Largest shared memory of one CTA on sm_90."""
_ROWS = (8, 16, 32, 64)
_MEMORY_REGISTERS = 40
SM_COUNT = 132
# How well CTAs of 1 to 4 compute warpgroups use a multiprocessor: more of them share one copy of
# the activations and one memory warpgroup. A guess that ranks configs, to be replaced by a table.
_EFFICIENCY = {1: 0.8, 2: 0.94, 3: 0.97, 4: 1.0}


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut up.

    Attributes:
      warpgroups: Compute warpgroups per CTA, 1 to 4; each has 64 output features.
      stages: Steps of 128 of the contraction in flight, 2 to 16. Powers of two make the slot number
        a mask instead of a division.
      splits: Parts into which the contraction is cut; their sums are added by XLA.
      pipelined: Unpack the next step's weights while ``wgmma`` works on this one's. Needs an even
        number of steps per split, and more registers.
      registers: Registers per thread of the compute warpgroups, a multiple of 8, taken from the
        memory warpgroup; None leaves the choice to the compiler (more CTAs per multiprocessor).
    """

    warpgroups: int
    stages: int
    splits: int = 1
    pipelined: bool = False
    registers: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.warpgroups <= 4:
            # Four: a TMA box, here the scales of all warpgroups, has at most 256 elements.
            raise ValueError(f"warpgroups={self.warpgroups} must be 1, 2, 3 or 4")
        if not 2 <= self.stages <= 16:
            raise ValueError(f"stages={self.stages} must be between 2 and 16")
        if self.splits < 1:
            raise ValueError(f"splits={self.splits} must be positive")
        if self.registers is not None:
            threads = 128 * (self.warpgroups + 1)
            pool = 65536 // threads // 8 * 8 * threads
            wanted = 128 * (self.warpgroups * self.registers + _MEMORY_REGISTERS)
            if self.registers % 8 or self.registers < 24 or wanted > pool:
                # The hardware would wait for registers that never come: a hang without an error.
                raise ValueError(
                    f"registers={self.registers} with warpgroups={self.warpgroups} needs {wanted} "
                    f"registers of a pool of {pool}; use a smaller multiple of 8, or None"
                )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product as the kernel sees it: sizes and types, no arrays.

    Attributes:
      m: Rows of activations.
      k: Contraction length.
      n: Output features.
      kind: Type of the codes, such as ``"int4"``.
      group_size: Rows that share a stored scale; None without groups.
      zero_point: Whether there are stored offsets.
      compute: Type of the activations as the kernel gets them.
      out_itemsize: Bytes of one output.
      gated: Whether the outputs are products ``silu(gate) * up`` of alternate tiles of columns.
      whole_scales: int8 activations only: stored scales are whole multiples of a step per column,
        at most 16, by which the codes are multiplied (``QuantFormat.scale_steps``).
    """

    m: int
    k: int
    n: int
    kind: str
    group_size: int | None = None
    zero_point: bool = False
    compute: str = "float16"
    out_itemsize: int = 2
    gated: bool = False
    whole_scales: bool = False

    @property
    def rows(self) -> int:
        """Rows that the kernel computes: 8, 16, 32 or 64."""
        return next(rows for rows in _ROWS if rows >= self.m)

    @property
    def bits(self) -> int:
        return _codes.CODES[self.kind].bits


def weight_unsupported_reason(
    k: int, n: int, *, kind: str, group_size: int | None, zero_point: bool
) -> str | None:
    """Why a weight cannot be packed for this kernel; None if it can. See ``Problem``."""
    if kind not in _codes.CODES:
        return f"{kind} codes; there are kernels for {', '.join(_codes.CODES)}"
    if k % _layout.BLOCK_K or n % _layout.BLOCK_N or k == 0 or n == 0:
        return f"({k=}, {n=}) must be multiples of ({_layout.BLOCK_K}, {_layout.BLOCK_N})"
    if group_size is not None and group_size not in (32, 64, 128):
        return f"{group_size=}; there are kernels for 32, 64, 128 and one scale per column"
    if group_size in (32, 64) and kind != "int4":
        return f"{group_size=} of {kind} codes; 8-bit codes have groups of 128 or none"
    if zero_point and kind != "int4":
        return f"zero points of {kind} codes; only int4 has them"
    return None


def unsupported_reason(p: Problem) -> str | None:
    """Why this kernel cannot compute a product; None if it can."""
    reason = weight_unsupported_reason(
        p.k, p.n, kind=p.kind, group_size=p.group_size, zero_point=p.zero_point
    )
    if reason is not None:
        return reason
    if not 1 <= p.m <= MAX_ROWS:
        return f"m={p.m} rows; this kernel is for 1 to {MAX_ROWS}"
    if p.compute not in _codes.COMPUTE_DTYPES:
        return f"{p.compute} activations; the kernel takes float16 and bfloat16"
    if p.gated and p.n % (2 * _layout.BLOCK_N):
        return f"n={p.n} columns of gate and up are no multiple of {2 * _layout.BLOCK_N}"
    if p.gated and _max_warpgroups(p) < 2:
        return f"a gated product of {p.rows} rows and groups of {p.group_size} lacks registers"
    return None


def smem_bytes(config: Config, p: Problem) -> int:
    """Shared memory of one CTA in bytes (an upper bound: buffers are counted in 1024 bytes)."""
    groups = 0 if p.group_size is None else _layout.BLOCK_K // p.group_size
    columns = config.warpgroups * _layout.BLOCK_N
    scale_bytes = _codes.stored_dtype(p.compute).itemsize
    buffers = (
        config.stages * config.warpgroups * p.bits * 256 * 4,
        config.stages * groups * (2 if p.zero_point else 1) * columns * scale_bytes,
        config.stages * p.rows * _layout.BLOCK_K * 2,
        p.rows * columns * (4 if config.splits > 1 else p.out_itemsize),
        2 * config.stages * 8,
    )
    return sum(-(-size // 1024) * 1024 for size in buffers)


def config_unsupported_reason(config: Config, p: Problem) -> str | None:
    """Why a config does not fit a problem; None if it does."""
    if p.n % (config.warpgroups * _layout.BLOCK_N):
        return f"n={p.n} is no multiple of {config.warpgroups} * {_layout.BLOCK_N}"
    if p.k % (config.splits * _layout.BLOCK_K):
        return f"k={p.k} cannot be cut into {config.splits} multiples of {_layout.BLOCK_K}"
    if p.gated and (config.warpgroups % 2 or config.splits > 1):
        return "a gated product needs an even number of warpgroups and one split"
    steps = p.k // config.splits // _layout.BLOCK_K
    if config.pipelined and steps % 2:
        return f"pipelined needs an even number of steps, not {steps}"
    if config.warpgroups > _max_warpgroups(p):
        return (
            f"{config.warpgroups} warpgroups have too few registers for {p.rows} rows and groups "
            f"of {p.group_size} in bfloat16; {_max_warpgroups(p)} have enough"
        )
    size = smem_bytes(config, p)
    if size > SHARED_MEMORY_BYTES:
        return f"{size} bytes of shared memory; a CTA has {SHARED_MEMORY_BYTES}"
    return None


def concurrent_groups(rows: int, groups: int) -> int:
    """Groups of a step whose sums are in registers at once: 32 registers per thread for them."""
    return min(groups, max(1, 64 // rows))


def _groups_per_step(p: Problem) -> int:
    return 1 if p.group_size is None else _layout.BLOCK_K // p.group_size


def _pipelining_fits(p: Problem) -> bool:
    """Whether the registers suffice to unpack one step while ``wgmma`` reads another.

    Else ptxas serializes the two (C7512) or spills.
    """
    groups = _groups_per_step(p)
    if p.compute == "bfloat16" and p.group_size is not None:
        return p.rows * groups <= 32
    return p.rows < 64 or groups == 1


def _max_warpgroups(p: Problem) -> int:
    """How many compute warpgroups have enough registers: what ptxas compiles without spilling."""
    if p.compute == "float16" or p.group_size is None:
        return 4
    # The sums of groups beside their total.
    return {(64, 1): 3, (64, 2): 2, (64, 4): 1, (32, 4): 3}.get((p.rows, _groups_per_step(p)), 4)


def crowded(p: Problem) -> bool:
    """Whether a CTA gets fewer warpgroups than it should because registers are short.

    The sums of groups in bfloat16 take as many as the total, which leaves two warpgroups of 64 rows
    instead of four for 4096 x 28672 in groups of 128: 35.5 us on an H200, where four with float16
    weights took 28.0. ``weight_only_large`` has no second set of sums, and four: 33.1 us. Not so
    where splits make up for it: 14336 x 4096 takes 18.7 us with two warpgroups, and 20.8 there.
    """
    warpgroups, splits = _cut(p, _max_warpgroups(p))
    return splits == 1 and _cut(p, 4)[0] > warpgroups


def _cut(p: Problem, most: int) -> tuple[int, int]:
    """The best numbers of warpgroups, at most ``most``, and splits."""
    tiles, steps = p.n // _layout.BLOCK_N, p.k // _layout.BLOCK_K

    def rank(choice: tuple[int, int]) -> tuple[float, int]:
        warpgroups, splits = choice
        ctas = tiles // warpgroups * splits
        waves = -(-ctas // SM_COUNT)
        # All multiprocessors busy to the end; of equals, fewer partial sums.
        return _EFFICIENCY[warpgroups] * ctas / (waves * SM_COUNT), -splits

    # Splits only fill multiprocessors that would idle: beyond one CTA for each they cost more in
    # partial sums than they win in balance. Shorter than eight steps, a split is mostly filling
    # and draining its stages.
    choices = [
        (warpgroups, splits)
        for warpgroups in range(1, most + 1)
        for splits in range(1, 17)
        if tiles % warpgroups == 0
        and not (p.gated and (warpgroups % 2 or splits > 1))
        and steps % splits == 0
        and (splits == 1 or steps // splits >= 8 and tiles // warpgroups * splits <= SM_COUNT)
    ]
    return max(choices, key=rank)


def heuristic_config(p: Problem) -> Config:
    """A config for any supported problem; each branch says what decides it."""
    warpgroups, splits = _cut(p, _max_warpgroups(p))
    steps = p.k // _layout.BLOCK_K
    # Eight-bit weights wait for memory alone; with four bits the arithmetic takes as long, and
    # four warpgroups (one CTA per multiprocessor anyway) have the registers to overlap the two.
    even = (steps // splits) % 2 == 0
    pipelined = p.bits == 4 and warpgroups == 4 and even and _pipelining_fits(p)
    # Deep enough to cover the latency of memory; a split too short for eight stages would wait to
    # fill them.
    deepest = 8 if p.bits == 4 and splits == 1 else 4
    for stages in (deepest, 4, 3, 2):
        config = Config(warpgroups, stages, splits, pipelined, 104 if pipelined else None)
        if config_unsupported_reason(config, p) is None:
            return config
    raise AssertionError("two stages fit for every legal argument")


def search_space(p: Problem) -> list[Config]:
    """Configs worth timing for a problem, for an autotuner: the heuristic's neighbours first."""
    best = heuristic_config(p)
    pipelining = (False, True) if _pipelining_fits(p) else (False,)
    product = itertools.product((1, 2, 3, 4), (2, 3, 4, 6, 8), (1, 2, 4, 7, 8), pipelining)
    configs = (
        Config(
            warpgroups, stages, splits, pipelined, 104 if pipelined and warpgroups == 4 else None
        )
        for warpgroups, stages, splits, pipelined in product
    )
    found = [config for config in configs if config_unsupported_reason(config, p) is None]

    def distance(config: Config) -> float:
        """In doublings of a number; overlapping counts as one."""
        numbers = (
            (config.warpgroups, best.warpgroups),
            (config.stages, best.stages),
            (config.splits, best.splits),
        )
        doublings = sum(abs(math.log2(a / b)) for a, b in numbers)
        return doublings + (config.pipelined != best.pipelined)

    return sorted(found, key=distance)


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
    interpret: bool = False,
) -> Array:
    """``x @ weight`` for a packed weight.

    Args:
      x: Activations ``(m, k)``, float16 or bfloat16, ``m <= 64``.
      words: Packed codes, int32 ``(k / 128, n / 64, bits, 256)``.
      scales: ``(groups, 1, n)`` stored scales, or ``(groups, 2, n)`` scales and offsets, in
        ``_codes.stored_dtype`` of the type of ``x``; None without groups.
      column: float32 ``(n,)``, applied to the output: the whole scale without groups, else what
        ``_codes.split_scale`` left of it.
      row_scale: float32 ``(m,)``, applied to the output; None for none.
      kind: Type of the codes.
      config: How the work is cut up; ``heuristic_config`` by default.
      out_dtype: Result type: float32, bfloat16 or float16.
      keep_splits: Leave the partial sums of the splits to the caller.
      gated: Tiles of 64 columns belong alternately to ``gate`` and ``up``; the result is
        ``silu(gate) * up``, of both rounded to ``out_dtype``. ``n`` is a multiple of 128.
      interpret: Run in the Pallas interpreter, on any device.

    Returns:
      ``(m, n)`` in ``out_dtype``, or ``(m, n / 2)`` if gated. With ``keep_splits``,
      ``(1, m, n)`` of it, or the float32 partial sums ``(splits, m, n)``.

    Raises:
      NotImplementedError: If the kernel or the config does not support the problem; says why.
    """
    m, k = x.shape
    n = words.shape[1] * _layout.BLOCK_N
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
    )
    reason = unsupported_reason(problem)
    if reason is None:
        config = heuristic_config(problem) if config is None else config
        reason = config_unsupported_reason(config, problem)
    if reason is not None or config is None:
        raise NotImplementedError(f"weight_only.matmul: {reason}")
    # Imported on first use: Mosaic GPU takes a third of a second to import and is not part of
    # every jaxlib.
    from qjax.pallas_kernels import _weight_only_body

    # TMA cuts off what is beyond the last row, in steps of 8. The interpreter does not.
    pad = problem.rows - m if interpret else -m % 8 if m > 8 else 0
    if pad:
        x = jnp.pad(x, ((0, pad), (0, 0)))
    if row_scale is not None and problem.rows > m:
        row_scale = jnp.pad(row_scale, (0, problem.rows - m))
    out = _weight_only_body.call(
        x,
        words,
        scales,
        column,
        row_scale,
        rows=problem.rows,
        kind=kind,
        config=config,
        out_dtype=jnp.dtype(out_dtype),
        gated=gated,
        interpret=interpret,
    )
    if keep_splits:
        out = out if config.splits > 1 else out[None]
    elif config.splits > 1:
        out = out.sum(0).astype(out_dtype)
    return out[..., :m, :] if pad else out
