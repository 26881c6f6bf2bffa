"""The body of ``weight_only_large``: what each warpgroup does. See there for the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _codes, _layout, _unpack
from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels._turns import Turns
from qjax.pallas_kernels._weight_only_large_store import drain_taken, store
from qjax.pallas_kernels.weight_only import Problem
from qjax.pallas_kernels.weight_only_large import (
    _SM_COUNT,
    Config,
    out_buffers,
    scale_rows,
    scaled_sums,
    step_k,
    tile_counts,
)
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_BLOCK_N = _layout.BLOCK_N
_MEMORY_REGISTERS = 40
_SMALLEST_SCALE = 2.0**-80


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
                loop = _accumulate
                if scaled_sums(problem):
                    loop = _scaled_integers if problem.compute == "int8" else _scaled_sums
                sums = loop(first, scratch, warpgroup, config, problem, turns, interpret)
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
        "words_smem": plgpu.SMEM((stages, config.warpgroups, _word_rows(problem), 256), jnp.int32),
        # A group of 32 is cut from the activations as one column of tiles.
        "x_smem": plgpu.SMEM(
            (stages, config.columns, step_k(problem)),
            x.dtype,
            transforms=transforms(x.dtype, 64 if problem.group_size == 32 else 128),
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


def _word_rows(problem: Problem) -> int:
    """Rows of 256 words of a weight tile that a step needs."""
    return problem.bits * step_k(problem) // _layout.BLOCK_K


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
    rows, length = _word_rows(problem), step_k(problem)
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


def _load_weights(
    slot: Array, scratch: dict[str, Any], warpgroup: Array, problem: Problem, interpret: bool
) -> tuple[list[Array], list[Array]]:
    """Wait for a step and make its weights, in registers.

    Returns:
      A step's weights in one piece, or, where sums of groups are scaled, a piece per group; and the
      scales ``(64,)`` of those sums.
    """
    plgpu.barrier_wait(scratch["ready"].at[slot])
    smem = scratch["words_smem"].at[slot, warpgroup]
    words = plgpu.load(smem, layout=_unpack.words_layout(_word_rows(problem)))
    scales, offsets = [], []
    for g in range(scale_rows(problem)):
        source = scratch["scales_smem"].at[slot, g]
        rows = pl.ds(warpgroup * _BLOCK_N, _BLOCK_N)
        for part, values in zip(range(source.shape[0]), (scales, offsets), strict=False):
            values.append(plgpu.load(source.at[part, rows], layout=plgpu.Layout.WGMMA.reduce(1)))
    if problem.compute == "int8":
        return [_unpack.unpack_int8(words, interpret=interpret)], scales
    sum_scales: list[Array] = []
    if scaled_sums(problem):
        scales, sum_scales = [], scales
    weights = _unpack.unpack(
        words,
        scales,
        offsets,
        kind=problem.kind,
        compute=problem.compute,
        parts=max(1, len(sum_scales)),
        interpret=interpret,
    )
    return weights, sum_scales


def _multiply(acc: Any, total: Any, weights: Array, x_smem: Any, interpret: bool) -> Any:
    """``weights @ x.T``, into the accumulator ``acc``.

    The interpreter has no ``wgmma`` with an operand in registers: there a jnp product is added to
    the array ``total``, which on the GPU is empty.
    """
    if interpret:
        dims = (((1,), (1,)), ((), ()))
        wide = total.dtype
        return total + lax.dot_general(weights.astype(wide), x_smem[...].astype(wide), dims)
    plgpu.wgmma(acc, weights, x_smem.T)
    return total


def _give_back(scratch: dict[str, Any], slot: Array, interpret: bool) -> None:
    """Wait for the products that read a slot, and hand it back to the memory warpgroup."""
    if interpret:
        # The interpreter wants a proxy fence between a read of a slot and the next copy into it.
        plgpu.commit_smem()
    else:
        plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch["consumed"].at[slot])


def _accumulate(
    first: Array,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    turns: Turns,
    interpret: bool,
) -> Array:
    """Sum over the steps in the tensor core: float32 ``(64, columns)``."""

    def loop(acc: Any, total: Any) -> Any:
        def step(i: Array, total: Any) -> Any:
            slot = lax.rem(first + i, jnp.int32(config.stages))
            (weights,), _ = _load_weights(slot, scratch, warpgroup, problem, interpret)
            turns.take()
            total = _multiply(acc, total, weights, scratch["x_smem"].at[slot], interpret)
            turns.started()
            _give_back(scratch, slot, interpret)
            turns.finished()
            return total

        return lax.fori_loop(0, problem.k // config.splits // step_k(problem), step, total)

    shape = (_BLOCK_N, config.columns)
    dtype = jnp.int32 if problem.compute == "int8" else jnp.float32
    if interpret:
        sums = loop(None, jnp.zeros(shape, dtype))
    else:

        def run(acc: Any) -> Array:
            loop(acc, ())
            return acc[...]

        sums = pl.run_scoped(run, plgpu.ACC(shape, dtype))
    if problem.compute == "int8":
        return sums.astype(jnp.float32) * jnp.float32(1 / 16)
    if problem.group_size is not None:
        return sums
    # Unpacking leaves a constant power of two: 16-bit floats have no room for it.
    _, rest = _codes.constant_multiplier(problem.kind, problem.compute)
    return sums * jnp.float32(2.0**-rest)


def _scaled_sums(
    first: Array,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    turns: Turns,
    interpret: bool,
) -> Array:
    """Sum of the groups' products, each scaled in float32: ``(64, columns)``.

    In the accumulator itself: before a group's product is added, what is there is divided by the
    group's scale, and multiplied by the one before. So no second set of sums is needed.
    """
    layout = plgpu.Layout.WGMMA
    shape = (_BLOCK_N, config.columns)
    # Steps of a group, or groups of a step.
    count, length = scale_rows(problem), step_k(problem)
    steps = max(1, (problem.group_size or 0) // length)

    def divided(sums: Array, previous: Array, scale: Array) -> tuple[Array, Array]:
        # A scale of zero, as for a group of zeros: small enough that nothing of the group remains.
        scale = jnp.where(jnp.abs(scale) < _SMALLEST_SCALE, jnp.float32(_SMALLEST_SCALE), scale)
        return sums * lax.broadcast_in_dim(previous / scale, shape, [0]), scale

    def accumulate(sums: Array, multiply: Callable[[Any, Any], Any]) -> Array:
        if interpret:
            return multiply(None, sums)

        def run(acc: Any) -> None:
            multiply(acc, ())

        return pl.run_state(run)(plgpu.ACC.init(sums))

    def slot_of(i: Array) -> Array:
        return lax.rem(first + i, jnp.int32(config.stages))

    def load(slot: Array) -> tuple[list[Array], list[Array]]:
        return _load_weights(slot, scratch, warpgroup, problem, interpret)

    def long_group(g: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        slots = [slot_of(steps * g + i) for i in range(steps)]
        (weights,), (scale,) = load(slots[0])
        sums, scale = divided(*carry, scale)

        def multiply(acc: Any, total: Any) -> Any:
            turns.take()
            total = _multiply(acc, total, weights, scratch["x_smem"].at[slots[0]], interpret)
            for slot in slots[1:]:
                # Unpacked while the product before runs.
                (following,), _ = load(slot)
                total = _multiply(acc, total, following, scratch["x_smem"].at[slot], interpret)
            turns.started()
            for slot in slots:
                _give_back(scratch, slot, interpret)
            turns.finished()
            return total

        return accumulate(sums, multiply), scale

    def short_groups(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        slot = slot_of(i)
        pieces, scales = load(slot)
        size = length // count
        for g in range(count):
            sums, scale = divided(*carry, scales[g])
            x_smem = scratch["x_smem"].at[slot, :, pl.ds(g * size, size)]

            def multiply(acc: Any, total: Any, g: int = g, x_smem: Any = x_smem) -> Any:
                turns.take()
                total = _multiply(acc, total, pieces[g], x_smem, interpret)
                turns.started()
                if g == count - 1:
                    _give_back(scratch, slot, interpret)
                elif not interpret:
                    plgpu.wgmma_wait(0)
                turns.finished()
                return total

            carry = accumulate(sums, multiply), scale
        return carry

    carry = jnp.zeros(shape, jnp.float32), jnp.ones((_BLOCK_N,), jnp.float32)
    if not interpret:
        carry = plgpu.layout_cast(carry[0], layout), plgpu.layout_cast(carry[1], layout.reduce(1))
    groups = problem.k // config.splits // length // steps
    sums, scale = lax.fori_loop(0, groups, short_groups if count > 1 else long_group, carry)
    return sums * lax.broadcast_in_dim(scale, shape, [0])


def _scaled_integers(
    first: Array,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    turns: Turns,
    interpret: bool,
) -> Array:
    """The same for W4A8, whose groups' integer products are added to float32 sums."""
    shape = (_BLOCK_N, config.columns)

    def group(g: Array, sums: Array) -> Array:
        slot = lax.rem(first + g, jnp.int32(config.stages))
        (weights,), (scale,) = _load_weights(slot, scratch, warpgroup, problem, interpret)
        part = _integer_product(weights, slot, scratch, shape, turns, interpret)
        return sums + part * lax.broadcast_in_dim(scale, shape, [0])

    zero = jnp.zeros(shape, jnp.float32)
    zero = zero if interpret else plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    sums = lax.fori_loop(0, problem.k // config.splits // step_k(problem), group, zero)
    # The stored scales are for codes in the unit that bfloat16 leaves them in; these are 16 times
    # their value.
    _, rest = _codes.constant_multiplier(problem.kind, "bfloat16")
    return sums * jnp.float32(2.0**rest / 16)


def _integer_product(
    weights: Array,
    slot: Array,
    scratch: dict[str, Any],
    shape: tuple[int, int],
    turns: Turns,
    interpret: bool,
) -> Array:
    """``weights @ x.T`` of int8 operands, one group, as float32.

    The accumulator starts as the bits of ``1.5 * 2**23``. As long as sums stay below ``2**22`` (a
    group's are at most ``128 * 127 * 128``) it ends as the bits of that float plus the sum, and one
    subtraction converts: the instruction that converts integers has an eighth of its rate.
    """
    magic = 1.5 * 2.0**23
    x_smem = scratch["x_smem"].at[slot]
    if interpret:
        turns.take()
        total = _multiply(None, jnp.zeros(shape, jnp.int32), weights, x_smem, interpret)
        turns.started()
        _give_back(scratch, slot, interpret)
        turns.finished()
        return total.astype(jnp.float32)

    def run(acc: Any) -> None:
        turns.take()
        _multiply(acc, (), weights, x_smem, interpret)
        turns.started()
        _give_back(scratch, slot, interpret)
        turns.finished()

    start = jnp.full(shape, int(np.float32(magic).view(np.int32)), jnp.int32)
    total = pl.run_state(run)(plgpu.ACC.init(plgpu.layout_cast(start, plgpu.Layout.WGMMA)))
    return lax.bitcast_convert_type(total, jnp.float32) - jnp.float32(magic)
