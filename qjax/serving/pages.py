"""Which pages of the KV cache belong to which sequence: bookkeeping on the host.

The rule: a sequence is admitted only when all pages it can ever need, for its prompt and all its
new tokens, are free; they are reserved at once and come back when it ends. So a running sequence
never runs out of pages and nothing is ever preempted or computed twice. The price is that a
sequence which ends early held pages it did not use.
"""

from __future__ import annotations

import numpy as np


def pages_for(length: int, page_size: int) -> int:
    """Pages that ``length`` tokens need."""
    return -(-length // page_size)


class PageTable:
    """Free pages, and the pages of every slot.

    Attributes:
      table: int32 ``(max_seqs, pages_per_seq)``, what the device reads; unused entries hold
        ``num_pages``.
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
        # Popped from the end: the lowest page first, the most recently used one again first.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def fits(self, length: int) -> bool:
        """Whether pages for ``length`` tokens are free now."""
        return pages_for(length, self.page_size) <= len(self._free)

    def reserve(self, slot: int, length: int) -> None:
        """Give a slot pages for ``length`` tokens.

        Raises:
          ValueError: If the slot still holds pages, or the length exceeds the longest sequence or
            the free pages; ask ``fits`` first.
        """
        needed, (_, pages_per_seq) = pages_for(length, self.page_size), self.table.shape
        if self.table[slot, 0] != self.num_pages:
            raise ValueError(f"{slot=} still holds pages; release it first")
        if needed > min(pages_per_seq, len(self._free)):
            raise ValueError(
                f"{length=} needs {needed} pages; {len(self._free)} are free and a sequence can "
                f"have {pages_per_seq}"
            )
        self.table[slot, :needed] = [self._free.pop() for _ in range(needed)]

    def release(self, slot: int) -> None:
        """Take back all pages of a slot."""
        held = self.table[slot][self.table[slot] < self.num_pages]
        self._free.extend(int(page) for page in reversed(held))
        self.table[slot] = self.num_pages
