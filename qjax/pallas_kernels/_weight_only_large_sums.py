"""The products of ``weight_only_large``: a tile's sums over the contraction, per warpgroup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _codes, _group_sums, _layout, _unpack
from qjax.pallas_kernels._turns import Turns
from qjax.pallas_kernels.weight_only import Problem
from qjax.pallas_kernels.weight_only_large import (
    Config,
    scale_rows,
    scaled_sums,
    step_k,
    word_rows,
)
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_BLOCK_N = _layout.BLOCK_N
_SMALLEST_SCALE = 2.0**-80


def tile_sums(
    first: Array,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    turns: Turns,
    interpret: bool,
) -> Array:
    """``weights @ x.T`` of a tile without the scales of its output: float32 ``(64, columns)``.

    ``first`` is the tile's first step, counted by this CTA.
    """
    if not scaled_sums(problem):
        return _accumulate(first, scratch, warpgroup, config, problem, turns, interpret)
    if config.overlap:
        sums = _overlapped_integers(first, scratch, warpgroup, config, problem, interpret)
    elif problem.compute == "int8":
        sums = _scaled_integers(first, scratch, warpgroup, config, problem, turns, interpret)
    else:
        sums = _scaled_sums(first, scratch, warpgroup, config, problem, turns, interpret)
    if problem.compute == "int8":
        # The stored scales are for codes in the unit that bfloat16 leaves them in; these are 16
        # times their value.
        _, rest = _codes.constant_multiplier(problem.kind, "bfloat16")
        sums = sums * jnp.float32(2.0**rest / 16)
    return sums


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
    words = plgpu.load(smem, layout=_unpack.words_layout(word_rows(problem)))
    scales, offsets = [], []
    for g in range(scale_rows(problem)):
        source = scratch["scales_smem"].at[slot, g]
        rows = pl.ds(warpgroup * _BLOCK_N, _BLOCK_N)
        for part, values in zip(range(source.shape[0]), (scales, offsets), strict=False):
            values.append(plgpu.load(source.at[part, rows], layout=plgpu.Layout.WGMMA.reduce(1)))
    if problem.compute == "int8":
        multiples = scales if problem.whole_scales else []
        return [_unpack.unpack_int8(words, multiples, interpret=interpret)], scales
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


def _give_back(
    scratch: dict[str, Any], slot: Any, interpret: bool, *, wait: bool = True, running: int = 0
) -> None:
    """Hand a slot back to the memory warpgroup, after waiting for the products that read it.

    ``running`` later ones are not waited for.
    """
    if interpret:
        # The interpreter wants a proxy fence between a read of a slot and the next copy into it.
        plgpu.commit_smem()
    elif wait:
        plgpu.wgmma_wait(running)
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
        def some(i: Array, count: int, total: Any) -> Any:
            """Steps in straight code: all but the first are unpacked while a product runs."""
            before = None
            for j in range(count):
                slot = lax.rem(first + i + j, jnp.int32(config.stages))
                (weights,), _ = _load_weights(slot, scratch, warpgroup, problem, interpret)
                turns.take()
                total = _multiply(acc, total, weights, scratch["x_smem"].at[slot], interpret)
                turns.started()
                if before is not None:
                    _give_back(scratch, before, interpret, running=1)
                before = slot
            _give_back(scratch, before, interpret)
            turns.finished()
            return total

        whole, rest = divmod(problem.k // config.splits // step_k(problem), config.ahead)

        def piece(i: Array, total: Any) -> Any:
            return some(config.ahead * i, config.ahead, total)

        total = lax.fori_loop(0, whole, piece, total)
        return some(jnp.int32(config.ahead * whole), rest, total) if rest else total

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
        unit = 1 if problem.whole_scales else 1 / 16
        return sums.astype(jnp.float32) * jnp.float32(unit)
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
    return lax.fori_loop(0, problem.k // config.splits // step_k(problem), group, zero)


def _overlapped_integers(
    first: Array,
    scratch: dict[str, Any],
    warpgroup: Array,
    config: Config,
    problem: Problem,
    interpret: bool,
) -> Array:
    """``_scaled_integers`` with a product in flight while another is scaled (``_group_sums``)."""

    def load(group: Array) -> tuple[Any, Array]:
        slot = lax.rem(first + group, jnp.int32(config.stages))
        (weights,), (scale,) = _load_weights(slot, scratch, warpgroup, problem, interpret)
        return (weights, slot), scale

    def multiply(acc: Any, operands: Any) -> Any:
        weights, slot = operands
        return _multiply(acc, acc, weights, scratch["x_smem"].at[slot], interpret)

    return _group_sums.overlapped(
        problem.k // config.splits // step_k(problem),
        (_BLOCK_N, config.columns),
        load=load,
        multiply=multiply,
        release=lambda operands: _give_back(scratch, operands[1], interpret, wait=False),
        interpret=interpret,
    )


def _integer_product(
    weights: Array,
    slot: Array,
    scratch: dict[str, Any],
    shape: tuple[int, int],
    turns: Turns,
    interpret: bool,
) -> Array:
    """``weights @ x.T`` of int8 operands, one group, as float32: below ``128 * 127 * 128``."""

    def multiply(acc: Any, total: Any) -> Any:
        turns.take()
        total = _multiply(acc, total, weights, scratch["x_smem"].at[slot], interpret)
        turns.started()
        _give_back(scratch, slot, interpret)
        turns.finished()
        return total

    if interpret:
        return multiply(None, jnp.zeros(shape, jnp.int32)).astype(jnp.float32)

    def run(acc: Any) -> None:
        multiply(acc, ())

    total = pl.run_state(run)(plgpu.ACC.init(_group_sums.integer_start(shape)))
    return _group_sums.from_integer(total)
