"""Which request runs where: the waiting line, the slots, and what the next program works on."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from qjax.sampling import SamplingParams
from qjax.serving.pages import PageTable
from qjax.serving.prefix import PageKey, PrefixCache

MIN_CHUNK = 16
"""Shortest prefill chunk that is compiled; shorter prompts are padded to it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
      prompt: Token ids, at least one.
      params: How to choose tokens.
    """

    prompt: Sequence[int]
    params: SamplingParams = SamplingParams()

    @property
    def total(self) -> int:
        """Tokens of prompt and continuation at most."""
        return len(self.prompt) + self.params.max_new_tokens


@dataclasses.dataclass
class Task:
    """A request on its way.

    Attributes:
      request_id: Its number, in order of submission.
      request: The request.
      slot: Its slot while it runs, else None.
      prefilled: Prompt tokens that are in the cache.
      reused: Of these the ones that another request put there.
      shared: Pages at the beginning of the prompt that another request filled.
      started: Whether any of its prompt was processed.
      keys: Of the full pages of its prompt that it may share; empty without a prefix cache.
      tokens: Tokens generated so far, with the end-of-sequence token if that ended it.
      finish_reason: ``stop`` (end-of-sequence token), ``length``, ``error`` or ``cancelled``
        once it has ended.
      error: Why it cannot go on, or None.
    """

    request_id: int
    request: Request
    slot: int | None = None
    prefilled: int = 0
    reused: int = 0
    shared: int = 0
    started: bool = False
    keys: list[PageKey] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.request.params.max_new_tokens - len(self.tokens)


def chunk_length(remaining: int, largest: int) -> int:
    """Compiled chunk length for the next part of a prompt with ``remaining`` tokens left.

    Powers of two from ``MIN_CHUNK`` to ``largest``: few programs, at most half of one padded. It
    depends on nothing but the prompt's own length, so results cannot depend on the batch.
    """
    length = MIN_CHUNK
    while length < min(remaining, largest):
        length *= 2
    return min(length, largest)


def chunk_at(position: int, prompt: int, largest: int) -> tuple[int, int]:
    """Program length and end of the chunk that a token of a prompt is processed in.

    Chunks begin at multiples of ``largest`` in every prompt, so that prompts which begin alike do
    the same work for it.

    Args:
      position: Of the token.
      prompt: Tokens of the prompt.
      largest: Longest chunk.
    """
    begin = position // largest * largest
    length = chunk_length(prompt - begin, largest)
    return length, min(begin + length, prompt)


def page_keys(prompt: Sequence[int], page_size: int, largest: int) -> list[PageKey]:
    """Keys of the full pages of a prompt that it may share with others.

    At least one token is left over: its logits choose the first new token.
    """
    keys = []
    for start in range(0, (len(prompt) - 1) // page_size * page_size, page_size):
        # All chunks but the last have the largest length, so the ends tell those between.
        ends = (start, start + page_size - 1)
        lengths = (chunk_at(position, len(prompt), largest)[0] for position in ends)
        keys.append((*lengths, *prompt[start : start + page_size]))
    return keys


class Scheduler:
    """First come, first served: the first request that does not fit holds up those behind it.

    Attributes:
      waiting: Requests not yet admitted.
      running: The sequence in each slot, or None.
      table_changed: Whether the page table has changed since this was set to False.
    """

    def __init__(
        self,
        pages: PageTable,
        max_seqs: int,
        largest: int,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """No request yet.

        Args:
          pages: Of the KV cache.
          max_seqs: Slots.
          largest: Longest prefill chunk.
          prefix_cache: Where pages of earlier prompts are found, or None.
        """
        self.pages = pages
        self.largest = largest
        self.prefix_cache = prefix_cache
        self.waiting: collections.deque[Task] = collections.deque()
        self.running: list[Task | None] = [None] * max_seqs
        self.table_changed = False

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting) or any(self.running)

    def submit(self, task: Task) -> None:
        """Put a task in the waiting line."""
        if self.prefix_cache is not None:
            task.keys = page_keys(task.request.prompt, self.pages.page_size, self.largest)
        self.waiting.append(task)

    def admit(self) -> list[Task]:
        """Move waiting requests into free slots while their pages are free."""
        admitted = []
        for slot, occupant in enumerate(self.running):
            if not self.waiting:
                break
            if occupant is None:
                if not self._reserve(slot, self.waiting[0]):
                    break
                task = self.waiting.popleft()
                task.slot = slot
                self.running[slot] = task
                self.table_changed = True
                admitted.append(task)
        return admitted

    def _reserve(self, slot: int, task: Task) -> bool:
        """Give a task its pages, if there is room for it."""
        if self.prefix_cache is None:
            if not self.pages.fits(task.request.total):
                return False
            self.pages.reserve(slot, task.request.total)
            return True
        prefix = self.prefix_cache.match(task.keys)
        if not self.prefix_cache.fits(task.request.total, prefix):
            return False
        self.prefix_cache.reserve(slot, task.request.total, prefix)
        self._take_over(task, len(prefix))
        return True

    def _take_over(self, task: Task, pages: int) -> None:
        """Skip the chunks of a prompt that lie in its first pages, which others have filled.

        A chunk that is only partly there is computed as a whole, with the same rows in the same
        program as without sharing. What it writes into shared pages is what is there already.
        """
        task.shared = pages
        start = pages * self.pages.page_size // self.largest * self.largest
        while start % self.pages.page_size:
            start -= self.largest
        task.prefilled = task.reused = start

    def next_chunks(self, rows: int) -> tuple[int, list[Task]]:
        """Chunk length and sequences of the next prefill pass; ``(0, [])`` if none is needed.

        Args:
          rows: Sequences per pass, at chunk length ``MIN_CHUNK``; halved as the length doubles.

        Returns:
          The chunk length of the earliest request, and it with others of the same chunk length.
        """
        unfinished = sorted(
            (s for s in self.running if s and s.prefilled < len(s.request.prompt)),
            key=lambda s: s.request_id,
        )
        if not unfinished:
            return 0, []
        if self.prefix_cache is not None:
            unfinished = self._share(unfinished, self.prefix_cache)

        def length_of(task: Task) -> int:
            return chunk_at(task.prefilled, len(task.request.prompt), self.largest)[0]

        length = length_of(unfinished[0])
        same = [s for s in unfinished if length_of(s) == length]
        return length, same[: rows_at(length, rows, len(self.running))]

    def _share(self, unfinished: list[Task], cache: PrefixCache) -> list[Task]:
        """Let tasks take over what was computed since they were admitted.

        Returns:
          The tasks without those for which waiting pays: a task before them is about to compute at
          least half of what they need.
        """
        ready, next_pages = [], {}
        for task in unfinished:
            assert task.slot is not None
            size = self.pages.page_size
            if not task.started:
                prefix = cache.match(task.keys)
                if len(prefix) > task.shared:
                    self.pages.share(task.slot, prefix)
                    self.table_changed = True
                    self._take_over(task, len(prefix))
            have = task.shared if not task.started else task.prefilled // size
            place = (have, *task.keys[have : have + 1])
            ahead = next_pages.setdefault(place, task)
            if ahead is not task and not task.started and have < len(task.keys):
                pairs = itertools.takewhile(
                    lambda p: p[0] == p[1], zip(ahead.keys, task.keys, strict=False)
                )
                gain = len(list(pairs)) * size // self.largest * self.largest - task.prefilled
                if 2 * gain >= len(task.request.prompt) - task.prefilled:
                    continue
            ready.append(task)
        return ready

    def chunk_done(self, task: Task, end: int) -> None:
        """A task's prompt is in the cache up to ``end``; others may take it over."""
        assert task.slot is not None
        task.prefilled, task.started = end, True
        if self.prefix_cache is not None:
            filled = task.keys[: end // self.pages.page_size]
            self.prefix_cache.insert(filled, self.pages.pages_of(task.slot))

    def decode_steps(self, block: int) -> int:
        """Steps of the next decode block.

        While requests wait, a block ends with the first sequence that reaches its limit, so that
        its slot is refilled at once; otherwise it goes on while any sequence can.
        """
        remaining = [s.remaining for s in self.running if s]
        bound = min(remaining) if self.waiting else max(remaining)
        return min(block, bound)

    def finish(self, task: Task, reason: str) -> None:
        """End a task: its slot and pages are free from now on."""
        assert task.slot is not None
        task.finish_reason = reason
        self.pages.release(task.slot)
        self.running[task.slot] = None
        task.slot = None

    def find(self, request_id: int) -> Task | None:
        """The task of a request that waits or runs; None if there is no such."""
        for task in (*self.waiting, *self.running):
            if task is not None and task.request_id == request_id:
                return task
        return None

    def withdraw(self, task: Task) -> None:
        """Take a task out, wherever it is: its slot and pages are free from now on."""
        if task.slot is not None:
            self.finish(task, "cancelled")
            return
        task.finish_reason = "cancelled"
        self.waiting = collections.deque(t for t in self.waiting if t is not task)


def rows_at(length: int, rows: int, max_seqs: int) -> int:
    """Sequences that share a prefill pass of this chunk length; a function of nothing else."""
    return max(1, min(max_seqs, rows * MIN_CHUNK // length))
