"""Filling sequences: which samples share one packed row, and which rows one rank."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
WINDOW = 128  # samples to choose from; with so many lengths some subset nearly always fills a row to the token


def fill_sequences(
    samples: Iterable[T], length: Callable[[T], int], capacity: int, waiting: list[T] | None = None
) -> Iterator[list[T]]:
    """Groups of samples whose lengths add up to at most ``capacity`` and as near to it as WINDOW samples allow.

    Lazy and deterministic: reads at most WINDOW samples ahead, and the oldest one waiting is always in the next
    group, so that order is nearly kept and nothing waits for ever. No sample may be longer than ``capacity``.
    ``waiting``: those that were read and not yet given when an earlier run stopped; kept up to date.
    """
    waiting = [] if waiting is None else waiting
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == WINDOW:
            yield _take(waiting, length, capacity)
    while waiting:
        yield _take(waiting, length, capacity)


def _take(waiting: list[T], length: Callable[[T], int], capacity: int) -> list[T]:
    """Removes from ``waiting``, and returns, its first sample and the fullest set of others beside it."""
    room = capacity - length(waiting[0])
    if room < 0:
        raise ValueError(f"a sample of {length(waiting[0])} tokens does not fit a sequence of {capacity}")
    chosen = {0} | {i + 1 for i in fullest([length(s) for s in waiting[1:]], room)}
    group = [s for i, s in enumerate(waiting) if i in chosen]
    waiting[:] = [s for i, s in enumerate(waiting) if i not in chosen]
    return group


def fullest(lengths: list[int], room: int) -> list[int]:
    """Indices of a subset with the largest sum that is at most ``room`` (subset sum; bit s of ``sums`` is sum s).

    Among equals it prefers the early ones.
    """
    within = (1 << (room + 1)) - 1
    sums = [1]  # sums[i]: what the first i lengths can reach
    for n in lengths:
        sums.append((sums[-1] | sums[-1] << n) & within)
    target = sums[-1].bit_length() - 1
    taken = []
    for i in range(len(lengths), 0, -1):
        if not sums[i - 1] >> target & 1:
            taken.append(i - 1)
            target -= lengths[i - 1]
    return taken[::-1]


def share(costs: Sequence[float], world: int) -> list[list[int]]:
    """For each of ``world`` ranks the rows that it works on, by number: equally many, of equal cost in sum.

    The costliest row goes first, to the rank that has least to do (Graham 1969) among those that still lack a row.
    Each rank so works from its costliest row to its cheapest: ranks that wait for each other after every row wait
    little. One rank keeps the rows' order. Where the rows do not divide, some ranks have one less, or none.
    """
    if world == 1:
        return [list(range(len(costs)))]
    rows: list[list[int]] = [[] for _ in range(world)]
    room = [len(costs) // world + (rank < len(costs) % world) for rank in range(world)]
    least = [(0.0, rank) for rank in range(world) if room[rank]]
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, rank = heapq.heappop(least)
        rows[rank].append(number)
        if len(rows[rank]) < room[rank]:
            heapq.heappush(least, (total + costs[number], rank))
    return rows


def imbalance(costs: Sequence[float], shares: Sequence[Sequence[int]]) -> float:
    """How much longer the busiest rank works than the mean: 0.03 is 3 %."""
    sums = [sum(costs[i] for i in rows) for rows in shares]
    return max(sums) * len(sums) / sum(sums) - 1 if sum(sums) else 0.0
