"""Many rows: a packed weight becomes a 16-bit matrix once, which a library then multiplies by.

::

  matrix[n, k] = round(weight[k, n])          this kernel; weight as ``weight_only`` defines it
  out[m, n] = row_scale[m] * sum_k x[m, k] * matrix[n, k]      XLA, that is cuBLAS

It is for what ``weight_only_large`` does not take, an odd number of tiles of 64 columns, and for
what a measured table says. On an H200 that kernel was faster wherever both were timed: by 2 to 10 %
with 4096 rows of INT4 in groups of 128, INT8 and FP8 and the four shapes of Llama-3.1-8B, by more
with fewer rows, because reading the codes and writing the matrix take the same time for any number.

The matrix is ``(n, k)`` because a warpgroup holds rows of output features (``_layout``), of which
it writes whole ones; cuBLAS takes either order. It exists beside the weight while the product
runs: ``2 * k * n`` bytes, 235 MB for gate and up of an 8B model. (In pieces of columns that stay in
the L2 cache it would be written and read there, which spares some 30 us of those 70; but joining
the pieces' results moves ``4 * m * n`` bytes, 110 us for 4096 rows.)

One warpgroup is a thread block (CTA), without roles; several CTAs per multiprocessor overlap::

  words of `steps` tiles, 64 features by 128 of k        registers, 128-bit loads, all at once
  per tile: codes -> numbers -> times scale, float32 -> 16 bits -> shared memory -> TMA

Each value is the code less its zero point, exact, times the whole scale in float32, rounded to the
type of the activations. (The float32 product is exact too where scales come from 16 bits. Of
weights packed for float16 with zero points it is the float16 weight of the other kernels, scaled by
a power of two.) XLA's form for many rows multiplies by the same numbers. Scales of columns are
multiplied in as well: applied to the result they would be exact, at the price of a float32 result
in memory, 8 bytes per element and a sixth of the product's time for ``k = 4096``.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from qjax.pallas_kernels import _codes, _layout, weight_only
from qjax.pallas_kernels.weight_only import SHARED_MEMORY_BYTES, Problem
from qjax.typing import Array, DType

MIN_ROWS = 256
"""With fewer rows the product takes no longer than writing the matrix."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut up.

    Attributes:
      steps: Weight tiles, of 128 of the contraction, that a CTA makes: 1, 2, 4 or 8.
      buffers: Tiles in shared memory on their way out, at most ``steps``.
    """

    steps: int = 4
    buffers: int = 2

    def __post_init__(self) -> None:
        if self.steps not in (1, 2, 4, 8):
            # Loaded at once, the words of eight tiles are 64 registers per thread (int4).
            raise ValueError(f"steps={self.steps} must be 1, 2, 4 or 8")
        if not 1 <= self.buffers <= self.steps:
            raise ValueError(f"buffers={self.buffers} must be from 1 to steps={self.steps}")


def unsupported_reason(p: Problem) -> str | None:
    """Why this path cannot compute a product, or never should; None if it can."""
    reason = weight_only.weight_unsupported_reason(
        p.k, p.n, kind=p.kind, group_size=p.group_size, zero_point=p.zero_point
    )
    if reason is not None:
        return reason
    if p.compute not in _codes.COMPUTE_DTYPES:
        return f"{p.compute} activations; the matrix is float16 or bfloat16"
    if p.gated:
        return "a gated product"
    if p.m < MIN_ROWS:
        return f"m={p.m} rows; dequantizing first is for {MIN_ROWS} or more"
    return None


def smem_bytes(config: Config) -> int:
    """Shared memory of one CTA in bytes."""
    return config.buffers * _layout.BLOCK_N * _layout.BLOCK_K * 2


def config_unsupported_reason(config: Config, p: Problem) -> str | None:
    """Why a config does not fit a problem; None if it does."""
    if p.k % (config.steps * _layout.BLOCK_K):
        return f"k={p.k} is no multiple of {config.steps} * {_layout.BLOCK_K}"
    if config.steps * p.bits > 32:
        return f"steps={config.steps} of {p.bits}-bit codes take too many registers"
    size = smem_bytes(config)
    if size > SHARED_MEMORY_BYTES:
        return f"{size} bytes of shared memory; a CTA has {SHARED_MEMORY_BYTES}"
    return None


def heuristic_config(p: Problem) -> Config:
    """A config for any supported problem.

    26 KB per multiprocessor must be on their way to memory, one tile and a half; two buffers in
    each of several CTAs are more. The words of all steps are loaded at once: 4 to 8 KB per CTA.
    """
    return next(c for c in search_space(p) if c.buffers == min(2, c.steps))


def search_space(p: Problem) -> list[Config]:
    """Configs worth timing for a problem: the expected best first."""
    steps = (2, 4, 1, 8) if p.bits == 8 else (4, 2, 8, 1)
    configs = [Config(s, b) for s in steps for b in (2, 1, 4) if b <= s]
    return [c for c in configs if config_unsupported_reason(c, p) is None]


def dequantize(
    words: Array,
    scales: Array | None,
    column: Array,
    *,
    kind: str,
    dtype: DType,
    alternating: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """The values of a packed weight.

    Args:
      words: Packed codes, int32 ``(k / 128, n / 64, bits, 256)``.
      scales: ``(groups, 1, n)`` stored scales, or ``(groups, 2, n)`` scales and offsets, float16
        or, of weights packed for bfloat16, float32; None without groups.
      column: float32 ``(n,)``: the whole scale without groups, else what ``_codes.split_scale``
        left of it.
      kind: Type of the codes.
      dtype: Type of the result, float16 or bfloat16.
      alternating: Tiles of 64 columns of the left and the right half take turns in all operands;
        the result has them in order.
      config: How the work is cut up; ``heuristic_config`` by default.
      interpret: Run in the Pallas interpreter, on any device.

    Returns:
      ``(n, k)`` in ``dtype``.

    Raises:
      NotImplementedError: If the config does not fit; says why.
    """
    problem = _problem(MIN_ROWS, words, scales, kind, dtype)
    reason = unsupported_reason(problem)
    if reason is None:
        config = heuristic_config(problem) if config is None else config
        reason = config_unsupported_reason(config, problem)
    if reason is not None or config is None:
        raise NotImplementedError(f"dequantize.dequantize: {reason}")
    # Imported on first use: see weight_only.
    from qjax.pallas_kernels import _dequantize_body

    return _dequantize_body.call(
        words,
        scales,
        column,
        kind=kind,
        config=config,
        dtype=jnp.dtype(dtype),
        alternating=alternating,
        interpret=interpret,
    )


def _problem(m: int, words: Array, scales: Array | None, kind: str, dtype: DType) -> Problem:
    k, n = words.shape[0] * _layout.BLOCK_K, words.shape[1] * _layout.BLOCK_N
    if scales is None:
        return Problem(m, k, n, kind, compute=jnp.dtype(dtype).name)
    compute = "bfloat16" if scales.dtype == jnp.float32 else scales.dtype.name
    return Problem(m, k, n, kind, k // scales.shape[0], scales.shape[1] == 2, compute)


def matmul(
    x: Array,
    words: Array,
    scales: Array | None,
    column: Array,
    *,
    kind: str,
    config: Config | None = None,
    out_dtype: DType = jnp.bfloat16,
    alternating: bool = False,
    keep_splits: bool = False,
    interpret: bool = False,
) -> Array:
    """``x @ weight`` for a packed weight, by way of its 16-bit matrix.

    Args:
      x: Activations ``(m, k)``, float16 or bfloat16, which the matrix becomes too; ``m`` at least
        ``MIN_ROWS``.
      out_dtype: Result type: float32, bfloat16 or float16.
      keep_splits: Put the axis of splits, of which there are none, in front.
      words, scales, column, kind, config, alternating, interpret: See ``dequantize``.

    Returns:
      ``(m, n)`` in ``out_dtype``; with ``keep_splits`` ``(1, m, n)``.

    Raises:
      NotImplementedError: If this path or the config does not support the problem; says why.
    """
    problem = _problem(x.shape[0], words, scales, kind, x.dtype)
    reason = unsupported_reason(problem)
    if reason is not None:
        raise NotImplementedError(f"dequantize.matmul: {reason}")
    # The matrix must not be made before the product is due: made early, as XLA may where nothing
    # holds it back (before a loop over chunks of a prompt, say), those of all layers lie in memory.
    x, words = lax.optimization_barrier((x, words))
    matrix = dequantize(
        words,
        scales,
        column,
        kind=kind,
        dtype=x.dtype,
        alternating=alternating,
        config=config,
        interpret=interpret,
    )
    # Sums are float32 in any case. Asked for in 16 bits, they are rounded inside the product.
    dims = (((1,), (1,)), ((), ()))
    out = lax.dot_general(x, matrix, dims, preferred_element_type=jnp.dtype(out_dtype))
    return out[None] if keep_splits else out
