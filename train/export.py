"""``python -m train.export out/stage-2/step-500 DIR``: a save of a run as a model in the published layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from phi4rv.checkpoint import outline, write
from phi4rv.command import Parser, exit_status
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.files import whole_folder
from train.saving import read, steps


def export(step: Path, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes ``path`` from the save ``step``, whatever number of ranks made it, in ``dtype`` or the run's own.

    Memory holds one file's tensors, up to 5 GB, and never the model.
    """
    model, processor = outline(step, "cpu", dtype)
    kind = next(model.parameters()).dtype

    def saved(name: str, parameter: Tensor) -> Tensor:
        tensor = torch.empty(parameter.shape, dtype=kind)
        read(step, {f"model/{name}": tensor})
        return tensor

    with whole_folder(path) as folder:
        write(model, processor, folder, saved)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m train.export", description="A save of a run as a model in the published layout.")
    parser.add_argument("step", type=Path, help="a step-N folder, or a run's output folder: its newest")
    parser.add_argument("path", type=Path, help="the folder to write; one that is there is replaced")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the run's")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if not args.step.is_dir():
        raise UserError(f"{args.step}: not a folder; give a step-N of a run's output folder")
    step = next(reversed(steps(args.step)), args.step)
    export(step, args.path, DTYPES[args.dtype] if args.dtype else None)
    print(f"written: {args.path}, from {step}")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
