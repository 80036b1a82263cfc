"""Communication and time of a training step, computed from the configuration and datasheets: not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phi4rv.config import Config
from train.data.flops import Flops, flops_by_part
from train.planning.hardware import GPU
from train.planning.memory import GRADIENT_BYTES, WEIGHT_BYTES, DataStats, ParameterCounts, RunConfig
from train.recipe import Stage

LINK_EFFICIENCY = 0.8  # share of the links' stated speed that collectives reach: assumed


def sample_flops(config: Config, stage: Stage, data: DataStats, run_config: RunConfig) -> tuple[int, int]:
    """(model FLOPs, model FLOPs with recomputation) of a mean sample; see ``train/data/flops.py``.

    ``full`` checkpointing repeats the layers' forward pass, ``selective`` no matrix product; ``offload`` is assumed to
    overlap its copies. ``layerwise`` with exact clipping runs both passes twice: for the norm, and for the updates.

    With adapters the frozen weights have no gradients, and nothing before the decoder runs backward.
    """
    patches = [round(data.patches)] if data.patches >= 1 else []
    parts = flops_by_part(config, [round(data.tokens)], patches, round(data.labelled), stage.trains)
    if run_config.lora_rank:
        halved = {name: Flops(parts[name].forward, parts[name].forward) for name in ("decoder_linear", "lm_head")}
        frozen = {name: Flops(p.forward) for name, p in parts.items() if not name.startswith(("decoder", "lm"))}
        parts = parts | halved | frozen
    useful = sum(parts.values(), Flops()).total
    layers = [part for name, part in parts.items() if name.startswith(("decoder", "vision")) and part.backward]
    recomputed = sum(p.forward for p in layers) if run_config.checkpointing in ("full", "offload") else 0
    twice = run_config.optimizer == "layerwise" and stage.clipping == "exact"
    return useful, (useful + recomputed) * (2 if twice else 1)


def micro_batches(stage: Stage, data: DataStats, run_config: RunConfig) -> tuple[float, int]:
    """(packed sequences of a GPU in a step on average, micro-batches of ``run_config.rows`` sequences it needs)."""
    rows = stage.global_batch * data.tokens / stage.sequence_length / run_config.gpus
    return rows, max(1, math.ceil(rows / run_config.rows - 1e-9))


def collective_bytes(counts: ParameterCounts, run_config: RunConfig, times: int) -> dict[str, float]:
    """Bytes that a GPU sends in a step of ``times`` micro-batches, by collective: a ring sends (N - 1)/N of what it
    gathers or reduces.

    Gradients are reduced in float32 and weights gathered in bfloat16: ``optimizer`` once a step, ``gradients``
    reduces after each backward pass, ``full`` also gathers before each forward and each backward pass. ``none`` reduces
    once and gathers the sums.
    """
    ring = (run_config.gpus - 1) / run_config.gpus
    trained = run_config.lora_rank * counts.lora_dims if run_config.lora_rank else counts.trained
    reductions = 1 if run_config.shard in ("none", "optimizer") else times
    gathers = {"none": trained, "full": counts.all * 2 * times}
    gathered = gathers.get(run_config.shard, counts.all)  # frozen weights are sharded as well
    width = GRADIENT_BYTES if run_config.shard == "none" else WEIGHT_BYTES
    return {"reduce-scatter": ring * GRADIENT_BYTES * trained * reductions, "all-gather": ring * width * gathered}


def link_seconds(sent: float, gpu: GPU, gpus: int) -> tuple[float, float, float]:
    """(bytes to the node's own GPUs, bytes to other nodes, seconds) of ``sent`` bytes of one GPU.

    Over several nodes, each ring leaves a node through one GPU, so that a share of 1/node crosses (NCCL's rings, one a
    network adapter); both links work at the same time.
    """
    across = sent / gpu.node if gpus > gpu.node else 0.0
    inside = sent - across
    return inside, across, max(inside / gpu.nvlink, across / gpu.network) / 1e9 / LINK_EFFICIENCY


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: matrix products, collectives, optimizer update; days of the stage, with communication
    overlapped by computation as far as possible, and without overlap (``days_without_overlap``).
    """

    compute: float
    communication: float
    update: float
    steps: float

    @property
    def step(self) -> float:
        return max(self.compute, self.communication) + self.update

    @property
    def days(self) -> float:
        return self.step * self.steps / 86400

    @property
    def days_without_overlap(self) -> float:
        return (self.compute + self.communication + self.update) * self.steps / 86400


def step_time(
    config: Config,
    stage: Stage,
    counts: ParameterCounts,
    data: DataStats,
    run_config: RunConfig,
    gpu: GPU,
    efficiency: float,
) -> StepTime:
    """efficiency: share of the peak that all products reach, recomputed ones included. Rows are rounded up: with 2.9 of
    them on a GPU, a step takes as long as with 3.
    """
    rows, times = micro_batches(stage, data, run_config)
    total = sample_flops(config, stage, data, run_config)[1]
    whole = times * run_config.rows / rows
    seconds = total * stage.global_batch * whole / run_config.gpus / (efficiency * gpu.tflops * 1e12)
    communication = link_seconds(sum(collective_bytes(counts, run_config, times).values()), gpu, run_config.gpus)[2]
    trained = run_config.lora_rank * counts.lora_dims if run_config.lora_rank else counts.trained
    # Bound by memory bandwidth. adamw reads gradient, master and moments and writes master, moments and weight, 30
    # bytes a parameter; layerwise, after every row, reads gradient, weight and moments and writes weight and moments.
    traffic = 10 * times if run_config.optimizer == "layerwise" else 30
    update = trained / run_config.gpus * traffic / (gpu.bandwidth * 1e9)
    return StepTime(seconds, communication, update, data.samples / stage.global_batch)
