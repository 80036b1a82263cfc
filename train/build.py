"""Builds the model and the optimizer of a run: loads or initialises the weights, shards, freezes, adds adapters."""

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
from train.distributed.fsdp import copy_full_tensor, parallelize
from train.distributed.ranks import Ranks
from train.optimizers.adamw import AdamW, ShardedAdamW
from train.optimizers.layerwise import LayerwiseAdamW
from train.recipe import Stage
from train.synthetic import tokenizer_corpus
from train.synthetic.tiny_model import build_tiny_model
from train.trainable import add_lora, set_trainable


def build(
    args: argparse.Namespace,
    stage: Stage,
    device: torch.device,
    dtype: torch.dtype,
    save: Path | None,
    mesh: DeviceMesh | None,
    ranks: Ranks,
) -> tuple[Phi4RV, Processor, AdamW | LayerwiseAdamW]:
    """With the weights of ``--checkpoint``, or random ones; those of a ``save``, ``checkpointer.resume`` loads later.

    ``mesh``: shards the model over it; each rank then allocates only its shards. UserError naming an option that does
    not go with another.
    """
    _check(args, stage, mesh, ranks)
    if stage.linear == "fp8" and device.type == "cuda" and dtype != torch.bfloat16:
        raise UserError("--linear: fp8 writes bfloat16 on a GPU; give --dtype bfloat16")
    lora = bool(stage.lora_rank)
    if source := args.checkpoint if lora else save or args.checkpoint:
        model, processor = load_meta(source, device, dtype, args.kernels)
    else:
        model, processor = build_tiny_model(args.seed, tokenizer_corpus(), args.kernels)
        model = model.to(device, dtype)
    check_heads(model.config, args.context)
    if stage.linear == "fp8":
        convert_to_float8_training(model)
    set_trainable(model, stage)
    if mesh:
        parallelize(model, mesh, args.shard, dtype)
    if save and not lora:
        model.to_empty(device=device)
    elif stage.frozen_weights != "dtype":
        load_quantized_weights(model, args.checkpoint, device, {"decoder": stage.frozen_weights})
    elif args.checkpoint:
        load_weights(model, args.checkpoint, device, copy_full_tensor if mesh else None)
    if lora:
        add_lora(model, stage, args.seed)
    model.set_checkpointing(args.checkpointing)
    if args.compile:
        model.compile_layers()
    named = set_trainable(model, stage)
    if stage.optimizer == "layerwise":
        return model, processor, LayerwiseAdamW(named, stage, model.ops, args.seed)
    kind = ShardedAdamW if mesh else AdamW
    return model, processor, kind(named, stage, model.ops)


def _check(args: argparse.Namespace, stage: Stage, mesh: DeviceMesh | None, ranks: Ranks) -> None:
    if stage.lora_rank and not args.checkpoint:
        raise UserError("--lora-rank: adapters need a base model: give --checkpoint")
    if stage.lora_rank and mesh:
        raise UserError(f"--shard: {args.shard} is for a model that trains itself; leave it or --lora-rank out")
    if args.compile and args.checkpointing == "selective":
        raise UserError("--compile: its code hides the products that --checkpointing selective keeps; give another one")
    if stage.optimizer == "layerwise" and ranks.world_size > 1:
        raise UserError(f"--optimizer: layerwise trains in one process, not in {ranks.world_size}")
