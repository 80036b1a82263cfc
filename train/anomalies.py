"""Non-finite losses, gradients and weights, and loss spikes: what a run does about them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from phi4rv.errors import UserError

PATIENCE = 10  # steps in a row without a finite loss and gradient
WINDOW, MIN_WINDOW = 64, 16  # steps that a loss is compared with: at most, at least
DEVIATIONS = 8  # median absolute deviations; of normal noise 5.4 standard deviations


def check_weights(named: Iterable[tuple[str, Tensor]], source: str) -> None:
    """UserError naming ``source`` and the first tensor that is not finite. Allocates nothing of a tensor's size."""
    for name, tensor in named:
        if tensor.numel() and not all(math.isfinite(x) for x in tensor.detach().aminmax()):
            what = "NaN" if bool(tensor.isnan().any()) else "an infinite number"
            raise UserError(f"{source}: {name} holds {what}; nothing can be trained from it, take another checkpoint")


class SkippedSteps:
    """Counts consecutive skipped steps and ends the run at PATIENCE of them.

    latest_save: gives the folder of the last save. Every save is good: a skipped step leaves the weights as they were.
    """

    def __init__(self, latest_save: Callable[[], Path | None], check: Callable[[], None] = lambda: None):
        self.latest_save, self.check, self.consecutive = latest_save, check, 0

    def add(self, metrics: dict[str, Any]) -> None:
        """UserError at the last of PATIENCE skipped steps; ``check`` may raise a more specific one."""
        step, taken = metrics["step"], math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        self.consecutive = 0 if taken else self.consecutive + 1
        if self.consecutive < PATIENCE:
            return
        self.check()
        saved = self.latest_save()
        good = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved (--save-every)"
        raise UserError(
            f"steps {step - PATIENCE + 1} to {step}: no finite loss and gradient in {PATIENCE} steps in a row, all "
            f"skipped; {good}: write its model with python -m train.export, start from that with --checkpoint and a "
            "lower --lr, or leave out the records that metrics.jsonl lists"
        )


class LossSpikes:
    """Detects losses above the median of the last WINDOW by more than DEVIATIONS median absolute deviations."""

    def __init__(self, losses: Iterable[float] = ()):
        self.recent: deque[float] = deque(losses, maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """The limit that ``loss`` exceeds, or None; ``loss`` then joins the window."""
        limit = None
        if len(self.recent) >= MIN_WINDOW:
            middle = median(self.recent)
            limit = middle + DEVIATIONS * median(abs(x - middle) for x in self.recent)
        self.recent.append(loss)
        return limit if limit is not None and loss > limit else None
