"""Everything that wants a GPU: ``python -m benchmarks.gpu [PART …] [--seconds N]``.

The first part builds csrc/ where nvcc is (or leaves the library that is there). Each has its time limit, all together
under 8 minutes on a machine where csrc/ is built, and none stops the others; the parts that are run replace
theirs in ``benchmarks/results/<device>/<date>-<commit>.json``. The training step, 4 minutes more, and inference, 7
more, are run by their names alone; ``make gpu`` makes all three calls. Exit status 1 if a part failed, 2 for a wrong
call.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import run
from benchmarks.parts import Part, python
from benchmarks.records import FOLDER

# Of the benchmarks that a GPU changes, on a warm machine that runs nothing else.
SECONDS = {"images": 20, "kernels": 160}
PARTS = [
    Part("build", 70, lambda file, seconds: python("csrc.build")),
    Part("golden", 20, lambda file, seconds: python("pytest", "-q", "tests/test_golden.py")),
    Part("tests", 140, lambda file, seconds: python("pytest", "-q", "-m", "gpu"), gpu=True),
    Part("sanitizer", 60, lambda file, seconds: python("tests.kernels.sanitize"), gpu=True),
    *(replace(part, seconds=SECONDS[part.name]) for part in run.PARTS if part.name in SECONDS),
]


def _train_step(file: Path, seconds: float) -> list[str]:
    return python("benchmarks.train_step", "--json", str(file), "--seconds", f"{seconds:.0f}")


# Run where they are named: with the others they would not fit a call of ten minutes.
APART = [Part("train_step", 240, _train_step, gpu=True), Part("inference", 420, run.inference, gpu=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="All GPU tests and benchmarks.")
    every = [*PARTS, *APART]
    parser.add_argument("part", nargs="*", help=f"only these of {', '.join(part.name for part in every)}")
    parser.add_argument("--seconds", type=float, metavar="N", help="another time limit for each part")
    parser.add_argument("--json", type=Path, default=FOLDER, metavar="FOLDER", help="where results are kept")
    args = parser.parse_args(arguments)
    try:
        parts = run.chosen(every if args.part else PARTS, args.part, args.seconds)
    except ValueError as error:
        parser.error(str(error))
    return run.drive(parts, args.json)


if __name__ == "__main__":
    sys.exit(main())
