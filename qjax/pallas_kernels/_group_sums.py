"""Integer sums of groups, each scaled in float32, with one product in flight while another is.

The product of a group ends in an accumulator of the tensor core, and belongs into float32 sums with
the group's scale. Groups go to two accumulators by turns, four at a time. Clearing one would have
to wait for both, so each adds up its two products: with ``a = p0``, then ``b = p0 + p2``,

  s0 p0 + s2 p2 = (s0 - s2) a + s2 b

(exact but for roundings of the larger of ``s0 p0`` and ``s2 p0`` to float32). The four are one
piece of straight code: ptxas serializes products that are in flight from one iteration of a loop to
the next, or whose accumulators are written meanwhile (C7513, C7514).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = int(np.float32(_MAGIC).view(np.int32))


def integer_start(shape: tuple[int, int]) -> Array:
    """What an int32 accumulator starts with: the bits of the float ``1.5 * 2**23``.

    As long as sums stay below ``2**22`` it ends as the bits of that float plus the sum, and one
    subtraction converts: the instruction that converts integers has an eighth of its rate.
    """
    start = jnp.full(shape, _MAGIC_BITS, jnp.int32)
    return plgpu.layout_cast(start, plgpu.Layout.WGMMA)


def from_integer(total: Array) -> Array:
    """An accumulator that began with ``integer_start``, as float32."""
    return lax.bitcast_convert_type(total, jnp.float32) - jnp.float32(_MAGIC)


def overlapped(
    groups: int,
    shape: tuple[int, int],
    *,
    load: Callable[[Array], tuple[Any, Array]],
    multiply: Callable[[Any, Any], Any],
    release: Callable[[Any], None],
    interpret: bool,
) -> Array:
    """Sum over ``groups`` of ``scale * product``.

    Args:
      groups: How many.
      shape: Of the sums, ``(64, columns)``. Those of two groups must be below ``2**22``.
      load: Waits for a group's operands. ``(index) -> (operands, scale)`` with a scale per row.
      multiply: Starts a group's product. ``(accumulator, operands) -> accumulator``, which is a
        reference, in the interpreter an array.
      release: Hands a group's operands back when its product is done.
      interpret: In the interpreter, where accumulators are arrays.

    Returns:
      float32 ``shape``.
    """

    def some(first: Array, count: int, total: Array, accs: list[Any]) -> Array:
        operands: list[Any] = []
        scales: list[Array] = []
        for i in range(count + 2):
            if i < count:
                loaded, scale = load(first + i)
                operands.append(loaded)
                scales.append(scale)
            if i >= 2:
                if interpret:
                    part = accs[i % 2].astype(jnp.float32)
                else:
                    younger = 1 if i <= count else 0
                    part = plgpu.wgmma_accumulator_load(accs[i % 2], wait_n=younger)
                    part = from_integer(part)
                release(operands[i - 2])
                factor = scales[i - 2] - scales[i] if i < count else scales[i - 2]
                total = total + part * lax.broadcast_in_dim(factor, shape, [0])
            if i < count:
                accs[i % 2] = multiply(accs[i % 2], operands[i])
        return total

    def four(first: Array, count: int, total: Array) -> Array:
        if interpret:
            return some(first, count, total, [jnp.zeros(shape, jnp.int32)] * 2)

        def run(*accs: Any) -> Array:
            for acc in accs:
                acc[...] = integer_start(shape)
            return some(first, count, total, list(accs))

        return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.int32)] * 2)

    total = jnp.zeros(shape, jnp.float32)
    total = total if interpret else plgpu.layout_cast(total, plgpu.Layout.WGMMA)
    whole, rest = divmod(groups, 4)
    total = lax.fori_loop(0, whole, lambda i, total: four(4 * i, 4, total), total)
    return four(jnp.int32(4 * whole), rest, total) if rest else total
