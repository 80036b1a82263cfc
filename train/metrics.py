"""What a run shows while it goes and leaves behind: progress bar, metrics.jsonl, loss curve."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

INK, GRID, LINE, SMOOTH = "#333333", "#e4e4e4", "#b9d3ea", "#1f77b4"


class Progress:
    """The progress bar on stderr, and one JSON object a step appended to ``path``, flushed at once."""

    def __init__(self, path: Path, start: int, total: int):
        self.file = path.open("a", encoding="utf-8")
        often = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log keeps every state of the bar
        self.bar = tqdm(total=total, initial=start, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=often)

    def step(self, metrics: dict[str, Any]) -> None:
        self.write(metrics)
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['images_per_second']:.0f} images/s",
            refresh=False,
        )
        self.bar.update()

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float]) -> None:
    """PNG of loss against step, with a running mean over a twentieth of the run."""
    width, height, left, top, right, bottom = 960, 540, 72, 40, 24, 48
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    low, high = 0.0, max(losses)
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (step - first) / (last - first) * (width - left - right)
        return x, height - bottom - (loss - low) / ((high - low) or 1) * (height - top - bottom)

    for i in range(6):
        value, step = low + (high - low) * i / 5, first + (last - first) * i / 5
        pen.line([at(first, value), at(last, value)], fill=GRID)
        pen.text((left - 8, at(first, value)[1]), f"{value:.2f}", INK, font, "rm")
        pen.text((at(step, low)[0], height - bottom + 8), f"{step:.0f}", INK, font, "mt")
    pen.text((left, 12), "loss: mean over the labelled tokens of a step (thin), running mean (thick)", INK, font)
    pen.text((width - right, height - 8), "step", INK, font, "rb")
    pen.line([at(s, x) for s, x in zip(steps, losses, strict=True)], fill=LINE, width=1)
    window = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]
    pen.line([at(s, x) for s, x in zip(steps, means, strict=True)], fill=SMOOTH, width=3)
    image.save(path)
