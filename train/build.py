"""The model and the optimizer that a run begins with: where the weights come from, and what becomes of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from phi4rv.checkpoint import fill, outline
from phi4rv.model import Phi4RV
from phi4rv.processor import Processor
from train.optimizer import Optimizer, ShardedOptimizer
from train.parallel import assign, parallelize
from train.recipe import Stage
from train.synthetic import texts
from train.tiny import tiny_model
from train.trainer import trainable


def build(
    args: argparse.Namespace,
    stage: Stage,
    device: torch.device,
    dtype: torch.dtype,
    step: Path | None,
    mesh: DeviceMesh | None,
) -> tuple[Phi4RV, Processor, Optimizer]:
    """Weights of the checkpoint, or random ones; with ``step`` none yet, ``saving.resume`` reads them.

    ``mesh``: shards the model over it; each rank then allocates and keeps only its part.
    """
    if source := step or args.checkpoint:
        model, processor = outline(source, device, dtype, args.kernels)
    else:
        model, processor = tiny_model(args.seed, texts(), args.kernels)
        model = model.to(device, dtype)
    trainable(model, stage)
    if mesh:
        parallelize(model, mesh, args.shard, dtype)
    if step:
        model.to_empty(device=device)
    elif args.checkpoint:
        fill(model, args.checkpoint, device, assign)
    kind = ShardedOptimizer if mesh else Optimizer
    return model, processor, kind(trainable(model, stage), stage, model.ops)
