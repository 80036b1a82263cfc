"""The rows of the results table, made from every benchmark's records: ours beside the best peer, and the goal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

VERDICTS = {"met": "met", "missed": "MISSED", "not measured": "not measured", None: ""}


@dataclass(frozen=True)
class Row:
    """One figure. ``what`` names it from commit to commit: no two rows of a benchmark share it.

    value, peer_value: the figure and that of the best ``peer``, in ``unit``; None where there is none, for ``reason``.
    share: of ``ceiling``, a rate measured in the same run. goal: as text; verdict: met, missed, not measured, or None
    without a goal. noise: width of the middle half of the repetitions over their median. tiny: at shapes that only show
    that everything runs. headline: one of the few rows that docs/measurements.md shows.
    """

    benchmark: str
    what: str
    value: float | None
    unit: str
    lower_is_better: bool = True
    peer: str | None = None
    peer_value: float | None = None
    share: float | None = None
    ceiling: str | None = None
    goal: str | None = None
    verdict: str | None = None
    noise: float | None = None
    reason: str | None = None
    tiny: bool = False
    headline: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer."""
        if not self.value or not self.peer_value:
            return None
        return self.peer_value / self.value if self.lower_is_better else self.value / self.peer_value


HEADERS = ("what", "ours", "best peer", "ratio", "of the ceiling", "goal", "")


def cells(row: Row) -> tuple[str, ...]:
    """As text, under HEADS."""
    ours = figure(row.value, row.unit) if row.value is not None else row.reason or "-"
    peer = f"{row.peer}: {figure(row.peer_value, row.unit)}" if row.peer and row.peer_value is not None else "-"
    share = "-" if row.share is None else f"{row.share:.1%} {row.ceiling}"
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
    return row.what, ours, peer, ratio, share, row.goal or "-", VERDICTS[row.verdict]


def figure(value: float, unit: str) -> str:
    """Four digits or more, and the unit."""
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.4g} {unit}"


def table(rows: Iterable[Row], width: int = 60) -> str:
    """For a terminal: rows under the name of their benchmark."""
    rows = list(rows)
    lines = [HEADERS, *map(cells, rows)]
    widths = [min(max(len(line[i]) for line in lines), width) for i in range(len(HEADERS))]

    def text(line: Sequence[str]) -> str:
        return "  " + "  ".join(_truncate(cell, n).ljust(n) for cell, n in zip(line, widths, strict=True)).rstrip()

    out, benchmark = [text(HEADERS)], None
    for row, line in zip(rows, lines[1:], strict=True):
        if row.benchmark != benchmark:
            benchmark = row.benchmark
            out.append(benchmark + (", tiny: what counts is that everything runs" if row.tiny else ""))
        out.append(text(line))
    return "\n".join(out)


def _truncate(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def markdown(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; a mark of its own in a cell is escaped."""
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
