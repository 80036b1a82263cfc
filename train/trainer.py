"""The step loop: sum gradients over the step's sequences and the ranks, update, report, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from phi4rv.batch import NO_LABEL, PackedBatch
from phi4rv.errors import UserError
from phi4rv.model import Phi4RV
from train.data import Corpus, Planned, Step, prefetch
from train.layerwise import Layerwise
from train.optimizer import Optimizer, learning_rate
from train.recipe import PARTS, Stage


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


def trainable(model: Phi4RV, stage: Stage) -> dict[str, torch.nn.Parameter]:
    """Freezes what the stage does not train; name -> parameter of the rest that a loss can reach.

    Under ``stage.lora_rank`` that is the adapters alone, which are there already.
    """
    unused = {id(p) for p in model.vision.unused_parameters()}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        assert part in PARTS, name
        if not stage.lora_rank:
            parameter.requires_grad_(part in stage.trains and id(parameter) not in unused)
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def train(
    model: Phi4RV,
    optimizer: Optimizer | Layerwise,
    corpus: Corpus,
    source: Callable[[], Iterator[Step]],
    total: int,
    ranks: Ranks,
    on_step: Callable[[dict[str, Any]], None],
) -> None:
    """Runs from the optimizer's step count to ``total``; ``on_step`` gets each step's metrics (every rank calls it)."""
    start = optimizer.steps
    ahead = prefetch(islice(source(), start, total), corpus, ranks.rank, ranks.world)
    for number, (step, batches, skipped) in enumerate(ahead, start + 1):
        began = time.perf_counter()
        rate = learning_rate(optimizer.stage, number - 1, total)
        if isinstance(optimizer, Layerwise):
            metrics = take_layerwise_step(model, optimizer, batches, rate)
        else:
            metrics = take_step(model, optimizer, batches, rate, ranks)
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
                "skipped": skipped,
            }
        )


def take_step(
    model: Phi4RV, optimizer: Optimizer, batches: list[PackedBatch], rate: float, ranks: Ranks
) -> dict[str, float]:
    """One update from this rank's batches. The loss is the mean over the labelled tokens of all ranks' batches."""
    sums = torch.zeros(2, dtype=torch.float64)  # loss, labelled tokens
    for batch in batches:
        loss, labelled = model.loss_sum(batch.to(model.device, non_blocking=True))
        if loss.requires_grad:  # not where stage 1 meets text alone: nothing that it trains was used
            loss.backward()
        optimizer.accumulate()
        sums += torch.stack([loss.detach().double(), labelled.double()]).cpu()
    if ranks.world > 1:
        sums = sums.to(model.device)
        dist.all_reduce(sums)
    total, labelled_tokens = sums.tolist()
    loss_mean = _mean(total, labelled_tokens, optimizer.steps + 1)
    norm = optimizer.step(rate, int(labelled_tokens))
    return {"loss": loss_mean, "grad_norm": norm, "labelled": labelled_tokens}


def take_layerwise_step(
    model: Phi4RV, optimizer: Layerwise, batches: list[PackedBatch], rate: float
) -> dict[str, float]:
    """One update from one batch, made while its backward pass runs; a loss that is not finite changes no weight."""
    labelled = float(sum((batch.targets() != NO_LABEL).sum() for batch in batches))
    if len(batches) > 1:
        raise ValueError(f"{len(batches)} batches; without kept gradients a step has one")
    exact = optimizer.stage.clipping == "exact" or not optimizer.norm  # the first step has no last one
    for measure in (True, False) if exact else (False,):
        loss = model.loss_sum(batches[0].to(model.device, non_blocking=True))[0] if batches else torch.zeros(())
        loss_mean = _mean(float(loss.detach()), labelled, optimizer.steps + 1)
        optimizer.begin(rate, int(labelled), measure)
        if loss.requires_grad:  # not where stage 1 meets text alone
            loss.backward()
        norm = optimizer.finish()
    return {"loss": loss_mean, "grad_norm": norm, "labelled": labelled}


def _mean(total: float, labelled: float, step: int) -> float:
    """Loss of a labelled token. UserError if there is none or it is not finite."""
    if not labelled:
        raise UserError("a step without a single labelled token: the data has no answers to learn from")
    if not math.isfinite(total / labelled):
        raise UserError(f"step {step}: the loss is {total / labelled}; lower --lr")
    return total / labelled


def _count(step: Step, stage: Stage) -> dict[str, float]:
    """What the whole step held, on all ranks."""
    samples: list[Planned] = [planned for sequence in step for planned in sequence]
    tokens = sum(len(p.sample) for p in samples)
    return {
        "samples": len(samples),
        "sequences": len(step),
        "tokens": tokens,
        "filling": tokens / (len(step) * stage.sequence_length),
        "images": sum(len(p.sample.grids) for p in samples),
        "patches": sum(len(p.sample.image_positions) for p in samples),
    }
