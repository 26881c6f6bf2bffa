"""Full pages of earlier prompts, found again by their tokens: a radix tree over pages.

Every node is one page; its path from the root is all that the page's keys and values depend on:
the tokens, and the lengths of the prefill chunks that computed them. The latter because a matrix
product may round differently with another number of rows: a prompt takes over a page only where it
would have computed it with the same program, so that its result does not depend, to the bit, on
what ran before.

The tree is a holder of its pages (``PageTable.hold``): they stay when the sequence that filled them
ends, until their room is needed. A sequence that uses a page uses all pages on its path, so the
pages that only the tree holds are whole subtrees, and can go leaf by leaf, the longest unused
first.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

from qjax.serving.pages import PageTable, pages_for

PageKey = tuple[int, ...]
"""What a page depends on beside the pages before it."""


@dataclasses.dataclass(eq=False)
class _Node:
    page: int
    key: PageKey
    parent: _Node | None
    children: dict[PageKey, _Node] = dataclasses.field(default_factory=dict)
    used: int = 0


class PrefixCache:
    """Which pages hold which beginnings of prompts."""

    def __init__(self, pages: PageTable) -> None:
        """An empty tree over the pages of a table."""
        self._pages = pages
        self._root = _Node(-1, (), None)
        self._nodes: dict[int, _Node] = {}  # by page
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        """Pages in the tree."""
        return len(self._nodes)

    @property
    def idle_pages(self) -> int:
        """Pages that only the tree holds."""
        return sum(self._pages.holders[page] == 1 for page in self._nodes)

    def match(self, keys: Sequence[PageKey]) -> list[int]:
        """Pages of the longest known beginning of a prompt with these page keys."""
        node, found, now = self._root, [], next(self._clock)
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            child.used = now
            found.append(child.page)
            node = child
        return found

    def insert(self, keys: Sequence[PageKey], pages: Sequence[int]) -> None:
        """Remember full pages of a prompt, from its beginning on.

        Args:
          keys: Keys of the pages that are filled.
          pages: At least as many pages of the sequence. Where the tree has an equal one it stays,
            and the sequence goes on with its own.
        """
        node, now = self._root, next(self._clock)
        for key, page in zip(keys, pages, strict=False):
            child = node.children.get(key)
            if child is None:
                self._pages.hold([page])
                child = node.children[key] = _Node(page, key, node)
                self._nodes[page] = child
            child.used = now
            node = child

    def fits(self, length: int, prefix: Sequence[int]) -> bool:
        """Whether a sequence that shares ``prefix`` has room, once what nobody uses is evicted."""
        needed = pages_for(length, self._pages.page_size) - len(prefix)
        missing = needed - self._pages.free_pages
        if missing <= 0:
            return True
        kept = sum(self._pages.holders[page] == 1 for page in prefix)
        return missing <= self.idle_pages - kept

    def reserve(self, slot: int, length: int, prefix: Sequence[int]) -> None:
        """``PageTable.reserve`` after evicting as many pages as it needs; ask ``fits`` first."""
        self._pages.hold(prefix)  # or they might be evicted
        self.evict(pages_for(length, self._pages.page_size) - len(prefix) - self._pages.free_pages)
        self._pages.reserve(slot, length, prefix)
        self._pages.drop(prefix)

    def evict(self, count: int) -> int:
        """Forget up to ``count`` pages that no sequence uses; returns how many."""
        if count <= 0:
            return 0
        holders = self._pages.holders
        leaves = [
            (node.used, page)
            for page, node in self._nodes.items()
            if not node.children and holders[page] == 1
        ]
        heapq.heapify(leaves)
        done = 0
        while leaves and done < count:
            _, page = heapq.heappop(leaves)
            node = self._nodes.pop(page)
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            self._pages.drop([page])
            done += 1
            if parent is not self._root and not parent.children and holders[parent.page] == 1:
                heapq.heappush(leaves, (parent.used, parent.page))
        return done
