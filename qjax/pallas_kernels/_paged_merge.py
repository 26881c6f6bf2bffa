"""Merge the splits of ``paged_decode`` in one small kernel; XLA makes three of it.

One block per row. Each warp takes every fourth split, a lane every 32nd element; then the four
warps are merged through shared memory. The order of all sums is fixed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _ptx
from qjax.pallas_kernels._once import lowered_once
from qjax.pallas_kernels._ptx import Ptx, Value
from qjax.typing import Array, DType

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_NOTHING = int(np.float32(-1e30).view(np.uint32))
_MINUS_INFINITY = 0xFF800000


@lowered_once("dtype")
def call(out: Array, lse: Array, dtype: DType) -> Array:
    """``paged_decode.merge`` as a kernel; the same arguments and result."""
    splits, *rows, head_dim = out.shape
    count = int(np.prod(rows))

    def kernel(parts: Any, sums: Any, result: Any, *, scratch: Any) -> None:
        @plgpu.inline_mgpu(
            arg_types=(*(plgpu.RefType() for _ in range(4)), plgpu.Layout.WGMMA),
        )
        def emit(_: Any, parts: Any, sums: Any, result: Any, scratch: Any, row: Any) -> None:
            merge(
                Ptx(),
                _ptx.global_address(parts),
                _ptx.global_address(sums),
                _ptx.global_address(result),
                _ptx.shared_address(scratch),
                row.registers.item(),
                splits=splits,
                rows=count,
                head_dim=head_dim,
                dtype="bf16" if dtype == jnp.bfloat16 else "f16",
            )

        emit(parts, sums, result, scratch, lax.axis_index("row"))

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((count, head_dim), dtype),
        scratch_types={"scratch": plgpu.SMEM((4 * head_dim + 8,), jnp.float32)},
        grid=(count,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name="paged_decode_merge",
    )
    return run(out, lse).reshape(*rows, head_dim)


def merge(
    p: Ptx,
    parts: Value,
    sums: Value,
    result: Value,
    scratch: Value,
    row: Value,
    *,
    splits: int,
    rows: int,
    head_dim: int,
    dtype: str,
) -> None:
    """What one thread does.

    Args:
      p: Where to emit.
      parts: Address of float32 ``[splits, rows, head_dim]``.
      sums: Address of float32 ``[splits, rows]``, log2 of sums of exponentials.
      result: Address of ``[rows, head_dim]``, 16 bits.
      scratch: Shared memory, ``4 * head_dim + 8`` floats.
      row: Which row.
      splits: How many parts.
      rows: How many rows.
      head_dim: A multiple of 32.
      dtype: ``"bf16"`` or ``"f16"``.
    """
    thread = p.thread()
    warp, lane = p.shift_right(thread, 5), p.bits_and(thread, 31)
    own = range(-(-splits // 4))
    values, logs = [], []
    for i in own:
        split = p.add(warp, 4 * i)
        # A split too many reads the last one, with no weight.
        index = p.add(p.mul(p.minimum(split, splits - 1), rows), row)
        log = p.load_global(p.address(sums, index, 4), out="f")
        limit, hidden = p.integer(splits), p.number(_MINUS_INFINITY)
        logs.append(p.select_below(split, limit, log, hidden))
        at = p.address(parts, p.add(p.mul(index, head_dim), lane), 4)
        values.append([p.load_global(at, 128 * j, out="f") for j in range(head_dim // 32)])
    top = p.number(_NOTHING)
    for log in logs:
        top = p.fmax(top, log)
    total = p.number(0)
    acc = [p.number(0) for _ in range(head_dim // 32)]
    for log, part in zip(logs, values, strict=True):
        weight = p.exp2(p.fsub(log, top))
        total = p.fadd(total, weight)
        acc = [p.fma(weight, x, a) for x, a in zip(part, acc, strict=True)]

    at = p.add(scratch, p.add(p.mul(warp, 4 * head_dim), p.mul(lane, 4)))
    for j, x in enumerate(acc):
        p.store_shared(at, x, 128 * j)
    # All lanes store the same two numbers.
    pair = p.add(scratch, p.mul(warp, 8))
    p.store_shared(pair, top, 16 * head_dim)
    p.store_shared(pair, total, 16 * head_dim + 4)
    p.barrier()
    tops = [p.load_shared(scratch, 16 * head_dim + 8 * w) for w in range(4)]
    totals = [p.load_shared(scratch, 16 * head_dim + 8 * w + 4) for w in range(4)]
    top = tops[0]
    for other in tops[1:]:
        top = p.fmax(top, other)
    weights = [p.exp2(p.fsub(other, top)) for other in tops]
    total = p.number(0)
    for weight, other in zip(weights, totals, strict=True):
        total = p.fma(weight, other, total)
    inverse = p.reciprocal_or_zero(total)
    for first in range(0, head_dim, 128):
        element = p.add(thread, first)
        at = p.add(scratch, p.mul(p.minimum(element, head_dim - 1), 4))
        x = p.number(0)
        for w, weight in enumerate(weights):
            x = p.fma(weight, p.load_shared(at, 4 * head_dim * w), x)
        x = p.fmul(x, inverse)
        where = p.address(result, p.add(p.mul(row, head_dim), element), 2)
        p.store_global(where, p.pack(x, x, dtype), 16, element, head_dim)
