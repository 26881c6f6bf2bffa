"""Work on several tensors side by side, results in order, memory bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax

from qjax._compat import default_device

T = TypeVar("T")
R = TypeVar("R")

_MOST_WORKERS = 4
"""More than one, so that the host converts one tensor while another is on its way to the device;
few, because each holds a tensor."""


class Workers:
    """Two pools of threads: for tensors, and for the strips into which tensors are cut.

    Two, because a thread that waits for its strips must not keep them from being worked on. Use as
    a context manager; no thread is left at its end.
    """

    def __init__(self) -> None:
        count = max(1, min(_MOST_WORKERS, os.cpu_count() or 1))
        self._count = count
        self._tensors = ThreadPoolExecutor(count, thread_name_prefix="qjax-load")
        self._strips = ThreadPoolExecutor(count, thread_name_prefix="qjax-strip")
        # Settings made by context managers belong to a thread.
        self._device = default_device()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._tensors, self._strips):
            pool.shutdown(wait=True, cancel_futures=True)

    def each(self, work: Callable[[T], R], items: Iterable[T], /) -> Iterable[R]:
        """``map`` over the strips of a tensor, to be called by ``work`` of ``in_order``."""
        return self._strips.map(self._with_device(work), items)

    def in_order(
        self, items: Sequence[T], work: Callable[[T], R], size: Callable[[T], int], limit: int
    ) -> Iterator[R]:
        """``map(work, items)``, a few at a time.

        Args:
          items: What to work on.
          work: Called once for each item, by any thread.
          size: Bytes that an item takes while it is worked on.
          limit: Largest sum of sizes of the items that are worked on or wait to be taken, but for
            one item that is larger by itself.

        Yields:
          The results in the order of the items. An exception of ``work`` is raised in the place of
          its result.
        """
        work = self._with_device(work)
        begun: deque[tuple[Future[R], int]] = deque()
        held, following = 0, 0
        while following < len(items) or begun:
            while following < len(items):
                needed = size(items[following])
                if begun and (held + needed > limit or len(begun) > self._count):
                    break
                begun.append((self._tensors.submit(work, items[following]), needed))
                held, following = held + needed, following + 1
            future, needed = begun.popleft()
            yield future.result()
            # Given back only when the consumer comes for the next: until then it holds it.
            held -= needed

    def _with_device(self, work: Callable[[T], R]) -> Callable[[T], R]:
        def call(item: T) -> R:
            with jax.default_device(self._device):
                return work(item)

        return call
