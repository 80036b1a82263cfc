"""What the model answers: thinking, final text, and the normalised coordinates in it."""

import math
import re
from dataclasses import dataclass

from phi4rv.errors import UserError
from phi4rv.processing.chat_template import END_OF_TURN, NOTHINK, THINK, check_mode

Box = tuple[float, float, float, float]
Point = tuple[float, float]

THINK_END = "</think>"
# The released tokenizer's spelling, the report's, and the misspelling in the report's own example.
NOTHINK_SPELLINGS = (NOTHINK, "<nothink>", "<notthink>")
END_TOKENS = (END_OF_TURN, "<|endoftext|>")

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NON_FINITE = r"[+-]?(?:nan|inf(?:inity)?)"


def _bracketed(item: str, repeats: str) -> re.Pattern[str]:
    """A list in matching brackets, square or round, of ``item`` and ``repeats`` (a quantifier) more of it."""
    items = rf"\s*{item}\s*(?:,\s*{item}\s*){repeats}"
    return re.compile(rf"\[({items})\]|\(({items})\)", re.IGNORECASE)


_BOX = _bracketed(_NUMBER, "{3}")
_POINT = _bracketed(_NUMBER, "{1}")
_ANY_LIST = _bracketed(f"(?:{_NUMBER}|{_NON_FINITE})", "+")


@dataclass(frozen=True)
class Answer:
    """An answer taken apart.

    ``thinking`` is None where the model did not think and "" where it thought nothing. ``text`` is the final
    answer. Both are without their tags and the white space around them. ``boxes`` and ``points`` are those of
    ``text``, never of the thinking.
    """

    thinking: str | None
    text: str
    boxes: list[Box]
    points: list[Point]


def parse_answer(text: str, mode: str = "auto") -> Answer:
    """Take the generated ``text`` apart; ``mode`` is the one that the prompt was rendered with.

    In mode "think" the prompt already ended in ``<think>``, so the text begins inside the thinking. Thinking
    without its ``</think>`` (the token limit) leaves an empty final text.
    """
    check_mode(mode)
    body = strip_end_tokens(text).lstrip()
    thinking = None
    if body.startswith(THINK) or mode == "think":
        thinking, _, body = body.removeprefix(THINK).partition(THINK_END)
        thinking = thinking.strip()
    body = strip_nothink(body).rstrip()
    return Answer(thinking, body, find_boxes(body), find_points(body))


def strip_end_tokens(text: str) -> str:
    """``text`` without the end tokens and the white space behind it."""
    text = text.rstrip()
    while text.endswith(END_TOKENS):
        for end in END_TOKENS:
            text = text.removesuffix(end).rstrip()
    return text


def strip_nothink(text: str) -> str:
    """``text`` without the direct-answer tokens, however spelled, and the white space in front of it."""
    text = text.lstrip()
    while spelling := _nothink_spelling(text):
        text = text.removeprefix(spelling).lstrip()
    return text


def canonical_answer(value: str, nothink_token: str) -> str:
    """A training answer in which the direct-answer token at its start, however spelled, is ``nothink_token``.

    White space in front of that token goes; everything else stays as it is, ``<think>…</think>`` included.
    """
    start = value.lstrip()
    spelling = _nothink_spelling(start)
    return nothink_token + start.removeprefix(spelling) if spelling else value


def find_boxes(text: str) -> list[Box]:
    """Every ``[x1, y1, x2, y2]`` or ``(x1, y1, x2, y2)`` in ``text`` that is a box in [0, 1], in order.

    Lists with a value outside [0, 1], or with x2 < x1 or y2 < y1, are not boxes and are left out.
    """
    boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in _find_normalised(_BOX, text)]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in boxes if x1 <= x2 and y1 <= y2]


def find_points(text: str) -> list[Point]:
    """Every ``[x, y]`` or ``(x, y)`` in ``text`` with both values in [0, 1], in order."""
    return [(x, y) for x, y in _find_normalised(_POINT, text)]


def find_non_finite(text: str) -> str | None:
    """The first bracketed coordinate list with a "nan" or "inf" among its numbers, or None.

    ``(0, inf)`` is an open interval, which a mathematical answer may hold, and not a coordinate list.
    """
    for match in _ANY_LIST.finditer(text):
        values = _values(match)
        is_interval = match[0].startswith("(") and len(values) == 2 and not any(map(math.isnan, values))
        # 1e999 is written as a number, but no number can hold it: it counts as infinite here.
        if not all(map(math.isfinite, values)) and not is_interval:
            return match[0]
    return None


def pixel_box(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """A normalised box as (left, top, right, bottom) in pixels of a ``width`` x ``height`` image.

    The values are edges between pixels, 0 to ``width`` and 0 to ``height``, as ``PIL.Image.crop`` takes them:
    each coordinate times its side, rounded to the nearest edge (halves up) and clamped to the image. A box
    under half a pixel wide may come out empty. Raises UserError for a side below 1 or a value not finite.
    """
    if width < 1 or height < 1:
        raise UserError(f"an image of {width} x {height} pixels has no pixels: both must be 1 or more")
    if not all(map(math.isfinite, box)):
        raise UserError(f"the box {box} has a coordinate that is not a number: give four in [0, 1]")

    def edge(value: float, side: int) -> int:
        return math.floor(min(max(value, 0.0), 1.0) * side + 0.5)

    x1, y1, x2, y2 = box
    return edge(x1, width), edge(y1, height), edge(x2, width), edge(y2, height)


def _nothink_spelling(text: str) -> str | None:
    return next((spelling for spelling in NOTHINK_SPELLINGS if text.startswith(spelling)), None)


def _values(match: re.Match[str]) -> list[float]:
    return [float(value) for value in (match[1] or match[2]).split(",")]


def _find_normalised(pattern: re.Pattern[str], text: str) -> list[list[float]]:
    found = [_values(match) for match in pattern.finditer(text)]
    return [[value + 0.0 for value in values] for values in found if all(0 <= value <= 1 for value in values)]
