"""The step loop: sum gradients over the step's sequences and the ranks, update, report, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from phi4rv.batch import PackedBatch
from phi4rv.errors import UserError
from phi4rv.model import Phi4RV
from train.data import Corpus
from train.loader import on_device, prefetch
from train.optimizer import Optimizer, learning_rate
from train.reader import Planned
from train.recipe import PARTS, Stage
from train.stream import Step


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


def trainable(model: Phi4RV, stage: Stage) -> dict[str, torch.nn.Parameter]:
    """Freezes what the stage does not train; name -> parameter of the rest that a loss can reach."""
    unused = {id(p) for p in model.vision.unused_parameters()}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        assert part in PARTS, name
        parameter.requires_grad_(part in stage.trains and id(parameter) not in unused)
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def train(
    model: Phi4RV,
    optimizer: Optimizer,
    corpus: Corpus,
    source: Callable[[], Iterator[Step]],
    total: int,
    ranks: Ranks,
    on_step: Callable[[dict[str, Any], Step], None],
) -> None:
    """Runs from the optimizer's step count to ``total``; ``on_step`` gets each step and its metrics on every rank."""
    start = optimizer.steps
    remaining = islice((step for step in source() if step.number > start), total - start)
    for ready in prefetch(remaining, corpus, ranks.rank, ranks.world, model.device.type == "cuda"):
        step, number = ready.step, ready.step.number
        began = time.perf_counter()
        rate = learning_rate(optimizer.stage, number - 1, total)
        metrics = take_step(model, optimizer, ready.batches, rate, ranks)
        seconds = time.perf_counter() - began
        counted = _count(step, optimizer.stage)
        on_step(
            {
                "step": number,
                "steps": total,
                **metrics,
                "lr": rate,
                **counted,
                "seconds": seconds,
                "tokens_per_second": counted["tokens"] / seconds,
                "images_per_second": counted["images"] / seconds,
                "skipped": ready.skipped,
            },
            step,
        )


def take_step(
    model: Phi4RV, optimizer: Optimizer, batches: Iterable[PackedBatch], rate: float, ranks: Ranks
) -> dict[str, float]:
    """One update from this rank's batches. The loss is the mean over the labelled tokens of all ranks' batches."""
    sums = torch.zeros(2, dtype=torch.float64, device=model.device)  # loss, labelled tokens
    for batch in on_device(batches, model.device):
        loss, labelled = model.loss_sum(batch)
        if loss.requires_grad:  # not where stage 1 meets text alone: nothing that it trains was used
            loss.backward()
        optimizer.accumulate()
        sums += torch.stack([loss.detach().double(), labelled.double()])  # not read here: the device would wait
    if ranks.world > 1:
        dist.all_reduce(sums)
    total, labelled_tokens = sums.tolist()
    if not labelled_tokens:
        raise UserError("a step without a single labelled token: the data has no answers to learn from")
    loss_mean = total / labelled_tokens
    if not math.isfinite(loss_mean):
        raise UserError(f"step {optimizer.steps + 1}: the loss is {loss_mean}; lower --lr")
    norm = optimizer.step(rate, int(labelled_tokens))
    return {"loss": loss_mean, "grad_norm": norm, "labelled": labelled_tokens}


def _count(step: Step, stage: Stage) -> dict[str, float]:
    """What the whole step held, on all ranks."""
    samples: list[Planned] = [planned for sequence in step for planned in sequence]
    tokens = sum(map(len, samples))
    return {
        "samples": len(samples),
        "sequences": len(step),
        "tokens": tokens,
        "filling": tokens / (len(step) * stage.sequence_length),
        "images": sum(len(p.grids) for p in samples),
        "patches": sum(sum(p.patches) for p in samples),
    }
