"""The scheduler: requests wait in order, get a place in the batch and pages, and give both up. Host only.

A request is admitted when the pages of all its tokens are available, those of a cached prefix being shared. Decoding
allocates further pages as it goes; where none is left, the request that was admitted last goes back to the head of the
queue and its tokens are computed again later (preemption by recomputation, as in vLLM).
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infer.engine.page_pool import PagePool
from infer.requests.detokenizer import Detokenizer
from infer.requests.outputs import TokenLogprob
from infer.requests.request import Request
from infer.requests.structured_output import StructuredOutput


@dataclass(eq=False)
class RequestState:
    """A request in the engine.

    output_token_ids: those that the host has read. Of the num_prefill_tokens that were known at its admission,
    num_computed_tokens are in the KV cache, or will be once the passes in flight are done. num_tokens_in_flight: tokens
    that launched steps may add at most, by num_steps_in_flight steps. num_cached_pages: pages, from the first on, that
    the prefix cache knows. req_index: its row in the InputBatch, -1 while it waits.
    """

    request_id: int
    request: Request
    max_new_tokens: int
    detokenizer: Detokenizer
    structured_output: StructuredOutput | None = None
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    req_index: int = -1
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_cached_pages: int = 0
    num_prefill_tokens: int = 0
    num_computed_tokens: int = 0
    num_tokens_in_flight: int = 0
    num_steps_in_flight: int = 0
    cached_tokens: int = 0
    image_features: dict[bytes, Tensor] = field(default_factory=dict)
    finished: bool = False
    error: str | None = None
    arrival_time: float = field(default_factory=time.perf_counter)
    scheduled_time: float | None = None
    first_token_time: float | None = None

    def token_ids(self) -> Tensor:
        """(T,) int64: prompt and answer."""
        return torch.cat([self.request.token_ids, torch.tensor(self.output_token_ids, dtype=torch.int64)])

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids) + len(self.output_token_ids)

    @property
    def prefilled(self) -> bool:
        return self.num_computed_tokens >= self.num_prefill_tokens

    @property
    def kv_length(self) -> int:
        """Once it is prefilled: tokens in the KV cache when all steps in flight are done, at most."""
        return self.num_tokens - 1 + self.num_tokens_in_flight


class Scheduler:
    def __init__(self, pool: PagePool, max_running: int):
        self.pool = pool
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []  # in the order of their admission
        self._free_indices = list(range(max_running))[::-1]

    def admit(self) -> list[RequestState]:
        """Moves waiting requests to the batch, in order, as long as there are places and pages."""
        admitted = []
        while self.waiting and self._free_indices:
            state = self.waiting[0]
            token_ids = state.token_ids()
            size, count = self.pool.page_size, len(token_ids)
            cached = self.pool.match_prefix(self._page_hashes(state, token_ids, (count - 1) // size))
            missing = -(-count // size) - len(cached)
            reserve = len(self.running)  # each may soon need one
            may_allocate = missing + reserve <= self.pool.num_available or not self.running
            new = self.pool.allocate(missing) if may_allocate else None
            if new is None:
                self.pool.free(cached)
                break
            self.waiting.popleft()
            self.running.append(state)
            state.req_index, state.pages = self._free_indices.pop(), [*cached, *new]
            state.num_cached_pages = len(cached)
            state.num_prefill_tokens, state.num_computed_tokens = count, len(cached) * size
            admitted.append(state)
        return admitted

    def allocate_pages(self, state: RequestState, num_tokens: int) -> list[int] | None:
        """Allocates the pages that the request lacks for ``num_tokens`` tokens; None if too few are left."""
        new = self.pool.allocate(max(0, -(-num_tokens // self.pool.page_size) - len(state.pages)))
        if new is not None:
            state.pages += new
        return new

    def cache_pages(self, state: RequestState, num_tokens: int) -> None:
        """Adds the pages that the request's first ``num_tokens`` tokens fill to the prefix cache."""
        full = num_tokens // self.pool.page_size
        if self.pool.prefix_cache and full > state.num_cached_pages:
            hashes = self._page_hashes(state, state.token_ids(), full)
            for index in range(state.num_cached_pages, full):
                self.pool.cache(state.pages[index], hashes[index])
            state.num_cached_pages = full

    def preempt(self) -> RequestState:
        """Sends the request that was admitted last back to the head of the queue."""
        state = self.running[-1]
        self._release(state)
        self.waiting.appendleft(state)
        return state

    def remove(self, state: RequestState) -> None:
        """Drops a finished request and frees what it held."""
        if state in self.waiting:
            self.waiting.remove(state)
        else:
            self._release(state)

    def _release(self, state: RequestState) -> None:
        self.running.remove(state)
        self.pool.free(state.pages)
        self._free_indices.append(state.req_index)
        state.req_index, state.pages, state.num_cached_pages = -1, [], 0
        state.num_prefill_tokens, state.num_computed_tokens = 0, 0
        state.image_features.clear()

    def _page_hashes(self, state: RequestState, token_ids: Tensor, count: int) -> list[bytes]:
        """The hashes of the request's first ``count`` pages; [] without a prefix cache."""
        if not self.pool.prefix_cache:
            return []
        size = self.pool.page_size
        for page in range(len(state.page_hashes), count):
            parent = state.page_hashes[-1] if state.page_hashes else b""
            state.page_hashes.append(state.request.page_hash(parent, token_ids, page * size, (page + 1) * size))
        return state.page_hashes[:count]

    def check(self) -> None:
        """AssertionError unless batch indices and pages add up."""
        used = [state.req_index for state in self.running]
        assert len(set(used)) == len(used) and not set(used) & set(self._free_indices), "an index is used twice"
        assert not any(s.pages or s.req_index >= 0 for s in self.waiting), "a waiting request holds something"
        self.pool.check([state.pages for state in self.running])
