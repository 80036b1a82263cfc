"""Everything that wants a GPU: ``python -m benchmarks.gpu [PART …] [--seconds N]``.

Each part has its time limit, all together under 8 minutes on a machine where csrc/ is built and Triton's kernels are
compiled; none stops the others. What a part had no time for says so; run by its name it may take NAMED_SECONDS.
The parts that are run replace theirs in ``benchmarks/results/<device>/<date>-<commit>.json``, and one table shows all
that the file holds. The first part builds csrc/ where nvcc is, or leaves the library that is there. Exit status 1 if a
part failed, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import run
from benchmarks.jobs import Job, python_module
from benchmarks.options import seconds_option
from benchmarks.report.result_files import FOLDER
from phi4rv.command_line import JSON, OneOf, Parser, exit_status

# Seconds of the benchmarks that a GPU changes; what matters most they do first.
SECONDS = {"kernels": 105, "train_step": 85, "inference": 100}


def _tests(file: Path, seconds: float) -> list[str]:
    """In several processes where pytest-xdist is; those of gigabytes in one of them (tests/conftest.py)."""
    together = ["-n", "4", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    return python_module("pytest", "-q", "-m", "gpu", *together)


JOBS = [
    Job("build", 70, lambda file, seconds: python_module("csrc.build")),
    Job("tests", 115, _tests, gpu=True),
    *(replace(job, seconds=SECONDS[job.name], gpu=True) for job in run.JOBS if job.name in SECONDS),
]
# Run where they are named: a GPU changes little of the first two, and the last is slow.
EXTRA_JOBS = [
    Job("golden", 60, lambda file, seconds: python_module("pytest", "-q", "tests/phi4rv/test_golden.py")),
    *(replace(job, seconds=30) for job in run.JOBS if job.name == "images"),
    Job("sanitizer", 300, lambda file, seconds: python_module("tests.kernels.sanitize"), gpu=True),
]
# Seconds of parts that are named, for what has to be compiled first and for all peers.
NAMED_SECONDS = {"build": 300, "tests": 460, "kernels": 460, "train_step": 400, "inference": 460}


def make_parser() -> Parser:
    parser = Parser("benchmarks.gpu", "Runs all GPU tests and benchmarks.")
    names = tuple(job.name for job in (*JOBS, *EXTRA_JOBS))
    extra = ", ".join(job.name for job in EXTRA_JOBS)
    parser.add("part", nargs="*", kind=OneOf(names), metavar="PART", help="what to run", unset=f"all but {extra}")
    seconds_option(parser.add, "of each part", None, "each part's own")
    results = f"{JSON}; written to FOLDER/<device>/<date>-<commit>.json"
    parser.add("--json", kind=Path, default=FOLDER, metavar="FOLDER", help=results, unset="benchmarks/results")
    return parser


def command(args: argparse.Namespace) -> int:
    every = [*JOBS, *EXTRA_JOBS]
    if args.part:
        every = [replace(job, seconds=NAMED_SECONDS.get(job.name, job.seconds)) for job in every]
    jobs = run.select_jobs(every if args.part else JOBS, args.part, args.seconds)
    return run.run_and_report(jobs, args.json)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
