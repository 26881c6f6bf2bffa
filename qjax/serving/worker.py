"""An engine in a thread of its own, and its tokens in an event loop.

::

    event loop:  submit, cancel  --commands-->  engine thread:  step, step, ...
                 async for       <---tokens---

Only the thread touches the engine after ``start``. It obeys commands between two steps and sleeps
while there is nothing to do. An error that belongs to a request ends that request; one that breaks
the engine itself ends all of them, and ``failure`` says why.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from qjax.serving.engine import Completion, Engine, EngineStats
from qjax.serving.scheduler import Request

RATE_SECONDS = 10.0
"""Over how long tokens per second are measured."""

Tokens = tuple[int, list[int], str | None]
"""Index of a request among those submitted with it, new tokens, finish reason."""

log = logging.getLogger(__name__)


class RequestFailed(Exception):
    """A request ended without a result."""


class EngineDown(Exception):
    """The engine takes no requests any more."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What the engine was doing after its last step.

    Attributes:
      running: Requests in slots.
      waiting: Requests without one.
      pages_used: KV cache pages that requests hold.
      pages_total: KV cache pages.
      generated: New tokens so far.
      stats: The engine's totals.
      ended: Requests by how they ended: ``stop``, ``length``, ``error``, ``cancelled``.
      times: Time and number of new tokens of the last steps.
    """

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    generated: int
    stats: EngineStats
    ended: dict[str, int]
    times: tuple[tuple[float, int], ...]

    def tokens_per_second(self, now: float) -> float:
        """New tokens of all requests over the last ``RATE_SECONDS``."""
        return sum(n for at, n in self.times if at > now - RATE_SECONDS) / RATE_SECONDS


class TokenFeed:
    """Tokens of some requests as they come: ``async for index, tokens, reason in feed``.

    ``reason`` is None until the last tokens of a request, where it is the finish reason.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        """To be made in the event loop that reads it."""
        self.requests = tuple(requests)
        self.request_ids: list[int] = []  # the thread's
        self._open = set(range(len(requests)))
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Tokens | Exception] = asyncio.Queue()

    def put(self, item: Tokens | Exception) -> None:
        """From the engine's thread: hand over tokens, or an error."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody reads any more
            log.debug("tokens of requests %s came after the event loop's end", self.request_ids)

    def leave(self, index: int) -> None:
        """From the reader: nothing more of this request is wanted."""
        self._open.discard(index)

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        """Index of the request, new tokens and finish reason, until all requests have ended.

        Raises:
          RequestFailed: If a request cannot go on.
          EngineDown: If the engine cannot.
        """
        while self._open:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            index, _, reason = item
            if index in self._open:  # else it was left
                if reason is not None:
                    self._open.discard(index)
                yield item


class EngineThread:
    """Runs an engine.

    Attributes:
      load: The newest figures; replaced as a whole, so any thread may read it.
      failure: What broke the engine, or None.
    """

    def __init__(self, engine: Engine) -> None:
        """Of an engine that nobody else uses."""
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._feeds: dict[int, tuple[TokenFeed, int]] = {}
        self._ended: collections.Counter[str] = collections.Counter()
        self._times: collections.deque[tuple[float, int]] = collections.deque()
        self._generated = 0
        self._closed = False
        self._lock = threading.Lock()  # orders submissions and the end
        self.failure: str | None = None
        self.load = self._measure()
        self._thread = threading.Thread(target=self._run, name="qjax-engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> TokenFeed:
        """Send requests to the engine, all or none; to be called in the event loop.

        Raises:
          ValueError: If one of them cannot run in this engine.
          EngineDown: If the engine is broken or closed.
        """
        for request in requests:
            self._engine.check(request)  # reads nothing that changes
        feed = TokenFeed(requests)
        with self._lock:
            if self._closed:
                raise EngineDown(self._why)
            self._commands.put(lambda: self._begin(feed))
        return feed

    def cancel(self, feed: TokenFeed, index: int | None = None) -> None:
        """Take out one request of a feed or all; nothing happens to those that have ended."""
        for i in range(len(feed.requests)) if index is None else (index,):
            feed.leave(i)
            self._commands.put(lambda i=i: self._end(feed, i))

    def close(self, timeout: float = 60.0) -> bool:
        """End all requests and the thread; returns whether it ended within ``timeout`` seconds."""
        self._commands.put(self._shut)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    self._step()
                self.load = self._measure()
        except Exception as error:
            log.exception("the engine failed")
            self.failure = f"the engine failed ({type(error).__name__}): restart the server"
            self._shut()

    def _obey(self) -> bool:
        """Carry out commands, waiting for one if there is no work; False at the end."""
        while not self._closed and not (self._commands.empty() and self._engine.has_work):
            self._commands.get()()
            self.load = self._measure()
        return not self._closed

    def _step(self) -> None:
        count = 0

        def new_tokens(request_id: int, tokens: list[int], reason: str | None) -> None:
            nonlocal count
            count += len(tokens)
            if reason != "error":
                feed, index = self._feeds[request_id]
                feed.put((index, tokens, reason))

        completions: list[Completion] = self._engine.step(new_tokens)
        self._generated += count
        now = time.monotonic()
        self._times.append((now, count))
        while self._times[0][0] < now - RATE_SECONDS:
            self._times.popleft()
        for completion in completions:
            feed, _ = self._feeds.pop(completion.request_id)
            self._ended[completion.finish_reason] += 1
            if completion.error is not None:
                feed.put(RequestFailed(completion.error))

    def _begin(self, feed: TokenFeed) -> None:
        if self._closed:
            feed.put(EngineDown(self._why))
            return
        for index, request in enumerate(feed.requests):
            request_id = self._engine.submit(request)
            feed.request_ids.append(request_id)
            self._feeds[request_id] = feed, index

    def _end(self, feed: TokenFeed, index: int) -> None:
        if self._closed or not self._engine.cancel(feed.request_ids[index]):
            return
        del self._feeds[feed.request_ids[index]]
        self._ended["cancelled"] += 1

    def _shut(self) -> None:
        """The end: whoever waits is told."""
        with self._lock:
            self._closed = True
        while not self._commands.empty():
            self._commands.get()()
        for feed, _ in self._feeds.values():
            feed.put(EngineDown(self._why))
        self._feeds.clear()

    @property
    def _why(self) -> str:
        return self.failure or "the server is shutting down"

    def _measure(self) -> Load:
        engine = self._engine
        total = engine.config.total_pages
        return Load(
            running=engine.num_running,
            waiting=engine.num_waiting,
            pages_used=total - engine.free_pages,
            pages_total=total,
            generated=self._generated,
            stats=dataclasses.replace(engine.stats),
            ended=dict(self._ended),
            times=tuple(self._times),
        )
