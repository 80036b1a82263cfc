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
from train.data.loader import prefetch, prefetch_to_device
from train.data.packed_dataset import PackedDataset
from train.data.reader import SampleInfo
from train.data.stream import GlobalBatch
from train.distributed.context_parallel import NO_CONTEXT_PARALLEL, ContextParallel
from train.distributed.fsdp import fsdp_micro_batches, with_dummy_image
from train.distributed.ranks import Ranks
from train.figures.metrics import TimedIterator, peak_memory, throughput
from train.optimizers.adamw import AdamW, learning_rate
from train.optimizers.layerwise import LayerwiseAdamW
from train.recipe import Stage


def train(
    model: Phi4RV,
    optimizer: AdamW | LayerwiseAdamW,
    dataset: PackedDataset,
    make_batches: Callable[[], Iterator[GlobalBatch]],
    total: int,
    ranks: Ranks,
    on_step: Callable[[dict[str, Any], GlobalBatch], None],
    peak_tflops: float | None = None,
    shard: str = "none",
    should_stop: Callable[[], bool] = lambda: False,
    cp: ContextParallel = NO_CONTEXT_PARALLEL,
) -> bool:
    """Runs from the optimizer's step count to ``total``; ``on_step`` gets the metrics and the batch of each step, on
    every rank.

    ``peak_tflops``: of a device, the denominator of MFU. ``shard``: how ``parallelize`` sharded the model. ``cp``: the
    ranks that share this one's rows. Ends early, and returns False, after a step at which ``should_stop`` is True on
    any rank.
    """
    done = optimizer.steps
    remaining = islice((batch for batch in make_batches() if batch.step > done), total - done)
    pin = model.device.type == "cuda"
    prefetched = TimedIterator(prefetch(remaining, dataset, ranks.rank, ranks.world_size, pin, cp))
    start = time.perf_counter()
    for current in prefetched:
        batch, rows = current.global_batch, TimedIterator(current.batches)
        lr = learning_rate(optimizer.stage, batch.step - 1, total)
        if isinstance(optimizer, LayerwiseAdamW):
            metrics = train_step_layerwise(model, optimizer, rows, lr)
        else:
            micro_batches = 0 if shard == "none" else -(-len(batch) // (ranks.world_size // cp.size))
            metrics = train_step(model, optimizer, rows, lr, ranks, shard, micro_batches, cp)
        seconds = time.perf_counter() - start
        stats = _batch_stats(batch, optimizer.stage)
        on_step(
            {
                "step": batch.step,
                "steps": total,
                **metrics,
                "lr": lr,
                **stats,
                **throughput(stats, seconds, ranks.world_size, peak_tflops),
                "data_wait": prefetched.seconds + rows.seconds,
                "memory": peak_memory(model.device),
                "skipped": current.skipped,
                "records": [info.where for sequence in batch for info in sequence],
            },
            batch,
        )
        if ranks.any(should_stop()):
            return False
        prefetched.seconds, start = 0.0, time.perf_counter()  # on_step may have saved
    return True


def train_step(
    model: Phi4RV,
    optimizer: AdamW,
    batches: Iterable[PackedBatch],
    lr: float,
    ranks: Ranks,
    shard: str = "none",
    micro_batches: int = 0,
    cp: ContextParallel = NO_CONTEXT_PARALLEL,
) -> dict[str, Any]:
    """One update from this rank's batches. The losses are means over the labelled tokens of all ranks' batches.

    A step whose loss or gradient norm is not finite is skipped on all ranks; ``skipped_steps`` counts them. The loss of
    a mode that no document has is left out. ``micro_batches``: of a sharded model, the most batches that any rank has.
    ``cp``: the ranks that share the rows that these batches are shards of.
    """
    # Loss and labelled tokens of all documents and of those that reason; read once, after the last batch.
    sums = torch.zeros(4, dtype=torch.float64, device=model.device)
    on_device = prefetch_to_device(batches, model.device)
    if shard != "none":
        on_device = fsdp_micro_batches(model, shard, on_device, micro_batches, cp)
    elif cp.size > 1:  # all-to-all's backward pass needs every rank, also those whose shard has no image
        on_device = map(with_dummy_image, on_device)
    for batch in on_device:
        loss, losses = model.loss_sum_by_mode(batch)
        if loss.requires_grad:  # stage 1 trains nothing that a row without an image uses
            loss.backward()
        optimizer.accumulate()
        sums += losses
    if ranks.world_size > 1:
        dist.all_reduce(sums)
    totals = sums.tolist()
    norm = math.nan
    if _loss_is_finite(totals):
        norm = optimizer.step(lr, int(totals[1]))
    else:
        optimizer.skip()
    return _step_metrics(totals, norm, optimizer.skipped)


def train_step_layerwise(
    model: Phi4RV, optimizer: LayerwiseAdamW, batches: Iterable[PackedBatch], lr: float
) -> dict[str, Any]:
    """One update from one batch, made during its backward pass. A loss that is not finite changes no weight, nor does
    a gradient norm that is measured in a pass before.
    """
    on_device = list(prefetch_to_device(batches, model.device))
    if len(on_device) > 1:
        raise ValueError(f"{len(on_device)} batches; a layerwise step cannot accumulate gradients, it takes one")
    exact = optimizer.stage.clipping == "exact" or not optimizer.norm  # the first step has no previous norm
    sums, norm = [0.0] * 4, math.nan
    for norm_only in (True, False) if exact else (False,):
        loss, losses = model.loss_sum_by_mode(on_device[0]) if on_device else (torch.zeros(()), torch.zeros(4))
        sums = losses.tolist()
        if not _loss_is_finite(sums):
            optimizer.skip()
            return _step_metrics(sums, math.nan, optimizer.skipped)
        optimizer.begin_step(lr, int(sums[1]), norm_only)
        if loss.requires_grad:
            loss.backward()
        norm = optimizer.finish_step()
        if not math.isfinite(norm):
            optimizer.skip()
            break
    return _step_metrics(sums, norm, optimizer.skipped)


def _loss_is_finite(sums: list[float]) -> bool:
    """UserError if no token is labelled."""
    if not sums[1]:
        raise UserError("a step without a single labelled token: the data has no answers to learn from")
    return math.isfinite(sums[0])


def _step_metrics(sums: list[float], norm: float, skipped: int) -> dict[str, Any]:
    """Metrics of a step from loss and labelled tokens, of all documents and of those that reason."""
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


def _batch_stats(batch: GlobalBatch, stage: Stage) -> dict[str, float]:
    """Counts of the global batch, over all ranks, and its model FLOPs."""
    samples: list[SampleInfo] = [info for sequence in batch for info in sequence]
    tokens = sum(map(len, samples))
    return {
        "samples": len(samples),
        "sequences": len(batch),
        "tokens": tokens,
        "filling": tokens / (len(batch) * stage.sequence_length),
        "images": sum(len(p.grids) for p in samples),
        "patches": sum(sum(p.patches) for p in samples),
        "operations": sum(batch.row_flops),
    }
