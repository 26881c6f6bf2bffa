"""Where the time of a calibration run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class PhaseClock:
    """Wall-clock seconds by phase and by block.

    Device work is asynchronous: a phase says what it made with ``wait``, so that its time is its
    own. What a block takes outside its phases is the phase "other", so that the phases of a block
    add up to its time.

    Attributes:
      seconds: Seconds by phase, over the whole run.
      blocks: Seconds by phase of every block that was worked on, in order.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.blocks: list[dict[str, float]] = []
        self._in_block = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the ``with`` block to a phase."""
        started = time.perf_counter()
        yield
        spent = time.perf_counter() - started
        for table in [self.seconds, *self.blocks[-1:]] if self._in_block else [self.seconds]:
            table[name] = table.get(name, 0.0) + spent

    @contextmanager
    def block(self) -> Iterator[None]:
        """Phases inside the ``with`` block are those of one block of the model."""
        self.blocks.append({})
        self._in_block = True
        started = time.perf_counter()
        yield
        other = time.perf_counter() - started - sum(self.blocks[-1].values())
        self._in_block = False
        for table in (self.seconds, self.blocks[-1]):
            table["other"] = table.get("other", 0.0) + other

    @staticmethod
    def wait(value: Any) -> Any:
        """The value itself, when the device has computed it."""
        return jax.block_until_ready(value)

    def summary(self) -> str:
        """One line, the largest share first."""
        total = sum(self.seconds.values())
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        shown = [f"{name} {spent:.1f} s" for name, spent in parts if spent >= 0.005 * total]
        return ", ".join(shown)
