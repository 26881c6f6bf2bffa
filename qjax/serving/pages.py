"""Which pages of the KV cache belong to which sequence: bookkeeping on the host.

The rule: a sequence is admitted only when all pages it can ever need, for its prompt and all its
new tokens, are free; they are reserved at once and come back when it ends. So a running sequence
never runs out of pages and nothing is ever preempted or computed twice. The price is that a
sequence which ends early held pages it did not use.

Pages are counted by their holders: the sequences in whose rows they stand, and the prefix cache. A
page is free when it has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pages_for(length: int, page_size: int) -> int:
    """Pages that ``length`` tokens need."""
    return -(-length // page_size)


class PageTable:
    """Free pages, and the pages of every slot.

    Attributes:
      table: int32 ``(max_seqs, pages_per_seq)``, what the device reads; unused entries hold
        ``num_pages``.
      holders: int32 ``(num_pages,)``, how many sequences and others hold each page.
    """

    def __init__(self, num_pages: int, page_size: int, max_seqs: int, pages_per_seq: int) -> None:
        """An empty table.

        Args:
          num_pages: Pages of the pool.
          page_size: Tokens per page.
          max_seqs: Slots.
          pages_per_seq: Pages a sequence can have.

        Raises:
          ValueError: If the pool is smaller than one longest sequence.
        """
        if num_pages < pages_per_seq:
            raise ValueError(
                f"{num_pages=} must hold one longest sequence, {pages_per_seq=}; "
                "raise num_pages or lower max_model_len"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.table = np.full((max_seqs, pages_per_seq), num_pages, np.int32)
        self.holders = np.zeros(num_pages, np.int32)
        # Popped from the end: the lowest page first, the most recently used one again first.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def fits(self, length: int) -> bool:
        """Whether pages for ``length`` tokens are free now."""
        return pages_for(length, self.page_size) <= len(self._free)

    def pages_of(self, slot: int) -> list[int]:
        """Pages of a slot, in the order of its tokens."""
        return self.table[slot][self.table[slot] < self.num_pages].tolist()

    def reserve(self, slot: int, length: int, prefix: Sequence[int] = ()) -> None:
        """Give a slot pages for ``length`` tokens.

        Args:
          slot: A slot without pages.
          length: Tokens, those of ``prefix`` included.
          prefix: Pages that others hold and have filled: the slot becomes one more holder of them,
            and nothing else may be written there. The rest is taken from the free pages.

        Raises:
          ValueError: If the slot still holds pages, nobody holds a page of the prefix, or the
            length exceeds the longest sequence or the free pages; ask ``fits`` first.
        """
        needed, (_, pages_per_seq) = pages_for(length, self.page_size), self.table.shape
        if self.table[slot, 0] != self.num_pages:
            raise ValueError(f"{slot=} still holds pages; release it first")
        new = needed - len(prefix)
        if new < 0 or needed > pages_per_seq or new > len(self._free):
            raise ValueError(
                f"{length=} needs {needed} pages, {len(prefix)} of them shared; "
                f"{len(self._free)} are free and a sequence can have {pages_per_seq}"
            )
        self.hold(prefix)
        pages = [self._free.pop() for _ in range(new)]
        self.holders[pages] = 1
        self.table[slot, :needed] = [*prefix, *pages]

    def share(self, slot: int, prefix: Sequence[int]) -> None:
        """Replace the first pages of a slot, in which it has nothing yet, by filled ones of others.

        Raises:
          ValueError: If the slot has fewer pages, or nobody holds a page of the prefix.
        """
        old = self.pages_of(slot)[: len(prefix)]
        if len(old) < len(prefix):
            raise ValueError(f"{slot=} has {len(old)} pages; {len(prefix)} cannot be shared")
        self.hold(prefix)
        self.table[slot, : len(prefix)] = prefix
        self.drop(old)

    def release(self, slot: int) -> None:
        """Take a slot's pages from it; those that nobody else holds are free again."""
        held = self.pages_of(slot)
        self.table[slot] = self.num_pages
        self.drop(held[::-1])

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of each page.

        Raises:
          ValueError: If nobody holds one of them: its contents may be anything.
        """
        for page in pages:
            if self.holders[page] == 0:
                raise ValueError(f"{page=} is free; only pages that someone holds can be shared")
        for page in pages:
            self.holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less of each page.

        Raises:
          ValueError: If nobody holds one of them.
        """
        for page in pages:
            if self.holders[page] == 0:
                raise ValueError(f"{page=} is free already")
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(page)
