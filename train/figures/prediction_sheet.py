"""A sheet of held-out predictions: each image with the right box and the model's, and both answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from infer.draw_boxes import draw_answer
from infer.heldout import Question, centre_in
from phi4rv.processing.answers import Answer
from phi4rv.processing.chat_template import IMAGE_TOKEN
from phi4rv.processing.images import open_image

RIGHT, GIVEN, WRONG = "#2ca02c", "#1f77b4", "#d62728"
TILE, TEXT, COLUMNS = 250, 104, 4


def prediction_sheet(path: Path, questions: Sequence[Question], given: Sequence[Answer], count: int = 16) -> None:
    """PNG of the first ``count`` questions on a single image: right box green, the model's blue or, if wrong, red."""
    shown = [pair for pair in zip(questions, given, strict=True) if len(pair[0].prompt.images) == 1][:count]
    rows = -(-len(shown) // COLUMNS) or 1
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + TEXT)), "white")
    for number, (question, answer) in enumerate(shown):
        corner = number % COLUMNS * TILE, number // COLUMNS * (TILE + TEXT)
        sheet.paste(_tile(question, answer), corner)
    sheet.save(path)


def _tile(question: Question, answer: Answer) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE + TEXT), "white")
    image = open_image(question.prompt.images[0])
    scale = (TILE - 10) / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    right = question.reference
    good = right.text.lower() == answer.text.lower()
    if right.boxes:
        good = bool(answer.boxes) and centre_in(answer.boxes[0], right.boxes[0])
        image = draw_answer(image, right.boxes, colour=RIGHT)
        image = draw_answer(image, answer.boxes[:1], colour=GIVEN if good else WRONG)
    tile.paste(image, (5, 5))
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    asked = question.prompt.messages()[-1].content.replace(IMAGE_TOKEN, "").strip()
    lines = textwrap.wrap(asked, 40)[:3]
    pen.text((6, TILE + 2), "\n".join(lines), "black", font)
    below = TILE + 4 + 15 * len(lines)
    pen.text((6, below), f"right: {right.text}", RIGHT, font)
    pen.text((6, below + 16), f"model: {answer.text[:40] or '(nothing)'}", GIVEN if good else WRONG, font)
    return tile
