"""The body of ``w8a8``: what each warpgroup does. See there for the picture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _group_sums
from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels.w8a8 import (
    _SM_COUNT,
    BLOCK_K,
    WARPGROUPS,
    Config,
    Problem,
    out_buffers,
    padded_steps,
    scale_columns,
    tile_counts,
)
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

# Of 65536 registers, 168 for each of 384 threads at launch: 2 * 232 + 40 = 3 * 168.
_COMPUTE_REGISTERS, _MEMORY_REGISTERS = 232, 40


@lowered_once("config", "problem", "out_rows", "out_dtype", "interpret")
def call(
    x: Array,
    weight: Array,
    x_scale: Array,
    w_scale: Array,
    g_scale: Array | None,
    *,
    config: Config,
    problem: Problem,
    out_rows: int,
    out_dtype: Any,
    interpret: bool,
) -> Array:
    """Run the kernel; arguments as in ``w8a8.matmul``, padded as it says there.

    Args:
      out_rows: Rows of the result: all, or fewer than the 8 of a tile, beyond which TMA writes
        nothing. (The other arguments: see there.)

    Returns:
      ``(out_rows, n)`` in ``out_dtype``, or with ``config.splits > 1`` float32 partial sums
      ``(splits, out_rows, n)``.
    """
    n = problem.n
    out_type = jax.ShapeDtypeStruct((out_rows, n), out_dtype)
    if config.splits > 1:
        out_type = jax.ShapeDtypeStruct((config.splits, out_rows, n), jnp.float32)
    operands = {"x": x, "weight": weight, "x_scale": x_scale, "w_scale": w_scale}
    if g_scale is not None:
        operands["g_scale"] = g_scale
    tiles_a, tiles_b = tile_counts(config, problem)
    units = min(_SM_COUNT // config.cluster, tiles_a * tiles_b * config.splits)

    def kernel(*refs: Any, **scratch: Any) -> None:
        gmem = dict(zip((*operands, "out"), refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < WARPGROUPS)
        def _compute() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

            @_for_each_tile(config, problem)
            def _tile(tile: _Tile) -> None:
                _compute_tile(tile, gmem, scratch, warpgroup, config, problem, interpret)

            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _memory() -> None:
            plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")

            @_for_each_tile(config, problem)
            def _tile(tile: _Tile) -> None:
                _load_tile(tile, gmem, scratch, config, problem)

            # No barrier is left with an arrival that nobody saw, and no CTA ends while the other
            # one of its cluster writes to its memory.
            unit = lax.axis_index("unit")
            total = (tiles_a * tiles_b * config.splits - unit + units - 1) // units
            steps = total * (problem.steps // config.splits)

            @pl.loop(jnp.maximum(steps - config.stages, 0), steps)
            def _drain(i: Array) -> None:
                plgpu.barrier_wait(scratch["consumed"].at[lax.rem(i, jnp.int32(config.stages))])

            @pl.loop(jnp.maximum(total - 2, 0), total)
            def _drain_scales(i: Array) -> None:
                plgpu.barrier_wait(scratch["scales_consumed"].at[lax.rem(i, jnp.int32(2))])

    run = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=_scratch_types(config, problem, x, weight, out_type.dtype),
        grid=(units,),
        grid_names=("unit",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        # Every access to shared memory is ordered by the barriers here; the compiler's own would
        # stop all warpgroups at each.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"w8a8_{problem.kind}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(*operands.values())


def _scratch_types(
    config: Config, problem: Problem, x: Array, weight: Array, out_dtype: Any
) -> dict[str, Any]:
    stages, columns, rows = config.stages, config.columns, WARPGROUPS * config.rows
    a, b = (weight, x) if config.swap else (x, weight)
    transforms = _transforms(BLOCK_K)
    buffers = out_buffers(config, problem)
    out_shape = (columns, 64) if config.swap else (config.rows, config.chunk)
    consumed: dict[str, Any] = {"num_arrivals": WARPGROUPS, "num_barriers": stages}
    scratch: dict[str, Any] = {
        "a_smem": plgpu.SMEM((stages, rows, BLOCK_K), a.dtype, transforms=transforms),
        "b_smem": plgpu.SMEM((stages, columns, BLOCK_K), b.dtype, transforms=transforms),
        "out_smem": plgpu.SMEM(
            (WARPGROUPS, buffers, *out_shape),
            out_dtype,
            transforms=_transforms(out_shape[1] * jnp.dtype(out_dtype).itemsize, out_dtype),
        ),
        "ready": plgpu.Barrier(
            num_arrivals=3 if problem.blocks or problem.groups else 2, num_barriers=stages
        ),
        "consumed": plgpu.ClusterBarrier(collective_axes=("cluster",), **consumed)
        if config.cluster > 1
        else plgpu.Barrier(**consumed),
        "scales_ready": plgpu.Barrier(num_arrivals=1 if problem.blocks else 2, num_barriers=2),
        "scales_consumed": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
    }
    if problem.blocks:
        tokens, features = (columns, rows) if config.swap else (rows, columns)
        scratch["x_scale_smem"] = plgpu.SMEM((stages, scale_columns(tokens)), jnp.float32)
        blocks = (2, features // 128, padded_steps(problem.k))
        scratch["w_scale_smem"] = plgpu.SMEM(blocks, jnp.float32)
    else:
        scratch["a_scale_smem"] = plgpu.SMEM((2, rows), jnp.float32)
        scratch["b_scale_smem"] = plgpu.SMEM((2, scale_columns(columns)), jnp.float32)
    if problem.groups:
        scratch["g_scale_smem"] = plgpu.SMEM((stages, rows), jnp.float32)
    return scratch


def _transforms(row_bytes: int, dtype: Any = jnp.int8) -> tuple[Any, ...]:
    """The widest swizzle, up to the 128 bytes that ``wgmma`` wants, for rows of so many bytes."""
    swizzle = next(size for size in (128, 64, 32, 16) if row_bytes % size == 0)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return (tiling, plgpu.SwizzleTransform(swizzle)) if swizzle > 16 else (tiling,)


class _Tile:
    """Where a tile lies: its number on this CTA, its part of the contraction, its first row..."""

    def __init__(self, number: Array, split: Array, row: Array, column: Array) -> None:
        self.number, self.split, self.row, self.column = number, split, row, column


def _for_each_tile(config: Config, problem: Problem) -> Any:
    """A decorator that runs a function of a ``_Tile`` for each of this CTA's tiles."""
    tiles_a, tiles_b = tile_counts(config, problem)

    def decorate(body: Any) -> None:
        @plgpu.nd_loop((config.splits, tiles_a * tiles_b), collective_axes="unit")
        def _loop(loop: Any) -> None:
            split, place = loop.index
            a, b = plgpu.planar_snake(place, (tiles_a, tiles_b), 1, min(config.raster, tiles_b))
            if config.cluster > 1:
                b = b * config.cluster + lax.axis_index("cluster")
            tile = _Tile(
                loop.local_index, split, a * (WARPGROUPS * config.rows), b * config.columns
            )
            body(tile)

    return decorate


def _load_tile(
    tile: _Tile, gmem: dict[str, Any], scratch: dict[str, Any], config: Config, problem: Problem
) -> None:
    """Copy a tile's scales and, step by step, its operands to shared memory."""
    stages = jnp.int32(config.stages)
    rows, columns = WARPGROUPS * config.rows, config.columns
    names = ("weight", "x") if config.swap else ("x", "weight")
    a, b = (gmem[name] for name in names)
    steps = problem.steps // config.splits
    tokens_at, tokens = (tile.column, columns) if config.swap else (tile.row, rows)
    buffer = lax.rem(tile.number, jnp.int32(2))
    ready = scratch["scales_ready"].at[buffer]
    pl.when(tile.number >= 2)(lambda: plgpu.barrier_wait(scratch["scales_consumed"].at[buffer]))
    if problem.blocks:
        features_at, features = (tile.row, rows) if config.swap else (tile.column, columns)
        source = gmem["w_scale"].at[pl.ds(features_at // 128, features // 128)]
        plgpu.copy_gmem_to_smem(source, scratch["w_scale_smem"].at[buffer], ready)
    else:
        a_scale, b_scale = (gmem["x_scale" if name == "x" else "w_scale"] for name in names)
        source = a_scale.at[pl.ds(tile.row, rows)]
        plgpu.copy_gmem_to_smem(source, scratch["a_scale_smem"].at[buffer], ready)
        source = b_scale.at[pl.ds(tile.column, scale_columns(columns))]
        plgpu.copy_gmem_to_smem(source, scratch["b_scale_smem"].at[buffer], ready)

    @pl.loop(0, steps)
    def _step(step: Array) -> None:
        i = tile.number * steps + step
        slot = lax.rem(i, stages)
        pl.when(i >= config.stages)(lambda: plgpu.barrier_wait(scratch["consumed"].at[slot]))
        ready = scratch["ready"].at[slot]
        at = tile.split * steps + step
        part = pl.ds(at * BLOCK_K, BLOCK_K)
        shared = {"collective_axes": "cluster"} if config.cluster > 1 else {}
        source = a.at[pl.ds(tile.row, rows), part]
        plgpu.copy_gmem_to_smem(source, scratch["a_smem"].at[slot], ready, **shared)
        source = b.at[pl.ds(tile.column, columns), part]
        plgpu.copy_gmem_to_smem(source, scratch["b_smem"].at[slot], ready)
        if problem.blocks:
            source = gmem["x_scale"].at[at, pl.ds(tokens_at, scale_columns(tokens))]
            plgpu.copy_gmem_to_smem(source, scratch["x_scale_smem"].at[slot], ready)
        if problem.groups:
            source = gmem["g_scale"].at[at, pl.ds(tile.row, rows)]
            plgpu.copy_gmem_to_smem(source, scratch["g_scale_smem"].at[slot], ready)


def _compute_tile(
    tile: _Tile,
    gmem: dict[str, Any],
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    interpret: bool,
) -> None:
    """One warpgroup's part of a tile, from the first step to the store."""
    buffer = lax.rem(tile.number, jnp.int32(2))
    if problem.groups:
        sums = [_group_scaled_sums(tile, scratch, warpgroup, config, problem, interpret)]
        _store(sums, tile, gmem, scratch, warpgroup, buffer, config, problem, interpret)
        return
    if config.promote:
        if problem.blocks:
            plgpu.barrier_wait(scratch["scales_ready"].at[buffer])
        sums = _promoted_sums(tile, scratch, warpgroup, buffer, config, problem, interpret)
        if problem.blocks:
            plgpu.barrier_arrive(scratch["scales_consumed"].at[buffer])
        _store(sums, tile, gmem, scratch, warpgroup, buffer, config, problem, interpret)
        return

    def run(acc: Any) -> None:
        _accumulate(acc, tile, scratch, warpgroup, config, problem, interpret)
        _store([acc[...]], tile, gmem, scratch, warpgroup, buffer, config, problem, interpret)

    dtype = jnp.int32 if problem.kind == "int8" else jnp.float32
    pl.run_scoped(run, plgpu.ACC((config.rows, config.columns), dtype))


def _accumulate(
    acc: Any,
    tile: _Tile,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    interpret: bool,
) -> None:
    """Sum over the tile's steps in the tensor core."""
    stages = jnp.int32(config.stages)
    steps = problem.steps // config.splits
    rows = pl.ds(warpgroup * config.rows, config.rows)
    first = tile.number * steps

    @pl.loop(0, steps)
    def _step(step: Array) -> None:
        slot = lax.rem(first + step, stages)
        plgpu.barrier_wait(scratch["ready"].at[slot])
        plgpu.wgmma(acc, scratch["a_smem"].at[slot, rows], scratch["b_smem"].at[slot].T)

        # One product stays in flight; the slot that is given back is that of the step before.
        @pl.when(step > 0)
        def _release() -> None:
            plgpu.wgmma_wait(1)
            _give_back(scratch, lax.rem(first + step - 1, stages), interpret)

    plgpu.wgmma_wait(0)
    _give_back(scratch, lax.rem(first + steps - 1, stages), interpret)


def _give_back(scratch: dict[str, Any], slot: Array, interpret: bool) -> None:
    if interpret:
        # The interpreter wants a proxy fence between a read of a slot and the next copy into it.
        # On the GPU the barrier orders the two, as in CUTLASS's TMA pipelines.
        plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["consumed"].at[slot])


def _promoted_sums(
    tile: _Tile,
    scratch: dict[str, Any],
    warpgroup: Array,
    buffer: Array,
    config: Config,
    problem: Problem,
    interpret: bool,
) -> list[Array]:
    """Sum over the tile's steps in float32, with block scales if there are any.

    Returns:
      Sums of ``(rows, columns)``, cut along the columns where the weight's scale changes.
    """
    stages = jnp.int32(config.stages)
    steps = problem.steps // config.splits
    layout = plgpu.Layout.WGMMA
    own_rows = pl.ds(warpgroup * config.rows, config.rows)
    cut = 128 if problem.blocks and not config.swap else config.columns
    starts = range(0, config.columns, cut)

    def step(i: Array, sums: list[Array]) -> list[Array]:
        slot = lax.rem(tile.number * steps + i, stages)
        plgpu.barrier_wait(scratch["ready"].at[slot])

        def multiply(acc: Any) -> Array:
            plgpu.wgmma(acc, scratch["a_smem"].at[slot, own_rows], scratch["b_smem"].at[slot].T)
            plgpu.wgmma_wait(0)
            return acc[...]

        part = pl.run_scoped(multiply, plgpu.ACC((config.rows, config.columns), jnp.float32))
        if not problem.blocks:
            _give_back(scratch, slot, interpret)
            return [sums[0] + part]
        x_scale = scratch["x_scale_smem"].at[slot]
        w_scale = scratch["w_scale_smem"]
        at = tile.split * steps + i
        if config.swap:
            narrow = pl.ds(0, config.columns)
            scale = plgpu.load(x_scale.at[narrow], layout=layout.reduce(0))
            _give_back(scratch, slot, interpret)
            block = warpgroup * config.rows // 128
            scale = scale * w_scale[buffer, block, at]
            return [sums[0] + part * lax.broadcast_in_dim(scale, part.shape, [1])]
        scale = plgpu.load(x_scale.at[own_rows], layout=layout.reduce(1))
        _give_back(scratch, slot, interpret)
        added = []
        for block, (start, total) in enumerate(zip(starts, sums, strict=True)):
            factor = scale * w_scale[buffer, block, at]
            piece = part[:, start : start + cut]
            added.append(total + piece * lax.broadcast_in_dim(factor, piece.shape, [0]))
        return added

    zero = jnp.zeros((config.rows, cut), jnp.float32)
    zero = zero if interpret else plgpu.layout_cast(zero, layout)
    return lax.fori_loop(0, steps, step, [zero for _ in starts])


def _group_scaled_sums(
    tile: _Tile,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    interpret: bool,
) -> Array:
    """Sum over the tile's steps in float32, each with the scales of its rows' groups."""
    steps = problem.steps // config.splits
    rows = pl.ds(warpgroup * config.rows, config.rows)

    def load(step: Array) -> tuple[Array, Array]:
        slot = lax.rem(tile.number * steps + step, jnp.int32(config.stages))
        plgpu.barrier_wait(scratch["ready"].at[slot])
        scales = scratch["g_scale_smem"].at[slot, rows]
        return slot, plgpu.load(scales, layout=plgpu.Layout.WGMMA.reduce(1))

    def multiply(acc: Any, slot: Array) -> Any:
        a, b = scratch["a_smem"].at[slot, rows], scratch["b_smem"].at[slot]
        if interpret:
            dims = (((1,), (1,)), ((), ()))
            wide = a[...].astype(jnp.int32), b[...].astype(jnp.int32)
            return acc + lax.dot_general(wide[0], wide[1], dims)
        plgpu.wgmma(acc, a, b.T)
        return acc

    return _group_sums.overlapped(
        steps,
        (config.rows, config.columns),
        load=load,
        multiply=multiply,
        release=lambda slot: _give_back(scratch, slot, interpret),
        interpret=interpret,
    )


def _store(
    sums: list[Array],
    tile: _Tile,
    gmem: dict[str, Any],
    scratch: dict[str, Any],
    warpgroup: Array,
    buffer: Array,
    config: Config,
    problem: Problem,
    interpret: bool,
) -> None:
    """Scale a tile, round it and copy it out, chunk by chunk."""
    layout = plgpu.Layout.WGMMA
    row_scale = None
    if not problem.blocks:
        plgpu.barrier_wait(scratch["scales_ready"].at[buffer])
        rows = pl.ds(warpgroup * config.rows, config.rows)
        row_scale = plgpu.load(scratch["a_scale_smem"].at[buffer, rows], layout=layout.reduce(1))
    out = gmem["out"].at[tile.split] if config.splits > 1 else gmem["out"]
    out_smem = scratch["out_smem"]
    buffers = out_smem.shape[1]
    # The last tile's chunks must have left their buffers.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    width = sums[0].shape[1]
    step = config.columns if config.swap else config.chunk
    number = 0
    for start in range(0, config.columns, step):
        within = start % width
        piece = sums[start // width]
        piece = piece if step == width else piece[:, within : within + step]
        piece = piece.astype(jnp.float32)
        if row_scale is not None:
            source = scratch["b_scale_smem"].at[buffer, pl.ds(start, step)]
            column_scale = plgpu.load(source, layout=layout.reduce(0))
            piece = piece * lax.broadcast_in_dim(row_scale, piece.shape, [0])
            piece = piece * lax.broadcast_in_dim(column_scale, piece.shape, [1])
        piece = piece.astype(out_smem.dtype)
        for top in range(0, config.rows, 64) if config.swap else (0,):
            if number >= buffers:
                plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
            smem = out_smem.at[warpgroup, number % buffers]
            first = tile.row + warpgroup * config.rows + top
            if config.swap:
                part = piece[top : top + 64] if config.rows > 64 else piece
                smem.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                target = out.at[pl.ds(tile.column, config.columns), pl.ds(first, 64)]
            else:
                smem[...] = piece
                target = out.at[pl.ds(first, config.rows), pl.ds(tile.column + start, step)]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem, target)
            number += 1
    if not problem.blocks:
        plgpu.barrier_arrive(scratch["scales_consumed"].at[buffer])
