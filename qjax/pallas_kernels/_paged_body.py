"""The body of ``paged_decode``: copies, barriers and loop. See there for the picture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels._paged_emit import Emitted
from qjax.pallas_kernels._paged_sizes import Tile
from qjax.pallas_kernels._paged_twin import Twin
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_I32 = jnp.int32


@lowered_once("tile", "splits", "out_dtype", "with_lse", "from_zero", "interpret")
def call(
    tile: Tile,
    queries: Array,
    plan: Array,
    keys: Array,
    values: Array,
    key_scales: Array | None,
    value_scales: Array | None,
    logit_bias: Array | None,
    *,
    splits: int,
    out_dtype: Any,
    with_lse: bool,
    from_zero: bool,
    interpret: bool,
) -> tuple[Array, Array | None]:
    """Run the kernel; arguments as ``paged_decode.decode`` prepares them.

    Args:
      tile: Sizes and types.
      queries: ``[b, kv_heads, ratio, head_dim]``.
      plan: int32 ``[b, 2 + pages_per_seq]``: first visible position, the one behind the last,
        pages.
      keys: The pages.
      values: Likewise.
      key_scales: float32 ``[num_pages, kv_heads, page_size]`` (with ``tile.token_scales``),
        ``[kv_heads]``, or None.
      value_scales: Likewise.
      logit_bias: float32 ``[b, kv_heads, ratio, length]`` (with ``tile.logit_bias``), where
        ``length`` is whole tiles, or None.
      splits: Blocks that share a sequence and KV head.
      out_dtype: Result type.
      with_lse: Whether to return the second result.
      from_zero: Whether the first visible position is 0 in every row.
      interpret: Run in the Pallas interpreter.

    Returns:
      ``[splits, b, kv_heads, ratio, head_dim]`` and float32 ``[splits, b, kv_heads, ratio]``, log2
      of the sums of exponentials, or None.
    """
    b, heads = queries.shape[:2]
    page, per_seq = keys.shape[2], plan.shape[1] - 2
    tokens, stages = tile.tokens, tile.stages
    pages = max(1, tokens // page)  # per tile
    if tile.per_row > 1:
        shape = (*keys.shape[:2], page // tile.per_row, 128)
        keys, values = keys.reshape(shape), values.reshape(shape)
    # Rows per token of what is copied.
    per_row = {"keys": tile.per_row, "values": tile.per_row}
    rows = (splits, b, heads, tile.ratio)
    out_types = [jax.ShapeDtypeStruct((*rows, tile.head_dim), out_dtype)]
    if with_lse:
        out_types.append(jax.ShapeDtypeStruct(rows, jnp.float32))
    operands = {
        "queries": queries,
        "plan": plan,
        "keys": keys,
        "values": values,
        "key_scales": key_scales,
        "value_scales": value_scales,
        "logit_bias": logit_bias,
    }
    operands = {name: value for name, value in operands.items() if value is not None}
    names = (*operands, "out", "lse") if with_lse else (*operands, "out")
    copied = ["keys", "values"] + ["key_scales", "value_scales"] * tile.token_scales
    transforms = _transforms(tile, keys.dtype)
    make = Twin if interpret else Emitted

    def kernel(*refs: Any, ready: Any, merge: Any, **buffers: Any) -> None:
        gmem = dict(zip(names, refs, strict=True))
        head, split, row = (lax.axis_index(name) for name in ("head", "split", "row"))
        start, stop = gmem["plan"][row, 0], gmem["plan"][row, 1]
        end = lax.div(stop + (tokens - 1), _I32(tokens))
        if from_zero and splits == 1:
            # Known before the plan is: the first pages are looked up at the same time.
            begin = _I32(0)
        else:
            begin = _I32(0) if from_zero else lax.div(start, _I32(tokens))
            share = lax.div(end - begin + (splits - 1), _I32(splits))
            begin = begin + split * share
            end = jnp.minimum(begin + share, end)

        def pages_of(index: Array) -> tuple[Array, ...]:
            first = lax.div(index * tokens, _I32(page))
            return tuple(
                gmem["plan"][row, 2 + jnp.clip(first + i, 0, per_seq - 1)] for i in range(pages)
            )

        def fetch(index: Array, numbers: tuple[Array, ...]) -> None:
            slot = lax.rem(index - begin, _I32(stages))
            for i, number in enumerate(numbers):
                for name in copied:
                    source = gmem[name].at[number, head]
                    target = buffers[name].at[slot]
                    per = per_row.get(name, 1)
                    if pages > 1:
                        target = target.at[pl.ds(i * page // per, page // per)]
                    elif page > tokens:
                        # Written so that its divisibility by the tiles of shared memory shows.
                        start_row = lax.rem(index, _I32(page // tokens)) * (tokens // per)
                        source = source.at[pl.ds(start_row, tokens // per)]
                    plgpu.copy_gmem_to_smem(source, target, ready.at[slot])
            if tile.logit_bias:
                source = gmem["logit_bias"].at[row, head].at[:, pl.ds(index * tokens, tokens)]
                plgpu.copy_gmem_to_smem(source, buffers["logit_bias"].at[slot], ready.at[slot])

        # Looked up together, so that their latencies overlap.
        first = [pages_of(begin + i) for i in range(stages + 1)]
        for i in range(stages):
            pl.when(begin + i < end)(lambda i=i: fetch(begin + i, first[i]))

        work = make(tile, gmem, buffers, merge, transforms)
        constants, state = work.start(row, head)

        def body(index: Array, carry: Any) -> Any:
            state, numbers = carry
            slot = lax.rem(index - begin, _I32(stages))
            plgpu.barrier_wait(ready.at[slot])
            state = work.step(state, constants, slot, index * tokens, start, stop)
            # All warps are done with the slot: the next tile may be copied there. Its page numbers
            # were read one tile ago, and those of the one after it are read now.
            following = index + stages
            pl.when(following < end)(lambda: fetch(following, numbers))
            return state, pages_of(following + 1)

        state, _ = lax.fori_loop(begin, end, body, (state, first[stages]))
        work.finish(state, split, row, head)

    scratch: dict[str, Any] = {
        name: plgpu.SMEM(
            (stages, tokens // tile.per_row, keys.shape[3]), keys.dtype, transforms=transforms
        )
        for name in ("keys", "values")
    }
    scratch |= {name: plgpu.SMEM((stages, tokens), jnp.float32) for name in copied[2:]}
    if tile.logit_bias:
        scratch["logit_bias"] = plgpu.SMEM((stages, tile.ratio, tokens), jnp.float32)
    scratch["merge"] = plgpu.SMEM((64 * tile.columns,), jnp.float32)
    arrivals = len(copied) * pages + tile.logit_bias
    scratch["ready"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
    result = plgpu.kernel(
        kernel,
        out_type=out_types,
        scratch_types=scratch,
        grid=(heads, splits, b),
        grid_names=("head", "split", "row"),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name=f"paged_decode_{tile.kind}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(*operands.values())
    return (result[0], result[1]) if with_lse else (result[0], None)


def _transforms(tile: Tile, dtype: Any) -> tuple[Any, ...]:
    if tile.swizzle is None:
        return ()
    columns = tile.swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(tile.swizzle)
