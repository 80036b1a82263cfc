"""Allocation of the KV cache's pages, and which of them hold a cached prefix. Host only: it knows no tensors.

A page is free, referenced by one or more requests, or evictable: referenced by none, yet found by its hash until it is
needed (PagedAttention, Kwon et al. 2023; prefix caching by a hash of all that precedes, as in vLLM).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

NULL_PAGE = 0  # belongs to no request; takes what is written beyond a request's pages


class PagePool:
    """``num_pages`` pages of ``page_size`` tokens, NULL_PAGE among them."""

    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool = True):
        self.page_size, self.num_usable, self.prefix_cache = page_size, num_pages - 1, prefix_cache
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._ref_counts = [0] * num_pages
        self._page_by_hash: dict[bytes, int] = {}
        self._hash_by_page: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Pages that ``allocate`` could return."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Pages that requests reference."""
        return self.num_usable - self.num_available

    def match_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached prefix of ``hashes``; each gains a reference."""
        found: list[int] = []
        for page_hash in hashes:
            page = self._page_by_hash.get(page_hash)
            if page is None:
                break
            self._evictable.pop(page, None)
            self._ref_counts[page] += 1
            found.append(page)
        return found

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages to write to, evicting the least recently used; None if there are not as many."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._evictable.popitem(last=False)
                del self._page_by_hash[self._hash_by_page.pop(page)]
            self._ref_counts[page] = 1
            pages.append(page)
        return pages

    def cache(self, page: int, page_hash: bytes) -> None:
        """Makes a full page that is in use findable by its hash. Of two with the same hash the first stays cached."""
        if self.prefix_cache and page_hash not in self._page_by_hash and page not in self._hash_by_page:
            self._page_by_hash[page_hash], self._hash_by_page[page] = page, page_hash

    def free(self, pages: Sequence[int]) -> None:
        """Drops one reference to each page. Of a prefix the last pages are evicted first."""
        for page in reversed(pages):
            self._ref_counts[page] -= 1
            if self._ref_counts[page]:
                continue
            if page in self._hash_by_page:
                self._evictable[page] = None
            else:
                self._free.append(page)

    def check(self, pages_by_request: Sequence[Sequence[int]]) -> None:
        """AssertionError unless the state is consistent with the pages of every request."""
        counts = [0] * len(self._ref_counts)
        for pages in pages_by_request:
            assert len(set(pages)) == len(pages), "a request holds a page twice"
            for page in pages:
                counts[page] += 1
        assert counts == self._ref_counts, "reference counts differ from what the requests hold"
        assert counts[NULL_PAGE] == 0, "the null page is held"
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free) and not free & evictable, "a page is free twice"
        idle = {page for page, count in enumerate(counts) if not count and page != NULL_PAGE}
        assert free | evictable == idle, "a page is lost, or free and held"
        assert evictable <= set(self._hash_by_page), "an evictable page has no hash"
        assert not free & set(self._hash_by_page), "a free page has a hash"
        assert self._page_by_hash == {h: page for page, h in self._hash_by_page.items()}, "hashes and pages differ"
