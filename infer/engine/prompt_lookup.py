"""Drafts by prompt lookup (Saxena 2023): what followed the last time that the latest tokens stood there.

OCR and quoting repeat the prompt, reasoning repeats itself. A draft costs nothing to make, and a token is taken only
where the model itself chooses it, so that answers do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRAMS = (3, 2)  # tokens that must agree, the longer first
RETRY = 64  # steps after which the way not taken is tried again
TRIED = 4  # steps in a row
MEMORY = 0.9  # of the moving averages, a step


def lookup(history: Tensor, known: Tensor, count: int) -> Tensor:
    """``count`` guessed tokens behind the first ``known`` (B,) of history (B, L): (B, count), of history's dtype.

    The latest place where the last three tokens stood before, else the last two; what followed is repeated with its
    period where it reaches the end. Anything where there is no such place. No synchronisation with the host.
    """
    width = history.shape[1]
    at = torch.arange(width, device=history.device)
    begin = torch.zeros_like(known)
    period = torch.ones_like(known)
    for size in sorted(GRAMS):  # the longest that is found has the last word
        places = width - size + 1
        tail = history.gather(1, (known[:, None] - size + at[:size]).clamp(min=0).long())
        same = torch.stack([history[:, i : i + places] == tail[:, i : i + 1] for i in range(size)]).all(0)
        same &= at[:places] < (known - size)[:, None]
        last = torch.where(same, at[:places], -1).amax(1)
        begin = torch.where(last >= 0, last + size, begin)
        period = torch.where(last >= 0, known - size - last, period)
    steps = torch.arange(count, device=history.device) % period[:, None]
    return history.gather(1, (begin[:, None] + steps).clamp(max=width - 1).long())


class Payoff:
    """Whether drafting pays, by tokens a second with and without it, both measured as the answers are made."""

    def __init__(self) -> None:
        self._rates: dict[tuple[int, bool], float] = {}
        self._steps: dict[int, int] = {}

    def drafts(self, bucket: int) -> bool:
        """Whether the next step of this batch size should draft: what was faster, now and then the other."""
        step = self._steps[bucket] = self._steps.get(bucket, -1) + 1
        with_, without = (self._rates.get((bucket, drafted)) for drafted in (True, False))
        if with_ is None or without is None:
            return with_ is None
        return (with_ > without) != (step % RETRY < TRIED)

    def record(self, bucket: int, drafted: bool, tokens: int, seconds: float) -> None:
        """What a step brought."""
        rate, key = tokens / max(seconds, 1e-9), (bucket, drafted)
        self._rates[key] = MEMORY * self._rates.get(key, rate) + (1 - MEMORY) * rate
