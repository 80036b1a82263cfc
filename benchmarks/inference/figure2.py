"""The chart of ``benchmarks/inference/protocol.py``: the report's Figure 2, and the same for each kind of question."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from train.figures.curves import COLOURS, GRID, INK

AXES = {"seconds": "seconds an answer", "tokens": "tokens an answer"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 300, 72, 34, 24, 54
HEAD, LINE, TICKS, SIZE = 34, 24, 5, 9
STEPS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)

Rows = list[dict[str, Any]]


def draw(path: Path, result: dict[str, Any]) -> None:
    """PNG: a row of two diagrams for the mean of all kinds, then for each kind; a colour an engine, a shape a mode."""
    rows: Rows = result["rows"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    kinds = [*kinds[-1:], *kinds[:-1]]  # the mean stands last in the table
    curves = list(dict.fromkeys((row["engine"], row["mode"]) for row in rows))
    engines, modes = (list(dict.fromkeys(names)) for names in zip(*curves, strict=True))
    marks = {(e, m): (engines.index(e), modes.index(m)) for e, m in curves}
    head = HEAD + LINE * len(curves)
    image = Image.new("RGB", (WIDTH * len(AXES), head + HEIGHT * len(kinds)), "white")
    pen = ImageDraw.Draw(image)
    title = f"Accuracy against what an answer takes, greedy, batch one, at most {result['max_new_tokens']} tokens"
    pen.text((12, 10), title, INK, ImageFont.load_default(15))
    for number, curve in enumerate(curves):
        y = HEAD + LINE * number + LINE // 2
        mark(pen, 22, y, *marks[curve])
        pen.text((40, y), f"{curve[0]}, {curve[1]}", INK, ImageFont.load_default(13), "lm")
    for number, kind in enumerate(kinds):
        own = [row for row in rows if row["kind"] == kind]
        for column, axis in enumerate(AXES):
            diagram(pen, (column * WIDTH, head + number * HEIGHT), kind, axis, own, marks)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def diagram(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], kind: str, axis: str, rows: Rows,
    marks: dict[tuple[str, str], tuple[int, int]],
) -> None:  # fmt: skip
    """Accuracy from 0 to 1 upwards, ``axis`` from 0 to the right."""
    font, (x0, y0) = ImageFont.load_default(12), corner
    tick = round_tick(max(row[axis] for row in rows) / TICKS)

    def at(share: float, accuracy: float) -> tuple[float, float]:
        plane = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return x0 + LEFT + share * plane[0], y0 + TOP + (1 - accuracy) * plane[1]

    pen.text((x0 + LEFT + 12, y0 + 10), kind, INK, ImageFont.load_default(14))
    pen.text((x0 + 12, y0 + 12), "accuracy", INK, font)
    pen.text((at(0.5, 0)[0], y0 + HEIGHT - 14), AXES[axis], INK, font, "mm")
    for i in range(TICKS + 1):
        share = i / TICKS
        pen.line([at(0, share), at(1, share)], GRID)
        pen.line([at(share, 0), at(share, 1)], GRID)
        pen.text((at(0, share)[0] - 12, at(0, share)[1]), f"{share:.1f}", INK, font, "rm")
        pen.text((at(share, 0)[0], at(0, 0)[1] + 12), f"{i * tick:.4g}", INK, font, "mt")
    for row in rows:
        mark(pen, *at(row[axis] / (TICKS * tick), row["accuracy"]), *marks[row["engine"], row["mode"]])


def round_tick(least: float) -> float:
    """One of STEPS times a power of ten, ``least`` or the next one above it; 1 for nothing."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return power * next(step for step in STEPS if step * power >= least * (1 - 1e-9))


def mark(pen: ImageDraw.ImageDraw, x: float, y: float, engine: int, mode: int) -> None:
    """The outline of a circle, square or triangle, smaller for each further engine: marks on one another all show."""
    colour, size = COLOURS[engine % len(COLOURS)], SIZE - 2 * engine
    if mode == 0:
        pen.ellipse((x - size, y - size, x + size, y + size), outline=colour, width=2)
    elif mode == 1:
        pen.rectangle((x - size, y - size, x + size, y + size), outline=colour, width=2)
    else:
        pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], outline=colour, width=2)
