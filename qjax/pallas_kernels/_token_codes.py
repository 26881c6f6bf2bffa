"""Codes of one token's values and their scales, inside a kernel that has the row in registers.

The arithmetic is that of ``qjax.quantize`` for a symmetric format with one scale per token, or per
128 values of one, as XLA compiles it, bit for bit: a scale is the largest finite magnitude times
the rounded reciprocal of the format's bound, 1 where all are zeros; an infinity saturates, a NaN
becomes 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.typing import Array, DType

KINDS = ("float8_e4m3fn", "float8_e5m2", "int8")
BLOCK = 128
"""Values per scale, where there are several of a token."""
MAX_ROWS = 256
"""Where there are no codes. For them XLA reads the values twice, with any number of rows."""
_THREADS = 128
_SM_COUNT = 132
_TINY = float(np.finfo(np.float32).tiny)
# Adding it leaves an integer of up to 22 bits, rounded to nearest even, in the low bits of the sum.
_ROUND = 1.5 * 2.0**23


def unsupported_reason(rows: int, dtype: DType, kind: str | None, blocks: bool) -> str | None:
    """Why no kernel gives codes of so many rows of 16-bit values; None if there are such.

    Args:
      rows: Tokens.
      dtype: Type of the values.
      kind: Type of the codes; None for kernels that leave values as they are.
      blocks: Whether there is a scale for each ``BLOCK`` values of a token.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"{jnp.dtype(dtype)} activations; the kernel is for bfloat16 and float16"
    if kind is not None and kind not in KINDS:
        return f"{kind} codes; there are {', '.join(KINDS)}"
    if blocks and kind == "int8":
        return "int8 codes with block scales; those are for fp8"
    if rows < 1:
        return f"{rows} rows; at least one is needed"
    if kind is None and rows > MAX_ROWS:
        return f"{rows} rows; beyond {MAX_ROWS} XLA's kernels fill the device"
    return None


def bound(kind: str) -> float:
    """Largest magnitude of a code."""
    return 127.0 if kind == "int8" else float(jnp.finfo(jnp.dtype(kind)).max)


def absmax(x: Array, axis: int | None = None) -> Array:
    """Largest finite magnitude of float32 values; 0 where there is none."""
    magnitude = jnp.abs(x)
    return jnp.max(jnp.where(magnitude < jnp.inf, magnitude, jnp.zeros_like(x)), axis)


def scale_of(largest: Array, kind: str) -> Array:
    """Scales of values whose largest finite magnitudes are given."""
    scale = largest * (np.float32(1) / np.float32(bound(kind)))
    return jnp.where(scale < _TINY, jnp.ones_like(scale), scale)


def encode(x: Array, scale: Array, kind: str) -> Array:
    """Codes of float32 values; ``scale`` is one for all, or ``(n,)`` for ``(n, BLOCK)`` values."""
    limit = bound(kind)
    ratio = x / (lax.broadcast_in_dim(scale, x.shape, (0,)) if scale.ndim else scale)
    # Comparisons with NaN are false: it takes the last branch.
    clipped = jnp.where(ratio == ratio, ratio, jnp.zeros_like(ratio))
    clipped = jnp.minimum(jnp.maximum(clipped, -limit), limit)
    if kind == "int8":
        return lax.bitcast_convert_type(clipped + _ROUND, jnp.int32).astype(jnp.int8)
    return clipped.astype(kind)


def of_the_row(
    combine: Callable[[Array, Array], Array], own: Array, exchange: Sequence[Any], at: Any
) -> Array:
    """What all warpgroups found in their parts of a row, combined in a fixed order.

    A reduction over all warps by Pallas would have warpgroups share its scratch memory.

    Args:
      combine: Sum or maximum of two.
      own: float32 vector, what this warpgroup found.
      exchange: Shared memory for the vectors of all, and a barrier at which all arrive; without a
        barrier the row is that of a cluster of CTAs.
      at: Where this one's belongs there.
    """
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    found, *ready = exchange
    if ready:
        found[at] = own
        plgpu.barrier_arrive(ready[0])
        plgpu.barrier_wait(ready[0])
    else:
        _tell_the_cluster(own, found)
    return functools.reduce(combine, [found[i] for i in range(found.shape[0])])


def _tell_the_cluster(own: Array, found: Any) -> None:
    """Write what each warp found to the shared memory of all CTAs of the cluster, and wait.

    Args:
      own: ``(4,)``, of the warps of this warpgroup.
      found: Shared memory for one number of each warp of the cluster.
    """
    from jax.experimental.pallas import mosaic_gpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector as mlir_vector

    from qjax.pallas_kernels import _ptx

    plgpu: Any = mosaic_gpu

    @plgpu.inline_mgpu(arg_types=(layout_of_warps(1).reduce(1), plgpu.RefType()))
    def emit(_: Any, own: Any, found: Any) -> None:
        (found_by_warp,) = own.registers.flat
        number = mlir_vector.extract(
            found_by_warp, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0])
        )
        # A lane for each CTA. That all of them have started is seen to where the kernel begins.
        text = (
            "{ .reg .pred p; .reg .b32 lane, ctas, rank, warps, at, remote; "
            "mov.u32 lane, %laneid; mov.u32 ctas, %cluster_nctarank; setp.lt.u32 p, lane, ctas; "
            "mov.u32 rank, %cluster_ctarank; mov.u32 warps, %ntid.x; shr.u32 warps, warps, 5; "
            "mov.u32 at, %tid.x; shr.u32 at, at, 5; mad.lo.u32 at, rank, warps, at; "
            "mad.lo.u32 at, at, 4, $0; @p mapa.shared::cluster.u32 remote, at, lane; "
            "@p st.shared::cluster.f32 [remote], $1; } "
            "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
        )
        _ptx.Ptx().asm(text, "", _ptx.shared_address(found), number, memory=True)

    emit(own, found)


def exchange(size: int, warpgroups: int, ctas: int = 1) -> tuple[Any, ...]:
    """Scratch memory for ``of_the_row``, for one use: of so many warpgroups, or of a cluster."""
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    found = plgpu.SMEM((size,), jnp.float32)
    return (found,) if ctas > 1 else (found, plgpu.Barrier(num_arrivals=warpgroups))


def ctas_per_row(rows: int, columns: int, takes: Callable[[int], bool]) -> int:
    """CTAs, a cluster of them, to share each row: few rows leave multiprocessors idle.

    Two for each of 64 rows gain 0.8 us on an H200 where a row has 14336 pairs of values, and lose
    up to 0.5 us where it has 4096.

    Args:
      rows: CTAs if each had a row.
      columns: Values of a row.
      takes: Whether a row can be cut into so many parts.
    """
    choices = (4, 2) if columns >= 8192 else (4,)
    return next((n for n in choices if rows * n <= _SM_COUNT and takes(n)), 1)


def store_scales(scale: Array, scales: Any, at: Any, row: Array, rows: int) -> None:
    """Write a row's scale, or those ``at`` some of its blocks, to memory.

    Args:
      scale: One scale, or a vector.
      scales: ``(padded_scales(m),)``, or ``(columns / BLOCK, padded_scales(m))``.
      at: A slice of the blocks.
      row: Index of the row.
      rows: ``padded_rows(m)``; what lies beyond repeats the rows.
    """
    for copy in range(scales.shape[-1] // rows):
        if scale.ndim:
            scales[at, row + copy * rows] = scale
        else:
            scales[row + copy * rows] = scale


def padded_rows(rows: int) -> int:
    """Rows of codes: whole tiles of 8, which products copy by TMA."""
    return -(-rows // 8) * 8


def padded_scales(rows: int) -> int:
    """Scales: room for whole multiples of 128 bytes, which products copy by TMA."""
    padded = padded_rows(rows)
    return padded * -(-(-(-padded // 32) * 32) // padded)


def scales_type(rows: int, columns: int, blocks: bool) -> jax.ShapeDtypeStruct:
    """What ``store_scales`` fills."""
    shape = (padded_scales(rows),)
    return jax.ShapeDtypeStruct((columns // BLOCK, *shape) if blocks else shape, jnp.float32)


def vector(columns: int) -> int:
    """Elements per load, at best 16 bytes of 16-bit values: all threads load equally often."""
    return next(size for size in (8, 4, 2, 1) if columns % (size * _THREADS) == 0)


def layout_of_blocks() -> Any:
    """Registers for ``(n, BLOCK)`` values, ``n`` a multiple of 8: half a warp has a row."""
    return _tiled(((8, BLOCK), (2, BLOCK), (8,)), (-5,), (-3, -2))


def layout_of_warps(size: int) -> Any:
    """Registers for ``(4, n)`` values: each warp has a row, and loads ``size`` at a time."""
    return _tiled(((4, 32 * size), (size,)), (-3,), (-2,))


def _tiled(tiles: Any, warps: tuple[int, ...], lanes: tuple[int, ...]) -> Any:
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    return plgpu.Layout.TILED(fa.Tiling(tiles), warps, lanes, -1)
