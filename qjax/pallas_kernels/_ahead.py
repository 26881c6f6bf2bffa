"""Asking for what the next kernel reads, while one runs that leaves the memory idle.

With few tokens, normalising them or writing them to the cache takes as long as it takes to start
and to wait for a load. CTAs that such a kernel has besides ask for the beginning of the following
product's weight (``cp.async.bulk.prefetch``), so that it is in the L2 cache, or on its way there,
when that product starts. No result depends on it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl

from qjax.typing import Array

MAX_ROWS = 64
"""Tokens up to which a kernel is short enough for this."""
# Some 2.7 us at the rate of an H200's memory, which is what add_rms_norm takes with few rows; a
# fifth of its L2 cache.
_BYTES = 12 << 20
_BOX_BYTES = 64 << 10
_COLUMNS = 256


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["by_columns"]
)
@dataclasses.dataclass(frozen=True)
class ReadNext:
    """An array that is read next.

    Attributes:
      array: Of any shape and type.
      by_columns: Whether it is a matrix of which all rows are read at once, from their beginning,
        rather than memory in its order.
    """

    array: Array
    by_columns: bool = False


class Boxes(NamedTuple):
    """Boxes of a matrix: the ``i``-th is at ``(i % down, i // down)`` in units of a box.

    Attributes:
      view: Shape of the matrix.
      box: Shape of a box.
      down: Boxes from top to bottom.
      count: How many are asked for.
    """

    view: tuple[int, ...]
    box: tuple[int, int]
    down: int
    count: int


def boxes(ahead: ReadNext | None) -> Boxes | None:
    """What is asked for: whole boxes, up to ``_BYTES``; None if there is nothing."""
    if ahead is None:
        return None
    shape, itemsize = ahead.array.shape, ahead.array.dtype.itemsize
    view = shape if ahead.by_columns else (math.prod(shape) // _COLUMNS, _COLUMNS)
    if len(view) != 2 or math.prod(view) != math.prod(shape):
        return None
    box = min(_BOX_BYTES // (_COLUMNS * itemsize), 256), _COLUMNS
    down, along = (size // part for size, part in zip(view, box, strict=True))
    count = min(down * along, _BYTES // (math.prod(box) * itemsize))
    return Boxes(view, box, down, count) if count else None


def ask(ref: Any, boxes: Boxes, number: Array) -> None:
    """Ask for one box of the matrix, which is viewed as ``boxes`` says. For one warpgroup."""
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu
    places = lax.rem(number, boxes.down), lax.div(number, boxes.down)
    box = tuple(pl.ds(i * size, size) for i, size in zip(places, boxes.box, strict=True))
    plgpu.async_prefetch(ref.at[box])


def beside(
    body: Callable[..., None], boxes: Boxes | None, *, rows: int, operands: int, warpgroups: int
) -> Callable[..., None]:
    """A kernel whose first ``rows`` CTAs along ``"row"`` run ``body``, and the others ask.

    Args:
      body: A kernel of ``operands`` operands and any number of other references.
      boxes: One for each other CTA; None for none. They are of one more operand, the last.
      rows: How many CTAs run the body.
      operands: How many operands it has.
      warpgroups: Warpgroups of a CTA, along ``"warpgroup"`` if there are several.
    """
    if boxes is None:
        return body

    def kernel(*refs: Any) -> None:
        number = lax.axis_index("row") - rows
        pl.when(number < 0)(lambda: body(*refs[:operands], *refs[operands + 1 :]))
        asks = number >= 0
        if warpgroups > 1:
            asks &= lax.axis_index("warpgroup") == 0
        pl.when(asks)(functools.partial(ask, refs[operands], boxes, number))

    return kernel


def viewed(ahead: ReadNext | None, boxes: Boxes | None) -> tuple[Array, ...]:
    """The operand of which a kernel asks for boxes, if it does."""
    return () if ahead is None or boxes is None else (ahead.array.reshape(boxes.view),)
