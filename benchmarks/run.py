"""Runs every benchmark of the machine it is on: ``python -m benchmarks.run [--only NAME …] [--json FOLDER]``.

With ``--json`` the records go to ``FOLDER/<device>/<date>-<commit>.json``; what a benchmark that is not run now left
there earlier stays.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import only_option
from benchmarks.parts import LOGS, Outcome, Part, python, run_parts, summary
from benchmarks.report.result_files import environment, file_for, write
from benchmarks.report.rows import Row, table
from phi4rv.command_line import JSON, Parser, exit_status

# Each module has rows(records), and a command line; the last two's no part calls.
MODULES = {
    "images": "benchmarks.images",
    "data": "benchmarks.data.loading_and_packing",
    "saving": "benchmarks.saving",
    "kernels": "benchmarks.kernels.__main__",
    "train_step": "benchmarks.train_step",
    "inference": "benchmarks.inference.command",
    "loading": "benchmarks.loading",
    "server_load": "benchmarks.server_load",
}


def _kernels(file: Path, seconds: float) -> list[str]:
    chart = str(file.with_suffix(".png"))
    return python("benchmarks.kernels", "--json", str(file), "--chart", chart, "--seconds", f"{seconds:.0f}")


def train_step(file: Path, seconds: float) -> list[str]:
    return python("benchmarks.train_step", "--json", str(file), "--seconds", f"{seconds:.0f}")


def inference(file: Path, seconds: float) -> list[str]:
    return python("benchmarks.inference", "--json", str(file), "--seconds", f"{seconds:.0f}")


PARTS = [
    Part("images", 180, lambda file, seconds: python("benchmarks.images", "--json", str(file))),
    Part("data", 300, lambda file, seconds: python("benchmarks.data", "--json", str(file))),
    Part("saving", 60, lambda file, seconds: python("benchmarks.saving", "--json", str(file))),
    Part("kernels", 600, _kernels),
    Part("train_step", 120, train_step),
    Part("inference", 120, inference),
]


def drive(parts: Sequence[Part], folder: Path | None) -> int:
    """Runs the parts, prints their tables and merges them into the results file in ``folder``. Exit status."""
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    outcomes, results = run_parts(parts, LOGS, torch.cuda.is_available())
    if folder:
        file = file_for(about, folder)
        results = merge(file, about, outcomes, results)
        for part in parts:
            if (picture := LOGS / f"{part.name}.png").exists():
                shutil.copy(picture, file.with_name(f"{file.stem}-{part.name}.png"))
        print(f"written: {file}; python -m benchmarks.report takes it up")
    print(f"\n{table(rows(results))}\n\n{summary(outcomes)}\nin full: {LOGS}")
    return 1 if any(outcome["state"] in ("failed", "out of time") for outcome in outcomes.values()) else 0


def rows(results: dict[str, Any]) -> list[Row]:
    """Of the records of each benchmark, in the order of MODULES. ValueError if there is no such benchmark."""
    if unknown := sorted(set(results) - set(MODULES)):
        raise ValueError(f"no benchmark {', '.join(unknown)}; there are {', '.join(MODULES)}")
    modules = {name: importlib.import_module(module) for name, module in MODULES.items() if name in results}
    return [row for name, module in modules.items() for row in module.rows(results[name])]


def merge(file: Path, about: dict[str, str], outcomes: dict[str, Outcome], results: dict[str, Any]) -> dict[str, Any]:
    """Writes the parts that were run over those in the file, keeps the others, and returns all results."""
    earlier = json.loads(file.read_text()) if file.exists() else {}
    outcomes, results = earlier.get("parts", {}) | outcomes, earlier.get("results", {}) | results
    write(file, results, about, parts=outcomes)
    return results


def chosen(parts: Sequence[Part], names: Sequence[str], seconds: float | None = None) -> list[Part]:
    """The named parts in their usual order, all if none is named, each with the limit ``seconds`` if that is given."""
    unknown = set(names) - {part.name for part in parts}
    if unknown:
        raise ValueError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in parts)}")
    return [replace(part, seconds=seconds or part.seconds) for part in parts if not names or part.name in names]


def make_parser() -> Parser:
    parser = Parser("benchmarks.run", "Runs every benchmark, beside its peers.")
    only_option(parser.add, [part.name for part in PARTS], "benchmarks")
    results = f"{JSON}; written to FOLDER/<device>/<date>-<commit>.json"
    parser.add("--json", kind=Path, metavar="FOLDER", help=results, unset="not written")
    return parser


def command(args: argparse.Namespace) -> int:
    return drive(chosen(PARTS, args.only or []), args.json)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
