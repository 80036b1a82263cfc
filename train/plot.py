"""``python -m train.plot RUN…``: draws runs beside one another and prints a table of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from phi4rv.command_line import MOST, OUTPUT, Number, Parser, exit_status
from phi4rv.errors import UserError
from train.figures.curves import PANELS, Run, default_window, draw_curves


def table(runs: Sequence[Run]) -> str:
    """A line a run: losses over its last twentieth, median rates, the share of time spent waiting, skipped steps."""
    heads = ("steps", "loss", "reasoning", "direct", "tokens/s", "MFU", "wait", "skipped", "hours")
    width = max(4, *(len(run.name) for run in runs))
    lines = [f"{'run':{width}}" + "".join(f"{head:>11}" for head in heads)]
    for run in runs:
        values = {name: [v for _, v in run.series(name)] for name in (*PANELS, "seconds")}
        ends = [_last(values[name]) for name in ("loss", "loss_reasoning", "loss_direct")]
        seconds = sum(values["seconds"])
        cells = [
            f"{run.steps[-1]['step']:,}",
            *("-" if end is None else f"{end:.4f}" for end in ends),
            f"{median(values['tokens_per_second']):,.0f}" if values["tokens_per_second"] else "-",
            f"{median(values['mfu']):.1%}" if values["mfu"] else "-",
            f"{sum(values['data_wait']) / seconds:.1%}" if values["data_wait"] and seconds else "-",
            str(run.steps[-1].get("skipped_steps", "-")),
            f"{seconds / 3600:.2f}",
        ]
        lines.append(f"{run.name:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _last(values: list[float]) -> float | None:
    return mean(values[-default_window(len(values)) :]) if values else None


def make_parser() -> Parser:
    parser = Parser("train.plot", "Draws runs beside one another, and prints a table of them.")
    parser.add("runs", nargs="+", kind=Path, metavar="RUN", help="output folders or metrics.jsonl files of runs")
    parser.add("--output", kind=Path, default=Path("plot.png"), metavar="PNG", help=f"{OUTPUT}; a picture")
    parser.add(
        "--smooth", kind=Number(int, 1, MOST), help="steps of the running mean", unset="a twentieth of the steps"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output: {args.output} must end in .png")
    runs = [Run.of(path) for path in args.runs]
    draw_curves(args.output, runs, window=args.smooth)
    print(table(runs))
    print(f"written: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
