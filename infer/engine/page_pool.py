"""Whose the pages of the cache are, and which of them hold a known prefix. Host only: it knows no tensors.

A page is free, held by one or more requests, or kept: held by nobody, yet found by its key until it is needed
(PagedAttention, Kwon et al. 2023; prefix caching by a hash of all that precedes, as in vLLM).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

SCRATCH = 0  # takes what rows beyond a request's pages write; nobody's


class PagePool:
    """``pages`` pages of ``size`` tokens, page SCRATCH aside."""

    def __init__(self, pages: int, size: int, prefix_cache: bool = True):
        self.size, self.total, self.prefix_cache = size, pages - 1, prefix_cache
        self._free = list(range(pages - 1, SCRATCH, -1))
        self._holders = [0] * pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Pages that ``take`` could give."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Pages that requests hold."""
        return self.total - self.available

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest known run of ``keys`` from the first on, held once more each."""
        found: list[int] = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            self._kept.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found

    def take(self, count: int) -> list[int] | None:
        """``count`` pages to write to, or None if there are not as many. Kept ones are forgotten, oldest first."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._by_key[self._key_of.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Says that a held page is full and what it holds. Of two with the same key the first stays known."""
        if self.prefix_cache and key not in self._by_key and page not in self._key_of:
            self._by_key[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold on each page. Of a prefix the last pages are forgotten first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._kept[page] = None
            else:
                self._free.append(page)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """AssertionError unless the books fit ``held``, the pages of every request."""
        counts = [0] * len(self._holders)
        for pages in held:
            assert len(set(pages)) == len(pages), "a request holds a page twice"
            for page in pages:
                counts[page] += 1
        assert counts == self._holders, "pages are held by others than the requests"
        assert counts[SCRATCH] == 0, "the scratch page is held"
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free) and not free & kept, "a page is free twice"
        idle = {page for page, count in enumerate(counts) if not count and page != SCRATCH}
        assert free | kept == idle, "a page is lost, or free and held"
        assert kept <= set(self._key_of) and not free & set(self._key_of), "kept pages are those with keys"
        assert self._by_key == {key: page for page, key in self._key_of.items()}, "keys and pages do not fit"
