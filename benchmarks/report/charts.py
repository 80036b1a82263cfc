"""Charts of rows: the newest beside their peers, and their history from result to result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.report.rows import Row, cells
from train.figures.curves import COLOURS, GRID, HEIGHT, INK, WIDTH, draw_panel

LABEL, PLANE, NOTE, BAR, TOP, BOTTOM = 430, 480, 460, 22, 66, 36
VERDICTS = {"met": "#2ca02c", "missed": "#d62728", "not measured": "#7f7f7f", None: "#1f77b4"}


def draw_newest(rows: Sequence[Row], title: str, file: Path) -> None:
    """PNG: a bar for each row that has a peer, its ratio on a logarithmic axis, from 1 on."""
    rows = [row for row in rows if row.ratio]
    image = Image.new("RGB", (LABEL + PLANE + NOTE, TOP + BAR * len(rows) + BOTTOM), "white")
    pen, font, bottom = ImageDraw.Draw(image), ImageFont.load_default(13), TOP + BAR * len(rows)
    pen.text((12, 8), title, INK, ImageFont.load_default(17))
    x = 12.0
    for verdict, colour in VERDICTS.items():
        said = f"goal {verdict}" if verdict else "no goal"
        pen.rectangle((x, 36, x + 12, 48), colour)
        pen.text((x + 18, 34), said, INK, font)
        x += 42 + pen.textlength(said, font)
    ratios = [row.ratio for row in rows if row.ratio] or [1.0]
    low, high = math.floor(math.log2(min(*ratios, 0.5))), math.ceil(math.log2(max(*ratios, 2.0)))

    def across(ratio: float) -> float:
        return LABEL + (math.log2(ratio) - low) / (high - low) * PLANE

    for power in range(low, high + 1):
        pen.line((across(2.0**power), TOP, across(2.0**power), bottom), fill=INK if power == 0 else GRID)
        pen.text((across(2.0**power), bottom + 6), f"{2.0**power:g}x", INK, font, "ma")
    for i, row in enumerate(rows):
        assert row.ratio
        y = TOP + BAR * i
        left, right = sorted((across(1.0), across(row.ratio)))
        pen.rectangle((left, y + 4, right, y + BAR - 5), VERDICTS[row.verdict])
        pen.text(
            (LABEL - 8, y + BAR / 2),
            _shorten_to_fit(pen, f"{row.benchmark}: {row.what}", font, LABEL - 20),
            INK,
            font,
            "rm",
        )
        _, ours, peer, ratio, *_ = cells(row)
        pen.text(
            (LABEL + PLANE + 8, y + BAR / 2),
            _shorten_to_fit(pen, f"{ratio}  {ours}; {peer}", font, NOTE - 16),
            INK,
            font,
            "lm",
        )
    image.save(file)


def _shorten_to_fit(
    pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    while pen.textlength(text, font) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


def draw_history(histories: Sequence[Sequence[tuple[str, Row]]], file: Path, columns: int = 2) -> None:
    """PNG: a panel for each row, its figure and its best peer's over (commit, row) in order of time."""
    head = 26
    columns = min(columns, len(histories))
    image = Image.new("RGB", (columns * WIDTH, head + -(-len(histories) // columns) * HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, said in enumerate(("ours", "best peer")):
        pen.line((12 + 130 * i, 14, 42 + 130 * i, 14), fill=COLOURS[i], width=3)
        pen.text((50 + 130 * i, 14), said, INK, font, "lm")
    for number, history in enumerate(histories):
        corner = number % columns * WIDTH, head + number // columns * HEIGHT
        last = history[-1][1]
        curves = [
            [(float(i), value) for i, (_, row) in enumerate(history) if (value := getattr(row, field)) is not None]
            for field in ("value", "peer_value")
        ]
        title = f"{last.what}, {last.unit}, {'less' if last.lower_is_better else 'more'} is better"
        draw_panel(pen, corner, title, curves, window=1, names=[commit for commit, _ in history])
    image.save(file)
