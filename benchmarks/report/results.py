"""All committed results as text, charts and a table of the newest: ``python -m benchmarks.report``.

From ``benchmarks/results/<device>/*.json`` it writes ``benchmarks/RESULTS.md``, charts beside the results, and what
stands between MARKS in ``docs/measurements.md``. Nothing in them depends on when or where it is called. A file that
cannot be read is named in one line, there and as an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import ROOT
from benchmarks.report.benchmarks import MODULES, table_rows
from benchmarks.report.charts import draw_history, draw_newest
from benchmarks.report.result_files import FOLDER
from benchmarks.report.rows import HEADERS, Row, cells, figure, markdown
from phi4rv.command_line import Parser, exit_status
from phi4rv.errors import UserError

PAGE = "docs/measurements.md"
MARKS = "<!-- measured: by python -m benchmarks.report -->", "<!-- end of measured -->"
# Relative; of a figure whose record has no spread, and the least that any figure is taken to have.
NOISE, LEAST_NOISE = 0.10, 0.02
COLUMNS = 8  # newest results that a history table shows; the charts show all
HEAD = f"""# Results

Written by `python -m benchmarks.report` from `benchmarks/results/`, where every figure, its peers, their versions and
settings stand in full. Of each row the newest result that has it.

ratio: how many times better than the peer. Of the ceiling: of the copy bandwidth (`copy`) or the rate of a large
matrix product (`product`) measured in the same run. Noise: the width of the middle half of a row's repetitions over
their median, at least {LEAST_NOISE:.0%}, and {NOISE:.0%} where a record has none. Runs at tiny shapes, which only show
that everything runs, are left out.
"""


@dataclass(frozen=True)
class Result:
    """One file. rows: without those at tiny shapes."""

    name: str
    about: dict[str, Any]
    rows: list[Row]

    @property
    def when(self) -> str:
        return f"{self.about['date']} {self.about['commit']}"


@dataclass(frozen=True)
class Point:
    """A row and the result it is from."""

    result: Result
    row: Row


def read(file: Path) -> Result:
    """ValueError, in one line, of what is no result."""
    try:
        about = json.loads(file.read_text())
        results = about.pop("results")
        found = table_rows(results)
        if missing := {"device", "date", "commit", "torch"} - set(about):
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise ValueError(f"{file.parent.name}/{file.name}: {said}") from error
    return Result(file.stem, about, [row for row in found if not row.tiny])


def read_all(folder: Path) -> tuple[dict[str, list[Result]], list[str]]:
    """By device's folder the results in order of time, those without rows left out; and what could not be read."""
    found: dict[str, list[Result]] = {}
    broken = []
    for file in sorted(folder.glob("*/*.json")):
        try:
            result = read(file)
        except ValueError as error:
            broken.append(str(error))
            continue
        if result.rows:
            found.setdefault(file.parent.name, []).append(result)
    for results in found.values():
        results.sort(key=lambda r: (r.about["date"], r.about.get("time", ""), r.name))
    return found, broken


def histories(results: Sequence[Result]) -> dict[tuple[str, str], list[Point]]:
    """By benchmark and row its points in order of time, of the rows that the newest result of their benchmark has."""
    newest = {row.benchmark: result for result in results for row in result.rows}
    keys = [(row.benchmark, row.what) for name in MODULES if name in newest for row in newest[name].rows
            if row.benchmark == name]  # fmt: skip
    found: dict[tuple[str, str], list[Point]] = {key: [] for key in keys}
    for result in results:
        for row in result.rows:
            if (row.benchmark, row.what) in found:
                found[row.benchmark, row.what].append(Point(result, row))
    return found


def latest(points: Sequence[Point]) -> Point:
    """The newest with a figure; without any the newest."""
    return next((p for p in reversed(points) if p.row.value is not None), points[-1])


def noise(row: Row) -> float:
    """How far a repetition of the measurement may be off, relative."""
    return max(LEAST_NOISE, NOISE if row.noise is None else row.noise)


def regression(points: Sequence[Point]) -> tuple[Point, float] | None:
    """The best earlier point and by how much the newest figure is worse, if by more than both their noises."""
    now = latest(points)
    earlier = [p for p in points[: points.index(now)] if p.row.value]
    if now.row.value is None or not earlier:
        return None
    best = (min if now.row.lower_is_better else max)(earlier, key=lambda p: p.row.value)
    assert best.row.value
    worse = now.row.value / best.row.value - 1 if now.row.lower_is_better else best.row.value / now.row.value - 1
    return (best, worse) if worse > noise(now.row) + noise(best.row) else None


def device_text(name: str, results: Sequence[Result]) -> str:
    """The part of RESULTS.md about one device."""
    found = histories(results)
    parts = [f"## {results[-1].about['device']}", _versions(results[-1]), f"![ratios](results/{name}/newest.png)"]
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in found):
        mine = {what: points for (b, what), points in found.items() if b == benchmark}
        parts += [f"### {benchmark}", newest_table([latest(points) for points in mine.values()])]
        if several := {what: points for what, points in mine.items() if len(points) > 1}:
            parts += [
                f"#### Course of {benchmark}",
                history_table(several),
                f"![course]({_history_chart(name, benchmark)})",
            ]
    lines = [_regression_line(what, points) for (_, what), points in found.items()]
    said = [line for line in lines if line] or ["Nothing, or nothing was measured twice."]
    return "\n\n".join([*parts, "### Slower than the best earlier result by more than the noise", *said])


def _versions(result: Result) -> str:
    left = ("device", "date", "commit", "time", "parts", "peers")
    said = ", ".join(f"{k} {v}" for k, v in result.about.items() if k not in left and v != "not installed")
    return f"Newest result {result.when}: {said}."


def newest_table(points: Sequence[Point], named: bool = False) -> str:
    """``named``: each row says which benchmark it is of."""
    lines = []
    for point in points:
        what, *others = cells(point.row)
        lines.append((f"{point.row.benchmark}: {what}" if named else what, *others, point.result.when))
    return markdown((*HEADERS, "measured"), lines)


def history_table(found: dict[str, list[Point]]) -> str:
    """Of each row its figures in the newest COLUMNS results that have any of them."""
    every = {p.result.when: p.result for points in found.values() for p in points}
    shown = sorted(every.values(), key=lambda r: (r.about["date"], r.about.get("time", ""), r.name))[-COLUMNS:]
    lines = []
    for what, points in found.items():
        by = {p.result.when: p.row for p in points}
        taken = [by.get(result.when) for result in shown]
        lines.append((what, *("-" if r is None or r.value is None else figure(r.value, r.unit) for r in taken)))
    return markdown(("what", *(result.when for result in shown)), lines)


def _regression_line(what: str, points: Sequence[Point]) -> str | None:
    if (found := regression(points)) is None:
        return None
    (best, worse), now = found, latest(points)
    assert now.row.value is not None and best.row.value is not None
    return (
        f"- {now.row.benchmark}, {what}: {figure(now.row.value, now.row.unit)} ({now.result.when}), "
        f"{worse:.0%} worse than {figure(best.row.value, best.row.unit)} ({best.result.when})"
    )


def _history_chart(name: str, benchmark: str) -> str:
    return f"results/{name}/course-{benchmark}.png"


def results_text(devices: dict[str, list[Result]], broken: Sequence[str]) -> str:
    """RESULTS.md."""
    parts = [HEAD, *(device_text(name, results) for name, results in devices.items())]
    if broken:
        parts += ["## Not read", "\n".join(f"- {line}" for line in broken)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def headline_table(devices: dict[str, list[Result]]) -> str:
    """What stands between the marks: of each device the ``headline`` rows."""
    parts = []
    for results in devices.values():
        points = [point for points in histories(results).values() if (point := latest(points)).row.headline]
        parts += [f"{results[-1].about['device']}:", newest_table(points, named=True)]
    return "\n\n".join(parts)


def with_table(page: str, table: str) -> str:
    """The page's text with the table between its marks."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise UserError(f"{PAGE}: the marks {MARKS[0]} and {MARKS[1]} must stand in it, in this order")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def draw_all(devices: dict[str, list[Result]], folder: Path) -> list[Path]:
    """The charts that RESULTS.md names."""
    files = []
    for name, results in devices.items():
        found = histories(results)
        files.append(folder / name / "newest.png")
        title = f"{results[-1].about['device']}: how many times better than the best peer"
        draw_newest([latest(points).row for points in found.values()], title, files[-1])
        for benchmark in dict.fromkeys(benchmark for benchmark, _ in found):
            several = [points for (b, _), points in found.items() if b == benchmark and len(points) > 1]
            if several:
                files.append(folder.parent / _history_chart(name, benchmark))
                draw_history([[(p.result.about["commit"], p.row) for p in points] for points in several], files[-1])
    return files


def make_parser() -> Parser:
    return Parser("benchmarks.report", "Writes all results as text and charts: RESULTS.md, docs/measurements.md.")


def command(args: argparse.Namespace) -> None:
    devices, broken = read_all(FOLDER)
    (FOLDER.parent / "RESULTS.md").write_text(results_text(devices, broken))
    page = ROOT / PAGE
    page.write_text(with_table(page.read_text(), headline_table(devices)))
    for file in ("benchmarks/RESULTS.md", PAGE, *(f.relative_to(ROOT) for f in draw_all(devices, FOLDER))):
        print(f"written: {file}")
    if broken:
        raise UserError("; ".join(broken))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
