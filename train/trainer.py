"""The step loop: sum gradients over the step's sequences and the ranks, update, report, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from phi4rv.batch import PackedBatch
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from train.data.corpus import Corpus
from train.data.loader import on_device, prefetch
from train.data.reader import Planned
from train.data.stream import Step
from train.distributed.context_parallel import ALONE, Context
from train.distributed.fsdp import passes, with_image
from train.distributed.ranks import Ranks
from train.figures.metrics import Timed, peak_memory, speed
from train.optimizers.adamw import Optimizer, learning_rate
from train.optimizers.layerwise import Layerwise
from train.recipe import PARTS, Stage


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
    on_step: Callable[[dict[str, Any], Step], None],
    peak: float | None = None,
    shard: str = "none",
    stop: Callable[[], bool] = lambda: False,
    context: Context = ALONE,
) -> bool:
    """Runs from the optimizer's step count to ``total``; ``on_step`` gets each step and its metrics on every rank.

    ``peak``: a device's TFLOP/s, which MFU is a share of. ``shard``: how ``parallelize`` cut the model. ``context``:
    the ranks that share this one's rows. Ends early, and returns False, after a step at which ``stop`` holds on some
    rank.
    """
    start = optimizer.steps
    remaining = islice((step for step in source() if step.number > start), total - start)
    pin = model.device.type == "cuda"
    ahead = Timed(prefetch(remaining, corpus, ranks.rank, ranks.world, pin, context))
    began = time.perf_counter()
    for ready in ahead:
        step, number, rows = ready.step, ready.step.number, Timed(ready.batches)
        rate = learning_rate(optimizer.stage, number - 1, total)
        if isinstance(optimizer, Layerwise):
            metrics = take_layerwise_step(model, optimizer, rows, rate)
        else:
            count = 0 if shard == "none" else -(-len(step) // (ranks.world // context.size))
            metrics = take_step(model, optimizer, rows, rate, ranks, shard, count, context)
        seconds = time.perf_counter() - began
        counted = _count(step, optimizer.stage)
        on_step(
            {
                "step": number,
                "steps": total,
                **metrics,
                "lr": rate,
                **counted,
                **speed(counted, seconds, ranks.world, peak),
                "data_wait": ahead.seconds + rows.seconds,
                "memory": peak_memory(model.device),
                "skipped": ready.skipped,
                "records": [planned.where for sequence in step for planned in sequence],
            },
            step,
        )
        if ranks.any(stop()):
            return False
        ahead.seconds, began = 0.0, time.perf_counter()  # on_step may have saved
    return True


def take_step(
    model: Phi4RV,
    optimizer: Optimizer,
    batches: Iterable[PackedBatch],
    rate: float,
    ranks: Ranks,
    shard: str = "none",
    count: int = 0,
    context: Context = ALONE,
) -> dict[str, Any]:
    """One update from this rank's batches. The losses are means over the labelled tokens of all ranks' batches.

    A step whose loss or gradient norm is not finite is skipped, on all ranks: ``skipped_steps`` counts them. The loss
    of a mode that no document has is left out. ``count``: of a sharded model, the most batches that any rank has.
    ``context``: the ranks that share the rows that these batches are parts of.
    """
    # Loss and labelled tokens of all documents and of those that reason; read once, after the last batch.
    sums = torch.zeros(4, dtype=torch.float64, device=model.device)
    moved = on_device(batches, model.device)
    if shard != "none":
        moved = passes(model, shard, moved, count, context)
    elif context.size > 1:  # gradients cross between parts with an image and parts without
        moved = map(with_image, moved)
    for batch in moved:
        loss, losses = model.loss_sum_by_mode(batch)
        if loss.requires_grad:  # not where stage 1 meets text alone: nothing that it trains was used
            loss.backward()
        optimizer.accumulate()
        sums += losses
    if ranks.world > 1:
        dist.all_reduce(sums)
    found = sums.tolist()
    norm = math.nan
    if _finite(found):
        norm = optimizer.step(rate, int(found[1]))
    else:
        optimizer.skip()
    return _figures(found, norm, optimizer.skipped)


def take_layerwise_step(
    model: Phi4RV, optimizer: Layerwise, batches: Iterable[PackedBatch], rate: float
) -> dict[str, Any]:
    """One update from one batch, made while its backward pass runs. A loss that is not finite changes no weight, nor
    does a gradient norm where a pass measures it first.
    """
    held = list(on_device(batches, model.device))
    if len(held) > 1:
        raise ValueError(f"{len(held)} batches; without kept gradients a step has one")
    exact = optimizer.stage.clipping == "exact" or not optimizer.norm  # the first step has no last one
    sums, norm = [0.0] * 4, math.nan
    for measure in (True, False) if exact else (False,):
        loss, losses = model.loss_sum_by_mode(held[0]) if held else (torch.zeros(()), torch.zeros(4))
        sums = losses.tolist()
        if not _finite(sums):
            optimizer.skip()
            return _figures(sums, math.nan, optimizer.skipped)
        optimizer.begin(rate, int(sums[1]), measure)
        if loss.requires_grad:  # not where stage 1 meets text alone
            loss.backward()
        norm = optimizer.finish()
        if not math.isfinite(norm):
            optimizer.skip()
            break
    return _figures(sums, norm, optimizer.skipped)


def _finite(sums: list[float]) -> bool:
    """Whether the step's loss is. UserError if nothing is labelled."""
    if not sums[1]:
        raise UserError("a step without a single labelled token: the data has no answers to learn from")
    return math.isfinite(sums[0])


def _figures(sums: list[float], norm: float, skipped: int) -> dict[str, Any]:
    """Of a step, from loss and labelled tokens of all documents and of those that reason."""
    total, labelled, reasoning, reasoned = sums
    modes = {"loss_reasoning": (reasoning, reasoned), "loss_direct": (total - reasoning, labelled - reasoned)}
    return {
        "loss": total / labelled,
        **{name: part / count for name, (part, count) in modes.items() if count},
        "grad_norm": norm,
        "labelled": labelled,
        "labelled_reasoning": reasoned,
        "skipped_steps": skipped,
    }


def _count(step: Step, stage: Stage) -> dict[str, float]:
    """What the whole step held, on all ranks, and the useful operations that it takes."""
    samples: list[Planned] = [planned for sequence in step for planned in sequence]
    tokens = sum(map(len, samples))
    return {
        "samples": len(samples),
        "sequences": len(step),
        "tokens": tokens,
        "filling": tokens / (len(step) * stage.sequence_length),
        "images": sum(len(p.grids) for p in samples),
        "patches": sum(sum(p.patches) for p in samples),
        "operations": sum(step.costs),
    }
