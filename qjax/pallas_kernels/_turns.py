"""Warpgroups take turns at the tensor core.

Left alone, warpgroups that start together stay together: their ``wgmma`` interleave and end at the
same time, then all of them unpack while the tensor core idles. If each starts its products when the
one before has started (or finished) its own, one unpacks while the other multiplies: the ping-pong
schedule of CUTLASS and FlashAttention-3 (arXiv:2407.08608).

On an H200 it makes W4A8 with groups, two warpgroups and tiles of 64 tokens and more 1 to 12 %
faster (finished), and INT4 in groups with bfloat16 3 to 9 % with tiles of 256 tokens and 2 to 4 %
with 128 (started; four shapes of Llama-3.1-8B, 256 and 512 rows). FP8 is as fast without. Narrow
tiles and four warpgroups mostly lose, up to half: those are limited by something else.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from qjax.pallas_kernels import _ptx
from qjax.typing import Array

# Its names and signatures differ between the versions of jax that qjax is type-checked with.
plgpu: Any = mosaic_gpu

_FIRST_BARRIER = 8  # of the 16 named ones of a CTA; Mosaic uses 0 and one for each warpgroup


class Turns:
    """The turns of one compute warpgroup; does nothing where there are none.

    Named barriers order them: a warpgroup arrives, without waiting, at that of the next.

    Args:
      turns: When a turn is passed on, one of ``weight_only_large.TURNS``, or None.
      warpgroup: Index of this warpgroup.
      warpgroups: How many compute. All must take equally many turns.
      interpret: In the interpreter, which has no such barriers, order does not matter.
    """

    def __init__(
        self, turns: str | None, warpgroup: Array, warpgroups: int, *, interpret: bool
    ) -> None:
        self.kind = None if interpret else turns
        self._mine = warpgroup
        self._next = lax.rem(warpgroup + 1, jnp.int32(warpgroups))
        self._last = warpgroups - 1

    def begin(self) -> None:
        """Once, before the first turn of any."""
        if self.kind is not None:
            pl.when(self._mine == self._last)(lambda: _barrier("arrive", self._next))

    def take(self) -> None:
        """Before products are started."""
        if self.kind is not None:
            _barrier("sync", self._mine)

    def started(self) -> None:
        """After products were started."""
        if self.kind == "started":
            _barrier("arrive", self._next)

    def finished(self) -> None:
        """After they were waited for."""
        if self.kind == "finished":
            _barrier("arrive", self._next)

    def end(self) -> None:
        """Once, after the last turn: no barrier is left with an arrival that nobody saw."""
        if self.kind is not None:
            pl.when(self._mine == 0)(lambda: _barrier("sync", self._mine))


def _barrier(action: str, warpgroup: Array) -> None:
    """``"sync"`` or ``"arrive"`` at the barrier of a warpgroup, where two meet."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,))
    def emit(_: Any, number: Any) -> None:
        text = (
            f"{{ .reg .b32 n; add.s32 n, $0, {_FIRST_BARRIER}; barrier.{action}.aligned n, 256; }}"
        )
        _ptx.Ptx().asm(text, "", number.registers.item(), memory=True)

    emit(warpgroup)
