"""Which request runs where: the waiting line, the slots, and what the next program works on."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from qjax.sampling import SamplingParams
from qjax.serving.pages import PageTable

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
      tokens: Tokens generated so far, with the end-of-sequence token if that ended it.
      finish_reason: ``stop`` (end-of-sequence token) or ``length`` once it has ended.
    """

    request_id: int
    request: Request
    slot: int | None = None
    prefilled: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

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


class Scheduler:
    """First come, first served: the first request that does not fit holds up those behind it.

    Attributes:
      waiting: Requests not yet admitted.
      running: The sequence in each slot, or None.
    """

    def __init__(self, pages: PageTable, max_seqs: int) -> None:
        self.pages = pages
        self.waiting: collections.deque[Task] = collections.deque()
        self.running: list[Task | None] = [None] * max_seqs

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting) or any(self.running)

    def admit(self) -> list[Task]:
        """Move waiting requests into free slots while their pages are free."""
        admitted = []
        for slot, occupant in enumerate(self.running):
            if not self.waiting or not self.pages.fits(self.waiting[0].request.total):
                break
            if occupant is None:
                task = self.waiting.popleft()
                self.pages.reserve(slot, task.request.total)
                task.slot = slot
                self.running[slot] = task
                admitted.append(task)
        return admitted

    def next_chunks(self, largest: int, rows: int) -> tuple[int, list[Task]]:
        """Chunk length and sequences of the next prefill pass; ``(0, [])`` if none is needed.

        Args:
          largest: Longest chunk.
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

        def length_of(task: Task) -> int:
            return chunk_length(len(task.request.prompt) - task.prefilled, largest)

        length = length_of(unfinished[0])
        same = [s for s in unfinished if length_of(s) == length]
        return length, same[: rows_at(length, rows, len(self.running))]

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


def rows_at(length: int, rows: int, max_seqs: int) -> int:
    """Sequences that share a prefill pass of this chunk length; a function of nothing else."""
    return max(1, min(max_seqs, rows * MIN_CHUNK // length))
