"""Which samples share a packed sequence (subset sum), and which rank gets which row (LPT scheduling)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
WINDOW = 128  # samples to choose from: with so many, some subset nearly always fills a row to the last token


def pack_sequences(
    samples: Iterable[T], length: Callable[[T], int], capacity: int, buffer: list[T] | None = None
) -> Iterator[list[T]]:
    """Groups of samples whose lengths add up to at most ``capacity`` and as near to it as WINDOW samples allow.

    Lazy and deterministic: reads at most WINDOW samples ahead. The oldest sample of the buffer is always in the next
    group, so that order is nearly kept and no sample starves. No sample may be longer than ``capacity``.
    ``buffer``: samples read and not yet packed, of a resumed run too; kept up to date.
    """
    buffer = [] if buffer is None else buffer
    for sample in samples:
        buffer.append(sample)
        if len(buffer) == WINDOW:
            yield _take_sequence(buffer, length, capacity)
    while buffer:
        yield _take_sequence(buffer, length, capacity)


def _take_sequence(buffer: list[T], length: Callable[[T], int], capacity: int) -> list[T]:
    """Removes from ``buffer``, and returns, its first sample and the fullest subset of the others beside it."""
    remaining = capacity - length(buffer[0])
    if remaining < 0:
        raise ValueError(f"a sample of {length(buffer[0])} tokens does not fit a sequence of {capacity}")
    chosen = {0} | {i + 1 for i in fullest_subset([length(s) for s in buffer[1:]], remaining)}
    group = [s for i, s in enumerate(buffer) if i in chosen]
    buffer[:] = [s for i, s in enumerate(buffer) if i not in chosen]
    return group


def fullest_subset(lengths: list[int], capacity: int) -> list[int]:
    """Indices of a subset with the largest sum that is at most ``capacity``; among equals, early ones.

    Subset sum by dynamic programming on bit masks.
    """
    within = (1 << (capacity + 1)) - 1
    sums = [1]  # bit s of sums[i]: whether some of the first i lengths add up to s
    for n in lengths:
        sums.append((sums[-1] | sums[-1] << n) & within)
    target = sums[-1].bit_length() - 1
    taken = []
    for i in range(len(lengths), 0, -1):
        if not sums[i - 1] >> target & 1:
            taken.append(i - 1)
            target -= lengths[i - 1]
    return taken[::-1]


def balance_rows(costs: Sequence[float], world_size: int) -> list[list[int]]:
    """For each of ``world_size`` ranks the numbers of its rows: equally many, of about equal total cost.

    Longest processing time first (Graham 1969): the costliest row goes to the least loaded rank that still lacks one.
    Each rank gets its rows from costliest to cheapest, so that ranks that synchronize after every row wait little. A
    single rank keeps the rows' order. Where the number does not divide evenly, some ranks have one row less, or none.
    """
    if world_size == 1:
        return [list(range(len(costs)))]
    rows: list[list[int]] = [[] for _ in range(world_size)]
    quota = [len(costs) // world_size + (rank < len(costs) % world_size) for rank in range(world_size)]
    heap = [(0.0, rank) for rank in range(world_size) if quota[rank]]
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, rank = heapq.heappop(heap)
        rows[rank].append(number)
        if len(rows[rank]) < quota[rank]:
            heapq.heappush(heap, (total + costs[number], rank))
    return rows


def imbalance(costs: Sequence[float], shares: Sequence[Sequence[int]]) -> float:
    """Load of the busiest rank over the mean, minus 1: 0.03 is 3 %."""
    sums = [sum(costs[i] for i in rows) for rows in shares]
    return max(sums) * len(sums) / sum(sums) - 1 if sum(sums) else 0.0
