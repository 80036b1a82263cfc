"""Speculative decoding by prompt lookup (Saxena 2023): the draft is what followed the latest tokens where they occurred
last.

OCR and quoting repeat the prompt, reasoning repeats itself. A draft costs nothing to make, and a token is accepted only
where the model itself samples it, so that answers do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

NGRAM_SIZES = (3, 2)  # tokens that must match, the longer first
RETRY_INTERVAL = 64  # steps after which the slower way is tried again
RETRY_STEPS = 4  # steps in a row
DECAY = 0.9  # of the moving averages, a step


def propose_draft(history: Tensor, num_tokens: Tensor, count: int) -> Tensor:
    """``count`` draft tokens behind the first ``num_tokens`` (B,) of history (B, L): (B, count), of history's dtype.

    The latest place where the last three tokens occurred before, else the last two; what followed is repeated with its
    period where it reaches the end. Arbitrary where there is no such place. No synchronisation with the host.
    """
    width = history.shape[1]
    at = torch.arange(width, device=history.device)
    begin = torch.zeros_like(num_tokens)
    period = torch.ones_like(num_tokens)
    for size in sorted(NGRAM_SIZES):  # the longest match overwrites shorter ones
        places = width - size + 1
        tail = history.gather(1, (num_tokens[:, None] - size + at[:size]).clamp(min=0).long())
        same = torch.stack([history[:, i : i + places] == tail[:, i : i + 1] for i in range(size)]).all(0)
        same &= at[:places] < (num_tokens - size)[:, None]
        last = torch.where(same, at[:places], -1).amax(1)
        begin = torch.where(last >= 0, last + size, begin)
        period = torch.where(last >= 0, num_tokens - size - last, period)
    steps = torch.arange(count, device=history.device) % period[:, None]
    return history.gather(1, (begin[:, None] + steps).clamp(max=width - 1).long())


class DynamicSpeculation:
    """Decides for each batch size whether to draft, by tokens a second measured with and without."""

    def __init__(self) -> None:
        self._rates: dict[tuple[int, bool], float] = {}
        self._steps: dict[int, int] = {}

    def should_draft(self, batch_size: int) -> bool:
        """Whether the next step of this batch size should draft: what was faster, now and then the other."""
        step = self._steps[batch_size] = self._steps.get(batch_size, -1) + 1
        with_, without = (self._rates.get((batch_size, drafted)) for drafted in (True, False))
        if with_ is None or without is None:
            return with_ is None
        return (with_ > without) != (step % RETRY_INTERVAL < RETRY_STEPS)

    def record(self, batch_size: int, drafted: bool, num_tokens: int, seconds: float) -> None:
        """The tokens that a step generated, and its time."""
        rate, key = num_tokens / max(seconds, 1e-9), (batch_size, drafted)
        self._rates[key] = DECAY * self._rates.get(key, rate) + (1 - DECAY) * rate
