"""An answer's boxes drawn on an image."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw

from phi4rv.processing.answers import Box, Point, pixel_box

COLOUR = "#e6194b"


def draw_answer(
    image: Image.Image, boxes: Iterable[Box], points: Iterable[Point] = (), colour: str = COLOUR
) -> Image.Image:
    """A copy of ``image`` with each normalised box outlined and each point ringed."""
    out = image.convert("RGB")
    pen = ImageDraw.Draw(out)
    width = max(1, round(max(out.size) / 300))
    for box in boxes:
        left, top, right, bottom = pixel_box(box, *out.size)
        # pixel_box gives edges between pixels, the pen wants pixels.
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
    for x, y in points:
        centre = x * out.width, y * out.height
        pen.circle(centre, 3 * width, outline=colour, width=width)
    return out
