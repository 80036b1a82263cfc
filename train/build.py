"""The model and the optimizer that a run begins with: where the weights come from, and what becomes of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from phi4rv.checkpoint.huggingface import load_meta, load_weights
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.processor import Processor
from phi4rv.quantization.float8_linear import convert_to_float8_training
from phi4rv.quantization.quantized_linear import load_quantized_weights
from train.distributed.context_parallel import check_heads
from train.distributed.fsdp import assign, parallelize
from train.distributed.ranks import Ranks
from train.lora_targets import adapt
from train.optimizers.adamw import Optimizer, ShardedOptimizer
from train.optimizers.layerwise import Layerwise
from train.recipe import Stage
from train.synthetic import texts
from train.synthetic.tiny_model import tiny_model
from train.trainer import trainable


def build(
    args: argparse.Namespace,
    stage: Stage,
    device: torch.device,
    dtype: torch.dtype,
    step: Path | None,
    mesh: DeviceMesh | None,
    ranks: Ranks,
) -> tuple[Phi4RV, Processor, Optimizer | Layerwise]:
    """Weights of the checkpoint, or random ones; what is in the save ``step``, ``saving.resume`` reads later.

    ``mesh``: shards the model over it; each rank then allocates and keeps only its part. UserError naming an option
    that does not go with another.
    """
    _check(args, stage, mesh, ranks)
    if stage.linear == "fp8" and device.type == "cuda" and dtype != torch.bfloat16:
        raise UserError("--linear: fp8 writes bfloat16 on a GPU; give --dtype bfloat16")
    adapted = bool(stage.lora_rank)
    if source := args.checkpoint if adapted else step or args.checkpoint:
        model, processor = load_meta(source, device, dtype, args.kernels)
    else:
        model, processor = tiny_model(args.seed, texts(), args.kernels)
        model = model.to(device, dtype)
    check_heads(model.config, args.context)
    if stage.linear == "fp8":
        convert_to_float8_training(model)
    trainable(model, stage)
    if mesh:
        parallelize(model, mesh, args.shard, dtype)
    if step and not adapted:
        model.to_empty(device=device)
    elif stage.frozen_weights != "dtype":
        load_quantized_weights(model, args.checkpoint, device, {"decoder": stage.frozen_weights})
    elif args.checkpoint:
        load_weights(model, args.checkpoint, device, assign if mesh else None)
    if adapted:
        adapt(model, stage, args.seed)
    model.set_checkpointing(args.checkpointing)
    if args.compile:
        model.compile_layers()
    named = trainable(model, stage)
    if stage.optimizer == "layerwise":
        return model, processor, Layerwise(named, stage, model.ops, args.seed)
    kind = ShardedOptimizer if mesh else Optimizer
    return model, processor, kind(named, stage, model.ops)


def _check(args: argparse.Namespace, stage: Stage, mesh: DeviceMesh | None, ranks: Ranks) -> None:
    if stage.lora_rank and not args.checkpoint:
        raise UserError("--lora-rank: adapters belong to a base: name it with --checkpoint")
    if stage.lora_rank and mesh:
        raise UserError(f"--shard: {args.shard} is for a model that trains itself; leave it or --lora-rank out")
    if args.compile and args.checkpointing == "selective":
        raise UserError("--compile: its code hides the products that --checkpointing selective keeps; give another one")
    if stage.optimizer == "layerwise" and ranks.world > 1:
        raise UserError(f"--optimizer: layerwise trains in one process, here are {ranks.world}")
