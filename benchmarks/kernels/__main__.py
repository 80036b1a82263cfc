"""The Triton kernels beside their peers: ``python -m benchmarks.kernels [--only NAME …] [--json FILE] [--chart FILE]``.

Exit status 1 if a kernel failed or was wrong. A missed goal is a result, not a failure.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.kernels import operation_names
from benchmarks.kernels.report import chart, table, table_rows
from benchmarks.kernels.suite import run
from benchmarks.report.result_files import environment, write_results

__all__ = ["main", "run", "table", "table_rows"]


def failed(result: dict[str, Any]) -> bool:
    """Whether a kernel of ours failed or was wrong."""
    return any(row["status"] in ("failed", "wrong") for row in result["rows"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Kernels beside their peers.")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=operation_names(), default=[], help="these operations"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw shares of the measured ceilings")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="begin no row after N seconds")
    args = parser.parse_args(arguments)
    result = run(args.only, args.seconds)
    about = environment()
    if args.json:
        write_results(args.json, {"kernels": result}, about)
    if args.chart:
        chart(
            result, f"{about['device']}, {about['date']}, commit {about['commit']}, torch {about['torch']}", args.chart
        )
    print(table(result))
    return 1 if failed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
