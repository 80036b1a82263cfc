"""Everything that wants a GPU: ``python -m benchmarks.gpu [PART …] [--seconds N]``.

Each part has its time limit, all together under 8 minutes, and none stops the others; the parts that are run replace
theirs in ``benchmarks/results/<device>/<date>-<commit>.json``. Exit status 1 if a part failed, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import run
from benchmarks.parts import Part, python
from benchmarks.records import FOLDER

# Of the benchmarks, on a warm GPU machine that runs nothing else.
SECONDS = {"images": 40, "kernels": 185}
PARTS = [
    Part("golden", 30, lambda file, seconds: python("pytest", "-q", "tests/test_golden.py")),
    Part("tests", 150, lambda file, seconds: python("pytest", "-q", "-m", "gpu"), gpu=True),
    Part("sanitizer", 60, lambda file, seconds: python("tests.kernels.sanitize"), gpu=True),
    *(replace(part, seconds=SECONDS[part.name]) for part in run.PARTS),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="All GPU tests and benchmarks.")
    parser.add_argument("part", nargs="*", help=f"only these of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--seconds", type=float, metavar="N", help="another time limit for each part")
    parser.add_argument("--json", type=Path, default=FOLDER, metavar="FOLDER", help="where results are kept")
    args = parser.parse_args(arguments)
    try:
        parts = run.chosen(PARTS, args.part, args.seconds)
    except ValueError as error:
        parser.error(str(error))
    return run.drive(parts, args.json)


if __name__ == "__main__":
    sys.exit(main())
