"""The body of ``weight_only``: what each warpgroup does. See there for the picture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _codes, _layout, _unpack
from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels._weight_only_store import all_rows, scale_sums, store, store_gated
from qjax.pallas_kernels.weight_only import _MEMORY_REGISTERS, Config, concurrent_groups
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_BLOCK_N, _BLOCK_K = _layout.BLOCK_N, _layout.BLOCK_K


@lowered_once("rows", "kind", "config", "out_dtype", "gated", "interpret")
def call(
    x: Array,
    words: Array,
    scales: Array | None,
    column: Array,
    row_scale: Array | None,
    *,
    rows: int,
    kind: str,
    config: Config,
    out_dtype: Any,
    gated: bool,
    interpret: bool,
) -> Array:
    """Run the kernel; arguments as in ``weight_only.matmul``.

    Args:
      rows: Rows that are computed, at least the ``m`` of ``x``, which are fewer than 8 or a
        multiple of 8. TMA reads the missing ones as zeros and does not write them. (The other
        arguments: see there.)

    Returns:
      ``(m, n)`` in ``out_dtype``, or ``(m, n / 2)`` if gated, or with ``config.splits > 1`` float32
      partial sums ``(splits, m, n)``.
    """
    m, k = x.shape
    n = words.shape[1] * _BLOCK_N
    bits, compute = _codes.CODES[kind].bits, x.dtype
    warpgroups, stages, splits = config.warpgroups, config.stages, config.splits
    steps = k // splits // _BLOCK_K
    groups, parts = (0, 0)
    if scales is not None:
        groups, parts = scales.shape[0] * _BLOCK_K // k, scales.shape[1]
    columns = warpgroups * _BLOCK_N
    if splits > 1:
        out_type = jax.ShapeDtypeStruct((splits, m, n), jnp.float32)
    else:
        out_type = jax.ShapeDtypeStruct((m, n // 2 if gated else n), out_dtype)
    operands = {"words": words, "column": column, "x": x, "scales": scales, "row_scale": row_scale}
    operands = {name: value for name, value in operands.items() if value is not None}

    def kernel(*refs: Any, **scratch: Any) -> None:
        gmem = dict(zip((*operands, "out"), refs, strict=True))
        warpgroup = lax.axis_index("warpgroup")
        start = lax.axis_index("split") * steps

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            if config.registers is not None:
                plgpu.set_max_registers(config.registers, action="increase")
            load = functools.partial(
                _load_weights,
                scratch,
                warpgroup,
                stages=stages,
                groups=groups,
                kind=kind,
                compute=compute.name,
                interpret=interpret,
            )
            if scales is not None and compute == jnp.bfloat16:
                acc = _accumulate_groups(load, scratch, rows, steps, groups, config, interpret)
            else:
                acc = _accumulate(load, scratch, rows, steps, config, interpret)
            if scales is None:
                # Unpacking leaves a constant power of two: 16-bit floats have no room for it.
                _, rest = _codes.constant_multiplier(kind, compute.name)
                acc = acc * jnp.float32(2.0**-rest)
            acc = scale_sums(acc, gmem, warpgroup, config)
            finish_tile = store_gated if gated else store
            finish_tile(acc.astype(out_type.dtype), gmem["out"], scratch, warpgroup, config)

        @pl.when(warpgroup == warpgroups)
        def _memory() -> None:
            if config.registers is not None:
                plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
            tile = lax.axis_index("n")
            consumed, ready = scratch["consumed"], scratch["ready"]

            @pl.loop(0, steps)
            def _step(i: Array) -> None:
                slot = lax.rem(i, jnp.int32(stages))
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))

                def copy(source: Any, target: str) -> None:
                    plgpu.copy_gmem_to_smem(source, scratch[target].at[slot], ready.at[slot])

                at = start + i
                tiles = pl.ds(tile * warpgroups, warpgroups)
                copy(gmem["words"].at[at, tiles], "words_smem")
                if groups:
                    source = gmem["scales"].at[pl.ds(at * groups, groups)]
                    copy(source.at[:, :, pl.ds(tile * columns, columns)], "scales_smem")
                x_rows = all_rows(i, rows)
                copy(gmem["x"].at[x_rows, pl.ds(at * _BLOCK_K, _BLOCK_K)], "x_smem")

            # No barrier is left with an arrival that nobody saw.
            @pl.loop(max(steps - stages, 0), steps)
            def _drain(i: Array) -> None:
                plgpu.barrier_wait(consumed.at[lax.rem(i, jnp.int32(stages))])

    scratch_types = {
        "words_smem": plgpu.SMEM((stages, warpgroups, bits, 256), jnp.int32),
        # A group of 32 is cut from the activations as one column of tiles.
        "x_smem": plgpu.SMEM(
            (stages, rows, _BLOCK_K),
            compute,
            transforms=transforms(compute, swizzle=64 if groups == 4 else 128),
        ),
        "out_smem": plgpu.SMEM(
            (warpgroups, rows, _BLOCK_N), out_type.dtype, transforms=transforms(out_type.dtype)
        ),
        "ready": plgpu.Barrier(num_arrivals=3 if groups else 2, num_barriers=stages),
        "consumed": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if gated:
        scratch_types["paired"] = plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups // 2)
    if groups:
        stored = _codes.stored_dtype(compute.name)
        scratch_types["scales_smem"] = plgpu.SMEM((stages, groups, parts, columns), stored)
    run = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(n // columns, splits),
        grid_names=("n", "split"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        # Every access to shared memory is ordered by the barriers here; the compiler's own would
        # stop all warpgroups at each.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"weight_only_{kind}_{compute.name}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(*operands.values())


def transforms(dtype: Any, swizzle: int = 128) -> tuple[Any, ...]:
    """Tiles and swizzle, as ``wgmma`` and the transposed store want them."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)


def _load_weights(
    scratch: dict[str, Any],
    warpgroup: Array,
    step: Array,
    *,
    stages: int,
    groups: int,
    kind: str,
    compute: str,
    interpret: bool,
) -> tuple[list[Array], list[Array]]:
    """Wait for a step and make its weights, in registers.

    Returns:
      ``(64, 128)`` in one piece, or, where sums of groups are scaled, a piece per group; and the
      scales ``(64,)`` of those sums.
    """
    slot = lax.rem(step, jnp.int32(stages))
    plgpu.barrier_wait(scratch["ready"].at[slot])
    layout = _unpack.words_layout(_codes.CODES[kind].bits)
    words = plgpu.load(scratch["words_smem"].at[slot, warpgroup], layout=layout)
    rows = pl.ds(warpgroup * _BLOCK_N, _BLOCK_N)
    scales, offsets = [], []
    for g in range(groups):
        smem = scratch["scales_smem"].at[slot, g]
        for part, values in zip(range(smem.shape[0]), (scales, offsets), strict=False):
            values.append(plgpu.load(smem.at[part, rows], layout=plgpu.Layout.WGMMA.reduce(1)))
    sum_scales = []
    if compute == "bfloat16":
        scales, sum_scales = [], scales
    with jax.named_scope("unpack"):
        weights = _unpack.unpack(
            words,
            scales,
            offsets,
            kind=kind,
            compute=compute,
            parts=max(1, len(sum_scales)),
            interpret=interpret,
        )
    return weights, sum_scales


def _accumulate(
    load: Callable[[Array], tuple[list[Array], list[Array]]],
    scratch: dict[str, Any],
    rows: int,
    steps: int,
    config: Config,
    interpret: bool,
) -> Array:
    """Sum over the steps of ``weights @ x.T``: float32 ``(64, rows)``.

    The interpreter knows no ``wgmma`` with an operand in registers: there ``total`` is carried as
    a plain array and the product is a jnp dot of the same values. On the GPU it is an accumulator
    reference, and ``total`` is empty.
    """
    stages = jnp.int32(config.stages)

    def loop(accumulator: Any, total: Any) -> Any:
        def multiply(total: Any, weights: Array, slot: Array) -> Any:
            if interpret:
                x = scratch["x_smem"][slot].astype(jnp.float32)
                dims = (((1,), (1,)), ((), ()))
                return total + lax.dot_general(weights.astype(jnp.float32), x, dims)
            plgpu.wgmma(accumulator, weights, scratch["x_smem"].at[slot].T)
            return total

        def step(i: Array, total: Any) -> Any:
            slot = lax.rem(i, stages)
            (weights,), _ = load(i)
            total = multiply(total, weights, slot)
            finish(scratch, slot, interpret)
            return total

        def overlapped(i: Array, carry: Any) -> Any:
            """Start the product of step ``i`` and unpack step ``i + 1`` while it runs."""
            weights, total = carry
            slot = lax.rem(i, stages)
            total = multiply(total, weights, slot)
            (following,), _ = load(i + 1)
            finish(scratch, slot, interpret)
            return following, total

        if not config.pipelined:
            return lax.fori_loop(0, steps, step, total)
        (weights,), _ = load(jnp.int32(0))
        weights, total = _in_pairs(overlapped, steps, (weights, total))
        slot = jnp.int32((steps - 1) % config.stages)
        total = multiply(total, weights, slot)
        finish(scratch, slot, interpret)
        return total

    if interpret:
        return loop(None, jnp.zeros((_BLOCK_N, rows), jnp.float32))

    def run(accumulator: Any) -> Array:
        loop(accumulator, ())
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((_BLOCK_N, rows)))


def _in_pairs(overlapped: Callable[[Array, Any], Any], steps: int, carry: Any) -> Any:
    """All but the last step of a pipelined loop.

    Two steps per iteration: with one, the weights of the next step would be copied into the
    registers that ``wgmma`` is still reading, and ptxas would serialize the two (C7513).
    """

    def pair(index: Array, carry: Any) -> Any:
        return overlapped(2 * index + 1, overlapped(2 * index, carry))

    return overlapped(jnp.int32(steps - 2), lax.fori_loop(0, steps // 2 - 1, pair, carry))


def finish(scratch: dict[str, Any], slot: Array, interpret: bool) -> None:
    """Wait for the products that read a slot, and hand it back to the memory warpgroup."""
    if interpret:
        # The interpreter wants a proxy fence between a read of a slot and the next copy into it. On
        # the GPU the barrier orders the two, as in CUTLASS's TMA pipelines.
        plgpu.commit_smem()
    else:
        plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch["consumed"].at[slot])


def _accumulate_groups(
    load: Callable[[Array], tuple[list[Array], list[Array]]],
    scratch: dict[str, Any],
    rows: int,
    steps: int,
    groups: int,
    config: Config,
    interpret: bool,
) -> Array:
    """The same where the sums of groups are scaled: float32 ``(64, rows)``, in registers."""
    stages = jnp.int32(config.stages)
    size = _BLOCK_K // groups
    together = concurrent_groups(rows, groups)

    def sums(weights: list[Array], slot: Array, first: int, then: Callable[[], Any]) -> Any:
        """Products of ``together`` groups from ``first``; ``then`` runs beside them."""
        mine = range(first, first + together)
        columns = [pl.ds(g * size, size) for g in mine]
        if interpret:
            x = scratch["x_smem"][slot].astype(jnp.float32)
            dims = (((1,), (1,)), ((), ()))
            parts = [
                lax.dot_general(
                    weights[g].astype(jnp.float32), x[:, g * size : (g + 1) * size], dims
                )
                for g in mine
            ]
            return parts, then()

        def run(*accumulators: Any) -> Any:
            for g, accumulator, cut in zip(mine, accumulators, columns, strict=True):
                plgpu.wgmma(accumulator, weights[g], scratch["x_smem"].at[slot, :, cut].T)
            result = then()
            return [accumulator[...] for accumulator in accumulators], result

        return pl.run_scoped(run, *[plgpu.ACC((_BLOCK_N, rows))] * together)

    def add(total: Array, parts: list[Array], scales: list[Array]) -> Array:
        for part, scale in zip(parts, scales, strict=True):
            total = total + part * lax.broadcast_in_dim(scale, part.shape, [0])
        return total

    def step(i: Array, total: Array) -> Array:
        slot = lax.rem(i, stages)
        weights, scales = load(i)
        for first in range(0, groups, together):
            last = first + together == groups
            then = functools.partial(finish, scratch, slot, interpret) if last else lambda: None
            parts, _ = sums(weights, slot, first, then)
            total = add(total, parts, scales[first : first + together])
        return total

    def overlapped(i: Array, carry: Any) -> Any:
        (weights, scales), total = carry
        slot = lax.rem(i, stages)

        def then() -> Any:
            following = load(i + 1)
            finish(scratch, slot, interpret)
            return following

        parts, following = sums(weights, slot, 0, then)
        return following, add(total, parts, scales)

    total = jnp.zeros((_BLOCK_N, rows), jnp.float32)
    if not interpret:
        total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
    if not config.pipelined:
        return lax.fori_loop(0, steps, step, total)
    (weights, scales), total = _in_pairs(overlapped, steps, (load(jnp.int32(0)), total))
    slot = jnp.int32((steps - 1) % config.stages)
    parts, _ = sums(weights, slot, 0, functools.partial(finish, scratch, slot, interpret))
    return add(total, parts, scales)
