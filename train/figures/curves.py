"""Training curves of several runs in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont

from phi4rv.errors import UserError
from train.figures.metrics import METRICS, is_finite, read_metrics

INK, GRID = "#333333", "#e4e4e4"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
PANELS = {
    "loss": "loss, mean over the labelled tokens of a step",
    "loss_reasoning": "loss of samples that reason",
    "loss_direct": "loss of samples that answer directly",
    "grad_norm": "gradient norm before clipping",
    "lr": "learning rate",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "data_wait": "wait for data, s",
}
WIDTH, HEIGHT, COLUMNS = 720, 300, 2
LEFT, TOP, RIGHT, BOTTOM = 84, 30, 20, 34
LEGEND = 24  # height of a run's line above the panels


@dataclass(frozen=True)
class Run:
    """A run's name and the metrics of its steps, in order."""

    name: str
    steps: list[dict[str, Any]]

    @staticmethod
    def of(path: Path) -> Run:
        """From a run's output folder or its metrics.jsonl. UserError if there is none, or no step in it."""
        file = path / METRICS if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path}: no {METRICS} there; give a run's output folder or that file")
        steps = [e for e in read_metrics(file) if is_finite(e.get("step")) and "loss" in e]
        if not steps:
            raise UserError(f"{file}: no step in it; give the {METRICS} of a run that has taken one")
        return Run(str(path), steps)

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) where the value is a finite number."""
        return [(e["step"], e[name]) for e in self.steps if is_finite(e.get(name))]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the ``window`` - 1 before it, fewer at the start."""
    return [mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def default_window(count: int) -> int:
    """A twentieth of the run."""
    return max(1, count // 20)


def draw_panel(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    title: str,
    curves: Sequence[list[tuple[float, float]]],
    window: int | None = None,
    names: Sequence[str] = (),
) -> None:
    """One plot at ``corner``: each curve of (step, value) thin, its running mean over ``window`` steps thick.

    ``names``: labels of the steps 0, 1, … in place of their numbers, as many as there is room for.
    """
    font = ImageFont.load_default(13)
    (x0, y0), plot_size = corner, (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    pen.text((x0 + LEFT, y0 + 6), title, INK, font)
    points = [point for curve in curves for point in curve]
    if not points:
        pen.text((x0 + LEFT, y0 + TOP + 20), "not measured", INK, font)
        return
    first, last = min(s for s, _ in points), max(s for s, _ in points)
    low, high = min(0.0, *(v for _, v in points)), max(v for _, v in points)

    def to_pixel(step: float, value: float) -> tuple[float, float]:
        x = x0 + LEFT + (step - first) / ((last - first) or 1) * plot_size[0]
        return x, y0 + TOP + (1 - (value - low) / ((high - low) or 1)) * plot_size[1]

    for i in range(6):
        value = low + (high - low) * i / 5
        pen.line([to_pixel(first, value), to_pixel(last, value)], fill=GRID)
        pen.text((x0 + LEFT - 8, to_pixel(first, value)[1]), f"{value:.4g}", INK, font, "rm")
    for step, label in _ticks(first, last, names):
        pen.text((to_pixel(step, low)[0], y0 + HEIGHT - BOTTOM + 8), label, INK, font, "mt")
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        pen.line([to_pixel(*point) for point in curve], fill=_pale(colour), width=1)
        means = running_mean([v for _, v in curve], window or default_window(len(curve)))
        pen.line([to_pixel(s, v) for (s, _), v in zip(curve, means, strict=True)], fill=colour, width=3)


def _ticks(first: float, last: float, names: Sequence[str]) -> list[tuple[float, str]]:
    """(step, label) of the ticks on the axis of steps."""
    if not names:
        return [(step, f"{step:.0f}") for step in (first + (last - first) * i / 5 for i in range(6))]
    every = -(-len(names) // 4)
    return [(float(i), name) for i, name in enumerate(names) if i % every == 0 and first <= i <= last]


def _pale(colour: str) -> tuple[int, ...]:
    return tuple((2 * 255 + part) // 3 for part in ImageColor.getrgb(colour))


def draw_curves(
    path: Path, runs: Sequence[Run], names: Sequence[str] = tuple(PANELS), window: int | None = None
) -> None:
    """PNG with a panel for each of ``names`` and a legend of the runs."""
    columns = min(COLUMNS, len(names))
    head = LEGEND * (len(runs) + 1)
    size = columns * WIDTH, head + -(-len(names) // columns) * HEIGHT
    image = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    over = f"{window} steps" if window else "a twentieth of the run"
    pen.text((12, 5), f"thin: each step; thick: running mean over {over}", INK, font)
    for number, run in enumerate(runs):
        y, colour = LEGEND * (number + 1) + LEGEND // 2, COLOURS[number % len(COLOURS)]
        pen.line([(12, y), (42, y)], fill=colour, width=3)
        pen.text((50, y), run.name, INK, font, "lm")
    for number, name in enumerate(names):
        corner = number % columns * WIDTH, head + number // columns * HEIGHT
        draw_panel(pen, corner, PANELS[name], [run.series(name) for run in runs], window)
    image.save(path)
