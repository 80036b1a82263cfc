"""The Triton kernels beside their peers: ``python -m benchmarks.kernels [--only NAME …] [--json FILE] [--chart FILE]``.

Exit status 1 if a kernel failed or was wrong. A missed goal is a result, not a failure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels import operation_names
from benchmarks.kernels.report import chart, table, table_rows
from benchmarks.kernels.suite import run
from benchmarks.options import json_option, only_option, seconds_option
from benchmarks.report.result_files import environment, write_results
from phi4rv.command_line import CHART, Parser, exit_status

__all__ = ["main", "run", "table", "table_rows"]


def failed(result: dict[str, Any]) -> bool:
    """Whether a kernel of ours failed or was wrong."""
    return any(row["status"] in ("failed", "wrong") for row in result["rows"])


def make_parser() -> Parser:
    parser = Parser("benchmarks.kernels", "Times the kernels, beside their peers.")
    only_option(parser.add, operation_names(), "operations")
    json_option(parser.add)
    parser.add("--chart", kind=Path, metavar="PNG", help=f"{CHART}; shares of the measured ceilings", unset="not drawn")
    seconds_option(parser.add, "no row begins after it")
    return parser


def command(args: argparse.Namespace) -> int:
    result = run(args.only or [], args.seconds)
    about = environment()
    if args.json:
        write_results(args.json, {"kernels": result}, about)
    if args.chart:
        chart(
            result, f"{about['device']}, {about['date']}, commit {about['commit']}, torch {about['torch']}", args.chart
        )
    print(table(result))
    return 1 if failed(result) else 0


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
