"""Who runs: requests wait in order, get a slot and pages, and give both up. Host only.

A request is admitted when the pages of all its known tokens are there, those of a known prefix being shared. Decoding
takes pages as it goes; where none is left, the request that came last goes back to the head of the queue and its
tokens are computed again later (recomputation, as in vLLM).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infer.engine.page_pool import PagePool
from infer.requests.detokenizer import TextStream
from infer.requests.prepare import Request
from infer.requests.request import TokenLogprob
from infer.requests.structured_output import Guide


@dataclass(eq=False)
class Running:
    """A request under way. ``answer``: the tokens that the host knows. Of its ``target`` tokens known when it was
    admitted, ``done`` are in the cache or will be by what has been launched; in_flight: tokens that launched steps may
    bring at most, of ``steps`` steps.
    """

    number: int
    request: Request
    room: int
    stream: TextStream
    guide: Guide | None = None
    answer: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    target: int = 0
    done: int = 0
    in_flight: int = 0
    steps: int = 0
    cached_tokens: int = 0
    features: dict[bytes, Tensor] = field(default_factory=dict)
    finished: bool = False
    error: str | None = None
    submitted: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None

    def known(self) -> Tensor:
        """(T,) int64: prompt and answer."""
        return torch.cat([self.request.ids, torch.tensor(self.answer, dtype=torch.int64)])

    @property
    def length(self) -> int:
        return len(self.request.ids) + len(self.answer)

    @property
    def prefilled(self) -> bool:
        return self.done >= self.target

    @property
    def rows(self) -> int:
        """Rows of the cache that are filled, once it is prefilled, and all that is in flight has come."""
        return self.length - 1 + self.in_flight


class Scheduler:
    def __init__(self, pool: PagePool, slots: int):
        self.pool = pool
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # in the order of their admission
        self._free_slots = list(range(slots))[::-1]

    def admit(self) -> list[Running]:
        """Moves waiting requests to slots, in order, as long as there are slots and pages."""
        admitted = []
        while self.waiting and self._free_slots:
            entry = self.waiting[0]
            known = entry.known()
            pages = self.pool.match(self._keys(entry, known, (len(known) - 1) // self.pool.size))
            more = -(-len(known) // self.pool.size) - len(pages)
            spare = len(self.running)  # each may soon need one
            taken = self.pool.take(more) if more + spare <= self.pool.available or not self.running else None
            if taken is None:
                self.pool.release(pages)
                break
            self.waiting.popleft()
            self.running.append(entry)
            entry.slot, entry.pages, entry.published = self._free_slots.pop(), [*pages, *taken], len(pages)
            entry.target, entry.done = len(known), len(pages) * self.pool.size
            admitted.append(entry)
        return admitted

    def grow(self, entry: Running, rows: int) -> list[int] | None:
        """The pages that the request lacks for ``rows`` rows of the cache, now its own; None if there are too few."""
        taken = self.pool.take(max(0, -(-rows // self.pool.size) - len(entry.pages)))
        if taken is not None:
            entry.pages += taken
        return taken

    def publish(self, entry: Running, rows: int) -> None:
        """Makes the pages known that ``rows`` rows fill."""
        full = rows // self.pool.size
        if self.pool.prefix_cache and full > entry.published:
            keys = self._keys(entry, entry.known(), full)
            for index in range(entry.published, full):
                self.pool.publish(entry.pages[index], keys[index])
            entry.published = full

    def preempt(self) -> Running:
        """Sends the request that was admitted last back to the head of the queue."""
        entry = self.running[-1]
        self._leave(entry)
        self.waiting.appendleft(entry)
        return entry

    def remove(self, entry: Running) -> None:
        """The request is over; what it held is free."""
        if entry in self.waiting:
            self.waiting.remove(entry)
        else:
            self._leave(entry)

    def _leave(self, entry: Running) -> None:
        self.running.remove(entry)
        self.pool.release(entry.pages)
        self._free_slots.append(entry.slot)
        entry.slot, entry.pages, entry.target, entry.done, entry.published = -1, [], 0, 0, 0
        entry.features.clear()

    def _keys(self, entry: Running, known: Tensor, pages: int) -> list[bytes]:
        if not self.pool.prefix_cache:
            return []
        size = self.pool.size
        for page in range(len(entry.keys), pages):
            before = entry.keys[-1] if entry.keys else b""
            entry.keys.append(entry.request.page_key(before, known, page * size, (page + 1) * size))
        return entry.keys[:pages]

    def check(self) -> None:
        """AssertionError unless slots and pages add up."""
        slots = [entry.slot for entry in self.running]
        assert len(set(slots)) == len(slots) and not set(slots) & set(self._free_slots), "a slot is held twice"
        assert not any(entry.pages or entry.slot >= 0 for entry in self.waiting), "a waiting request holds something"
        self.pool.check([entry.pages for entry in self.running])
