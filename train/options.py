"""The command line of ``train/main.py``; the stage's hyperparameters come from ``train/recipe.py``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from phi4rv.command_line import CHECKPOINT, HELDOUT, MOST, OUTPUT, SEED, Number, OneOf, Parser, device_options
from phi4rv.errors import UserError
from phi4rv.model.activation_checkpointing import CHECKPOINTING
from train import recipe
from train.checkpoints import checkpointer
from train.distributed.fsdp import SHARDS

MOST_WORKERS = 1024


def stage_option(add: Callable[..., None]) -> None:
    add(
        "--stage",
        kind=OneOf(tuple(recipe.STAGES)),
        default=2,
        metavar="N",
        help="stage of the recipe; 1: projector only, 2: instruction tuning, 3: long context and several images",
    )


def shard_option(add: Callable[..., None], **default: str) -> None:
    add(
        "--shard",
        kind=OneOf(SHARDS),
        help="what the processes share out in place of each holding it all; ZeRO-1: optimizer, -2: gradients, -3: full",
        **default,
    )


def checkpointing_option(add: Callable[..., None], **default: str) -> None:
    add(
        "--checkpointing",
        kind=OneOf(CHECKPOINTING),
        help="activations that the backward pass computes again; selective: all but products and attention, full: all "
        "of a layer, offload: as full, with the layers' inputs kept in the CPU's memory",
        **default,
    )


def make_parser() -> Parser:
    parser = Parser(
        "train.main", "Trains one stage of the recipe, from data to a measured model; in several processes by torchrun."
    )
    _data_options(parser.section("model and data"))
    _run_options(parser.section("run"))
    add = parser.section("the stage's hyperparameters (train/recipe.py)")
    for name in recipe.options():
        recipe.add_option(add, name)
    return parser


def _data_options(add: Callable[..., None]) -> None:
    stage_option(add)
    add(
        "--checkpoint",
        kind=Path,
        metavar="DIR",
        help=f"{CHECKPOINT}; in the Hugging Face layout",
        unset="a tiny model of random weights",
    )
    add(
        "--data",
        nargs="+",
        metavar="FILE[=WEIGHT]",
        help="records to train on: JSONL files (.gz too), folders or patterns, each with its share of the samples",
        unset="records and pictures that the command draws itself",
    )
    add("--heldout", kind=Path, metavar="FILE", help=f"{HELDOUT}; at the end", unset="none, or drawn without --data")
    add("--skip-bad", action="store_true", help="count and skip bad records instead of stopping at the first")
    add(
        "--workers",
        kind=Number(int, 0, MOST_WORKERS),
        default=0,
        help="processes that tokenize and decode pictures; 0: a thread of the training process",
    )
    add(
        "--image-timeout",
        kind=Number(float, above=0),
        default=60.0,
        metavar="SECONDS",
        help="seconds that decoding a picture may take in a worker",
    )
    add(
        "--seed",
        kind=Number(int, 0, below=2**32),
        default=0,
        help=f"{SEED}; order of the data, drawn records, adapters",
    )


def _run_options(add: Callable[..., None]) -> None:
    add("--output", kind=Path, metavar="DIR", help=f"{OUTPUT}; a folder", unset="out/stage-N, numbered on if taken")
    add(
        "--save-every",
        kind=Number(int, 0, MOST),
        default=0,
        help="steps between saves; 0: only the model at the end",
    )
    add("--keep", kind=Number(int, 0, MOST), default=checkpointer.KEEP_ALL, help="newest saves that are kept; 0: all")
    add("--resume", action="store_true", help="go on from the newest step-N in the output folder")
    shard_option(add, default="none")
    add(
        "--replicas",
        kind=Number(int, 1, MOST),
        default=1,
        help="copies of the sharded model (HSDP); each is cut over the number of processes / N",
    )
    add("--context", kind=Number(int, 1, MOST), default=1, help="processes that share each row of tokens (all-to-all)")
    device_options(add, "of weights and activations", "bfloat16 on a GPU, float32 on a CPU")
    add(
        "--peak-tflops",
        kind=Number(float, above=0),
        help="TFLOP/s of a device at its peak, for the MFU; dense, in bfloat16",
        unset="the maker's, by the GPU's name (train/planning/hardware.py)",
    )
    checkpointing_option(add, default="none")
    add("--compile", action="store_true", help="run the layers of tower and decoder by torch.compile")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """UserError for options that do not go together."""
    args = make_parser().parse_args(argv)
    if args.shard == "none" and args.replicas != 1:
        raise UserError(f"--replicas: {args.replicas} copies, but nothing is sharded between them; give --shard too")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (args.resume and args.output):
        raise UserError("--resume: needed with torchrun --max-restarts, and --output too: a restart goes on from there")
    return args
