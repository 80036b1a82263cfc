"""``python -m train.export --checkpoint out/stage-2/step-500 --output DIR``: a save of a run as a model in the
published layout, or as an adapter in PEFT's where adapters were trained."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4rv.adapters.peft import lora_layers, write_adapter
from phi4rv.checkpoint.atomic_folder import atomic_folder
from phi4rv.checkpoint.huggingface import load_meta, write_checkpoint
from phi4rv.command_line import CHECKPOINT, OUTPUT, Parser, dtype_option, exit_status
from phi4rv.config import DTYPES, read_json
from phi4rv.errors import UserError
from train.checkpoints.checkpointer import STATE, load_tensors, saved_steps
from train.recipe import Stage
from train.trainable import add_lora


def export(step: Path, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes ``path`` from the save ``step``, whatever number of ranks made it, in ``dtype`` or the run's own.

    Memory holds one file's tensors, up to 5 GB, and never the model.
    """
    model, processor = load_meta(step, "cpu", dtype)
    kind = next(model.parameters()).dtype

    def saved(name: str, parameter: Tensor) -> Tensor:
        tensor = torch.empty(parameter.shape, dtype=kind)
        load_tensors(step, {f"model/{name}": tensor})
        return tensor

    with atomic_folder(path) as folder:
        write_checkpoint(model, processor, folder, saved)


def export_adapter(step: Path, path: Path, state: dict[str, Any]) -> None:
    """The same for a save with ``state`` of a run that trained adapters; their base is not read."""
    model, _ = load_meta(step, "meta")
    known = {field.name for field in fields(Stage)}
    stage = Stage(**{k: v for k, v in state["recipe"].items() if k in known})
    add_lora(model, stage, 0)
    for layer in lora_layers(model).values():
        layer.lora_A.to_empty(device="cpu")
        layer.lora_B.to_empty(device="cpu")
    load_tensors(step, {f"model/{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad})
    with atomic_folder(path) as folder:
        write_adapter(model, folder, state["checkpoint"])


def make_parser() -> Parser:
    parser = Parser("train.export", "Writes a save of a run as a model in the Hugging Face layout, or as an adapter.")
    parser.add(
        "--checkpoint",
        required=True,
        kind=Path,
        metavar="DIR",
        help=f"{CHECKPOINT}; a step-N of a run, or a run's output folder: its newest step-N",
    )
    parser.add(
        "--output",
        required=True,
        kind=Path,
        metavar="DIR",
        help=f"{OUTPUT}; a folder, which is replaced if it is there",
    )
    dtype_option(parser.add, "of the weights that are written; not for an adapter", "the run's")
    return parser


def run(args: argparse.Namespace) -> None:
    if not args.checkpoint.is_dir():
        raise UserError(f"--checkpoint: {args.checkpoint} is no folder; give a step-N of a run's output folder")
    step = next(reversed(saved_steps(args.checkpoint)), args.checkpoint)
    state = read_json(step / STATE)
    if state.get("recipe", {}).get("lora_rank"):
        if args.dtype:
            raise UserError("--dtype: of a model; an adapter keeps the run's")
        export_adapter(step, args.output, state)
    else:
        export(step, args.output, DTYPES[args.dtype] if args.dtype else None)
    print(f"written: {args.output}, from {step}")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
