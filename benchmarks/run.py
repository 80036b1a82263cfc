"""Runs every benchmark of the machine it is on: ``python -m benchmarks.run [--only NAME …] [--json FOLDER]``.

With ``--json`` the records go to ``FOLDER/<device>/<date>-<commit>.json``; what a benchmark that is not run now left
there earlier stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.jobs import LOGS, Job, Outcome, python_module, run_jobs, summary
from benchmarks.options import only_option
from benchmarks.report.benchmarks import table_rows
from benchmarks.report.result_files import environment, file_for, write_results
from benchmarks.report.rows import table
from phi4rv.command_line import JSON, Parser, exit_status


def _kernels(file: Path, seconds: float) -> list[str]:
    chart = str(file.with_suffix(".png"))
    return python_module("benchmarks.kernels", "--json", str(file), "--chart", chart, "--seconds", f"{seconds:.0f}")


def _train_step(file: Path, seconds: float) -> list[str]:
    return python_module("benchmarks.train_step", "--json", str(file), "--seconds", f"{seconds:.0f}")


def _inference(file: Path, seconds: float) -> list[str]:
    return python_module("benchmarks.inference", "--json", str(file), "--seconds", f"{seconds:.0f}")


JOBS = [
    Job("images", 180, lambda file, seconds: python_module("benchmarks.images", "--json", str(file))),
    Job("data", 300, lambda file, seconds: python_module("benchmarks.data", "--json", str(file))),
    Job("saving", 60, lambda file, seconds: python_module("benchmarks.saving", "--json", str(file))),
    Job("kernels", 600, _kernels),
    Job("train_step", 120, _train_step),
    Job("inference", 120, _inference),
]


def run_and_report(jobs: Sequence[Job], folder: Path | None) -> int:
    """Runs the jobs, prints their tables and merges them into the results file in ``folder``. Exit status."""
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    outcomes, results = run_jobs(jobs, LOGS, torch.cuda.is_available())
    if folder:
        file = file_for(about, folder)
        results = merge(file, about, outcomes, results)
        for job in jobs:
            if (picture := LOGS / f"{job.name}.png").exists():
                shutil.copy(picture, file.with_name(f"{file.stem}-{job.name}.png"))
        print(f"written: {file}; python -m benchmarks.report takes it up")
    print(f"\n{table(table_rows(results))}\n\n{summary(outcomes)}\nin full: {LOGS}")
    return 1 if any(outcome["state"] in ("failed", "out of time") for outcome in outcomes.values()) else 0


def merge(file: Path, about: dict[str, str], outcomes: dict[str, Outcome], results: dict[str, Any]) -> dict[str, Any]:
    """Writes the jobs that were run over those in the file, keeps the others, and returns all results."""
    earlier = json.loads(file.read_text()) if file.exists() else {}
    outcomes, results = earlier.get("parts", {}) | outcomes, earlier.get("results", {}) | results
    write_results(file, results, about, parts=outcomes)
    return results


def select_jobs(jobs: Sequence[Job], names: Sequence[str], seconds: float | None = None) -> list[Job]:
    """The named jobs in their usual order, all if none is named, each with the limit ``seconds`` if that is given."""
    unknown = set(names) - {job.name for job in jobs}
    if unknown:
        raise ValueError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(job.name for job in jobs)}")
    return [replace(job, seconds=seconds or job.seconds) for job in jobs if not names or job.name in names]


def make_parser() -> Parser:
    parser = Parser("benchmarks.run", "Runs every benchmark, beside its peers.")
    only_option(parser.add, [job.name for job in JOBS], "benchmarks")
    results = f"{JSON}; written to FOLDER/<device>/<date>-<commit>.json"
    parser.add("--json", kind=Path, metavar="FOLDER", help=results, unset="not written")
    return parser


def command(args: argparse.Namespace) -> int:
    return run_and_report(select_jobs(JOBS, args.only or []), args.json)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
