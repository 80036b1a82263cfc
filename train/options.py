"""The command line of ``train/main.py``; the stage's hyperparameters come from ``train/recipe.py``."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from phi4rv.command_line import Parser
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.model.activation_checkpointing import CHECKPOINTING
from phi4rv.ops.registry import KERNELS
from train import recipe
from train.checkpoints import checkpointer
from train.distributed.fsdp import SHARDS


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="train/main.py", description="One stage of the recipe, from data to a measured model.")
    add = parser.add_argument
    add(
        "--stage",
        type=int,
        default=2,
        help="1 projector only, 2 instruction tuning, 3 long context and several images",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="published layout; without it a tiny model from random weights",
    )
    add(
        "--data",
        nargs="+",
        metavar="FILE[=WEIGHT]",
        help="JSONL records (.gz too), files, folders or patterns; without it the embedded generator's",
    )
    add("--heldout", type=Path, metavar="FILE", help="JSONL records to measure on at the end")
    add("--output", type=Path, metavar="DIR", help="default: out/stage-N, numbered on if it is taken")
    add(
        "--save-every",
        type=int,
        default=0,
        metavar="N",
        help="steps between saves; 0 saves only the model at the end",
    )
    add("--keep", type=int, default=checkpointer.KEEP_ALL, metavar="N", help="saves kept, the newest ones; 0: all")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the newest step-N in the output folder")
    add("--skip-bad", action="store_true", help="count and skip bad records instead of stopping at the first")
    add("--workers", type=int, default=0, metavar="N", help="processes that tokenize and decode; 0: a thread")
    add("--image-timeout", type=float, default=60.0, metavar="S", help="seconds an image may take in a worker")
    add("--shard", choices=SHARDS, default="none", help="what the processes share out: ZeRO-1, -2 or -3")
    add(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="copies of the sharded model (HSDP)",
    )
    add("--context", type=int, default=1, metavar="N", help="processes that share each row of tokens (all-to-all)")
    add("--device", help="cuda where there is one, else cpu")
    add("--dtype", choices=DTYPES, help="of weights and activations: bfloat16 on a GPU, float32 on a CPU")
    add("--kernels", metavar="KIND", help=f"one of {', '.join(KERNELS)}; exceptions behind it: triton,adamw=torch")
    add(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="of a device, for MFU; default: train/planning/hardware.py's, by name",
    )
    add(
        "--checkpointing",
        choices=CHECKPOINTING,
        default="none",
        help="what is not kept is computed twice (phi4rv/model/activation_checkpointing.py)",
    )
    add("--compile", action="store_true", help="the layers of tower and decoder by torch.compile")
    fields = parser.add_argument_group("the stage's hyperparameters (train/recipe.py), each to be overridden")
    for name, kind in recipe.options().items():
        fields.add_argument("--" + name.replace("_", "-"), type=kind)
    args = parser.parse_args(argv)
    for name in ("save_every", "keep"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} must be 0 or more")
    if args.shard == "none" and args.replicas != 1:
        raise UserError(f"--replicas: {args.replicas} copies, but nothing is sharded between them; give --shard too")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (args.resume and args.output):
        raise UserError("--resume: needed with torchrun --max-restarts, and --output too: a restart goes on from there")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops: {args.peak_tflops} must be above 0")
    if args.workers < 0:
        raise UserError(f"--workers: {args.workers} must be 0 or more")
    if not 0 < args.image_timeout < float("inf"):
        raise UserError(f"--image-timeout: {args.image_timeout} must be a number above 0")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed: {args.seed} must be in [0, 2^32)")
    return args
