"""The body of ``weight_only_large``: what each warpgroup does. See there for the picture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _layout
from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels._turns import Turns
from qjax.pallas_kernels._weight_only_large_store import drain_taken, store
from qjax.pallas_kernels._weight_only_large_sums import tile_sums
from qjax.pallas_kernels.weight_only import Problem
from qjax.pallas_kernels.weight_only_large import (
    _SM_COUNT,
    Config,
    out_buffers,
    scale_rows,
    scaled_sums,
    step_k,
    tile_counts,
    word_rows,
)
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_BLOCK_N = _layout.BLOCK_N
_MEMORY_REGISTERS = 40


@lowered_once("config", "problem", "out_rows", "out_dtype", "interpret")
def call(
    x: Array,
    words: Array,
    scales: Array | None,
    column: Array,
    row_scale: Array | None,
    *,
    config: Config,
    problem: Problem,
    out_rows: int,
    out_dtype: Any,
    interpret: bool,
) -> Array:
    """Run the kernel; arguments as in ``weight_only_large.matmul``, padded as it says there.

    Args:
      out_rows: Rows of the result: all, or fewer than the 8 of a tile, beyond which TMA writes
        nothing. (The other arguments: see there.)

    Returns:
      ``(out_rows, n)`` in ``out_dtype``, ``(out_rows, n / 2)`` if gated, or with
      ``config.splits > 1`` float32 partial sums ``(splits, out_rows, n)``.
    """
    operands = {"words": words, "column": column, "x": x, "scales": scales, "row_scale": row_scale}
    operands = {name: value for name, value in operands.items() if value is not None}
    tiles_a, tiles_b = tile_counts(config, problem)
    total = tiles_a * tiles_b * config.splits
    units = min(_SM_COUNT // config.cluster, total)
    steps = problem.k // config.splits // step_k(problem)
    width = problem.n // 2 if problem.gated else problem.n
    out_type = jax.ShapeDtypeStruct((out_rows, width), out_dtype)
    if config.splits > 1:
        out_type = jax.ShapeDtypeStruct((config.splits, out_rows, problem.n), jnp.float32)

    def kernel(*refs: Any, **scratch: Any) -> None:
        gmem = dict(zip((*operands, "out"), refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")

        def for_each_tile(body: Any) -> None:
            """Run ``body(number, split, first feature, first token)`` for this CTA's tiles."""

            @plgpu.nd_loop((config.splits, tiles_a * tiles_b), collective_axes="unit")
            def _tile(loop: Any) -> None:
                split, place = loop.index
                a, b = plgpu.planar_snake(place, (tiles_a, tiles_b), 1, min(config.raster, tiles_b))
                if config.cluster > 1:
                    a = a * config.cluster + lax.axis_index("cluster")
                body(loop.local_index, split, a * config.features, b * config.columns)

        @pl.when(warpgroup < config.warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(config.registers, action="increase")
            turns = Turns(config.turns, warpgroup, config.warpgroups, interpret=interpret)
            turns.begin()

            @for_each_tile
            def _tile(number: Array, split: Array, feature: Array, token: Array) -> None:
                feature = feature + warpgroup * _BLOCK_N
                first = number * steps
                sums = tile_sums(first, scratch, warpgroup, config, problem, turns, interpret)
                out = gmem["out"].at[split] if config.splits > 1 else gmem["out"]
                store(sums, number, feature, token, gmem, out, scratch, warpgroup, config)

            turns.end()
            plgpu.wait_smem_to_gmem(0)
            if problem.gated:
                drain_taken(scratch, warpgroup)

        @pl.when(warpgroup == config.warpgroups)
        def _memory() -> None:
            plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")

            @for_each_tile
            def _tile(number: Array, split: Array, feature: Array, token: Array) -> None:
                first = number * steps, split * steps
                _load_tile(first, feature, token, gmem, scratch, config, problem)

            # No barrier is left with an arrival that nobody saw, and no CTA ends while the other
            # one of its cluster writes to its memory.
            count = (total - lax.axis_index("unit") + units - 1) // units

            @pl.loop(jnp.maximum(count * steps - config.stages, 0), count * steps)
            def _drain(i: Array) -> None:
                plgpu.barrier_wait(scratch["consumed"].at[lax.rem(i, jnp.int32(config.stages))])

    run = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=_scratch_types(config, problem, x, scales, out_type.dtype),
        grid=(units,),
        grid_names=("unit",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        # Every access to shared memory is ordered by the barriers here; the compiler's own would
        # stop all warpgroups at each.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"weight_only_large_{problem.kind}_{problem.compute}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(*operands.values())


def _scratch_types(
    config: Config, problem: Problem, x: Array, scales: Array | None, out_dtype: Any
) -> dict[str, Any]:
    stages = config.stages

    def transforms(dtype: Any, swizzle: int = 128) -> tuple[Any, ...]:
        """Tiles and swizzle, as ``wgmma`` and the transposed store want them."""
        columns = swizzle // jnp.dtype(dtype).itemsize
        return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)

    consumed: dict[str, Any] = {"num_arrivals": config.warpgroups, "num_barriers": stages}
    scratch: dict[str, Any] = {
        "words_smem": plgpu.SMEM((stages, config.warpgroups, word_rows(problem), 256), jnp.int32),
        # A group of 32 is cut from the activations as one column of tiles.
        "x_smem": plgpu.SMEM(
            (stages, config.columns, step_k(problem)),
            x.dtype,
            transforms=transforms(
                x.dtype, 64 if scaled_sums(problem) and problem.group_size == 32 else 128
            ),
        ),
        "out_smem": plgpu.SMEM(
            (config.warpgroups, out_buffers(config, problem), config.chunk, _BLOCK_N),
            out_dtype,
            transforms=transforms(out_dtype),
        ),
        "ready": plgpu.Barrier(num_arrivals=2 if scales is None else 3, num_barriers=stages),
        "consumed": plgpu.ClusterBarrier(collective_axes=("cluster",), **consumed)
        if config.cluster > 1
        else plgpu.Barrier(**consumed),
    }
    if scales is not None:
        shape = (stages, scale_rows(problem), scales.shape[1], config.features)
        scratch["scales_smem"] = plgpu.SMEM(shape, scales.dtype)
    if problem.gated:
        # One per pair of warpgroups and buffer.
        count = config.warpgroups // 2 * out_buffers(config, problem)
        scratch["paired"] = plgpu.Barrier(num_arrivals=1, num_barriers=count)
        scratch["taken"] = plgpu.Barrier(num_arrivals=1, num_barriers=count)
    return scratch


def _load_tile(
    first: tuple[Array, Array],
    feature: Array,
    token: Array,
    gmem: dict[str, Any],
    scratch: dict[str, Any],
    config: Config,
    problem: Problem,
) -> None:
    """Copy a tile's operands to shared memory, step by step.

    ``first`` is its first step, counted by this CTA and along the contraction.
    """
    rows, length = word_rows(problem), step_k(problem)
    steps_per_tile = jnp.int32(_layout.BLOCK_K // length)

    @pl.loop(0, problem.k // config.splits // length)
    def _step(number: Array) -> None:
        i, step = first[0] + number, first[1] + number
        slot = lax.rem(i, jnp.int32(config.stages))
        pl.when(i >= config.stages)(lambda: plgpu.barrier_wait(scratch["consumed"].at[slot]))
        ready = scratch["ready"].at[slot]
        tiles = pl.ds(lax.div(feature, jnp.int32(_BLOCK_N)), config.warpgroups)
        part = pl.ds(lax.rem(step, steps_per_tile) * rows, rows)
        source = gmem["words"].at[lax.div(step, steps_per_tile), tiles, part]
        plgpu.copy_gmem_to_smem(source, scratch["words_smem"].at[slot], ready)
        source = gmem["x"].at[pl.ds(token, config.columns), pl.ds(step * length, length)]
        shared = {"collective_axes": "cluster"} if config.cluster > 1 else {}
        plgpu.copy_gmem_to_smem(source, scratch["x_smem"].at[slot], ready, **shared)
        if problem.group_size is not None:
            count = scale_rows(problem)
            at = lax.div(step * length, jnp.int32(problem.group_size))
            source = gmem["scales"].at[pl.ds(at, count), :, pl.ds(feature, config.features)]
            plgpu.copy_gmem_to_smem(source, scratch["scales_smem"].at[slot], ready)
