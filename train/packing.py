"""Filling sequences: which samples share one packed row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
WINDOW = 128  # samples to choose from; with so many lengths some subset nearly always fills a row to the token


def fill_sequences(samples: Iterable[T], length: Callable[[T], int], capacity: int) -> Iterator[list[T]]:
    """Groups of samples whose lengths add up to at most ``capacity`` and as near to it as WINDOW samples allow.

    Lazy and deterministic: reads at most WINDOW samples ahead, and the oldest one waiting is always in the next
    group, so that order is nearly kept and nothing waits for ever. No sample may be longer than ``capacity``.
    """
    waiting: list[T] = []
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
