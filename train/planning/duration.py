"""Communication and time of a training step, computed from the configuration and the makers' figures: not measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from phi4rv.config import Config
from train.data.flops import Operations, operations_by_part
from train.planning.hardware import GPU
from train.planning.memory import SUM, WEIGHT, Data, Setting, Sizes
from train.recipe import Stage

LINKS = 0.8  # share of the links' stated speed that collectives reach: an assumption


def sample_operations(config: Config, stage: Stage, data: Data, setting: Setting) -> tuple[int, int]:
    """Of a mean sample: the useful ones (``train/data/flops.py``), and these with what is computed again.

    ``full`` checkpointing repeats the layers' forward pass, ``selective`` no product; what ``offload`` moves is taken
    to move meanwhile. ``layerwise`` with exact clipping takes both passes twice: for the norm, and for the updates.

    Under adapters the frozen weights' gradients are not asked for, and nothing before the decoder runs backward.
    """
    patches = [round(data.patches)] if data.patches >= 1 else []
    parts = operations_by_part(config, [round(data.tokens)], patches, round(data.labelled), stage.trains)
    if setting.lora_rank:
        halved = {name: Operations(parts[name].forward, parts[name].forward) for name in ("decoder_linear", "lm_head")}
        frozen = {name: Operations(p.forward) for name, p in parts.items() if not name.startswith(("decoder", "lm"))}
        parts = parts | halved | frozen
    useful = sum(parts.values(), Operations()).total
    layers = [part for name, part in parts.items() if name.startswith(("decoder", "vision")) and part.backward]
    again = sum(p.forward for p in layers) if setting.checkpointing in ("full", "offload") else 0
    twice = setting.optimizer == "layerwise" and stage.clipping == "exact"
    return useful, (useful + again) * (2 if twice else 1)


def micro_steps(stage: Stage, data: Data, setting: Setting) -> tuple[float, int]:
    """Packed sequences of a GPU in a step, on average, and how often it runs, ``setting.rows`` of them at a time."""
    rows = stage.global_batch * data.tokens / stage.sequence_length / setting.gpus
    return rows, max(1, math.ceil(rows / setting.rows - 1e-9))


def collectives(sizes: Sizes, setting: Setting, times: int) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by collective: a ring sends (N - 1)/N of what it gathers or reduces.

    Gradients are reduced in float32 and weights gathered in bfloat16: ``optimizer`` once a step, ``gradients``
    reduces after each backward pass, ``full`` also gathers before each forward and each backward pass. ``none`` reduces
    once and gathers the sums.
    """
    ring = (setting.gpus - 1) / setting.gpus
    trained = setting.lora_rank * sizes.ends if setting.lora_rank else sizes.trained
    reductions = 1 if setting.shard in ("none", "optimizer") else times
    gathers = {"none": trained, "full": sizes.all * 2 * times}
    gathered = gathers.get(setting.shard, sizes.all)  # frozen weights are shared out as well
    width = SUM if setting.shard == "none" else WEIGHT
    return {"reduce-scatter": ring * SUM * trained * reductions, "all-gather": ring * width * gathered}


def link_seconds(sent: float, gpu: GPU, gpus: int) -> tuple[float, float, float]:
    """(bytes to the node's own GPUs, bytes to other nodes, seconds) of ``sent`` bytes of one GPU.

    Over several nodes, rings leave a node through one GPU each, so that a share of 1/node crosses (NCCL's rings, one a
    network adapter); both links work at once.
    """
    across = sent / gpu.node if gpus > gpu.node else 0.0
    inside = sent - across
    return inside, across, max(inside / gpu.nvlink, across / gpu.network) / 1e9 / LINKS


@dataclass(frozen=True)
class Time:
    """Seconds of a global batch: products, collectives, update; days of the stage, the collectives hidden behind the
    products as far as they go, and with nothing hidden.
    """

    compute: float
    links: float
    update: float
    steps: float

    @property
    def step(self) -> float:
        return max(self.compute, self.links) + self.update

    @property
    def days(self) -> float:
        return self.step * self.steps / 86400

    @property
    def days_unhidden(self) -> float:
        return (self.compute + self.links + self.update) * self.steps / 86400


def time(config: Config, stage: Stage, sizes: Sizes, data: Data, setting: Setting, gpu: GPU, efficiency: float) -> Time:
    """efficiency: share of the peak that all products reach, those computed again included. Whole rows are taken: where
    a GPU has 2.9 of them in a step, the step takes as long as 3.
    """
    rows, times = micro_steps(stage, data, setting)
    total = sample_operations(config, stage, data, setting)[1]
    whole = times * setting.rows / rows
    seconds = total * stage.global_batch * whole / setting.gpus / (efficiency * gpu.tflops * 1e12)
    links = link_seconds(sum(collectives(sizes, setting, times).values()), gpu, setting.gpus)[2]
    trained = setting.lora_rank * sizes.ends if setting.lora_rank else sizes.trained
    # At the memory's speed. adamw reads gradient, master and moments and writes master, moments and weight, 30 bytes a
    # parameter; layerwise, after every row, reads gradient, weight and moments and writes weight and moments.
    traffic = 10 * times if setting.optimizer == "layerwise" else 30
    update = trained / setting.gpus * traffic / (gpu.bandwidth * 1e9)
    return Time(seconds, links, update, data.samples / stage.global_batch)
