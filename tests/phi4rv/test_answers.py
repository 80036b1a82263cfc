"""Answers taken apart: thinking, boxes, points, and the spellings of the direct-answer token."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from phi4rv.errors import UserError
from phi4rv.processing.answers import (
    NOTHINK_SPELLINGS,
    Answer,
    canonical_answer,
    find_boxes,
    find_non_finite,
    find_points,
    parse_answer,
    pixel_box,
)

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-checkpoint"


def test_the_first_spelling_is_a_token_of_the_released_tokenizer() -> None:
    config = json.loads((CHECKPOINT / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert NOTHINK_SPELLINGS[0] in {token["content"] for token in config["added_tokens_decoder"].values()}


@pytest.mark.parametrize(
    ("text", "mode", "thinking", "final"),
    [
        ("Dubai", "auto", None, "Dubai"),
        ("<think>The top line.\n\n</think>Dubai<|im_end|>", "auto", "The top line.", "Dubai"),
        (" \n<think> a </think>\n\n b ", "auto", "a", "b"),
        ("a</think>b", "think", "a", "b"),
        ("<think>a</think>b", "think", "a", "b"),
        ("<think>a</think>b", "nothink", "a", "b"),
        ("<think></think>b", "auto", "", "b"),
        ("</think>b", "think", "", "b"),
        ("<think>a</think>", "auto", "a", ""),
        ("cut off", "think", "cut off", ""),
        ("<think>cut off<|im_end|>", "auto", "cut off", ""),
        ("", "think", "", ""),
        ("", "auto", None, ""),
        ("<|im_end|>", "auto", None, ""),
        ("b<|im_end|> <|endoftext|>\n<|im_end|>", "auto", None, "b"),
        ("a<|im_end|>b<|endoftext|>", "auto", None, "a<|im_end|>b"),
        ("<|dummy_84|>b", "nothink", None, "b"),
        ("b", "nothink", None, "b"),
        (" <nothink> b", "auto", None, "b"),
        ("<notthink><nothink>b", "auto", None, "b"),
        ("<think>a</think><|dummy_84|>b", "auto", "a", "b"),
        ("use <nothink> and <think> or </think>", "auto", None, "use <nothink> and <think> or </think>"),
        ("a</think>b</think>c", "think", "a", "b</think>c"),
    ],
)
def test_parse_answer(text: str, mode: str, thinking: str | None, final: str) -> None:
    assert parse_answer(text, mode) == Answer(thinking, final, [], [])


def test_boxes_come_from_the_final_text_only() -> None:
    answer = parse_answer("<think>maybe [0, 0, 1, 1] or (0.1, 0.2)</think>[0.1, 0.2, 0.3, 0.4], (0.5, 0.6)")
    assert answer.boxes == [(0.1, 0.2, 0.3, 0.4)]
    assert answer.points == [(0.5, 0.6)]
    unfinished = parse_answer("[0.1, 0.2, 0.3, 0.4]", "think")
    assert unfinished.boxes == [] and unfinished.text == ""


def test_parse_answer_refuses_an_unknown_mode() -> None:
    with pytest.raises(UserError, match="unknown mode 'slow'"):
        parse_answer("x", "slow")


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[0.5830, 0.1090, 0.6250, 0.1180]", [(0.583, 0.109, 0.625, 0.118)]),
        ("(0,0,1,1)", [(0.0, 0.0, 1.0, 1.0)]),
        ("[ +.5 ,\n5e-1, 1., 1E0 ]", [(0.5, 0.5, 1.0, 1.0)]),
        ("[[0, 0, .5, .5], [0.5, 0.5, 1, 1]]", [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)]),
        ("[0.2, 0.2, 0.2, 0.2]", [(0.2, 0.2, 0.2, 0.2)]),
        ("[-0.0, 0, 1, 1]", [(0.0, 0.0, 1.0, 1.0)]),
        ("[-0.1, 0, 1, 1]", []),
        ("[0, 0, 1, 1.0001]", []),
        ("[0, 0, 640, 480]", []),
        ("[0.6, 0.1, 0.5, 0.2]", []),
        ("[0.1, 0.6, 0.5, 0.2]", []),
        ("[nan, 0, 1, 1] [0, 0, 1, inf] [0, 0, 1, 1e999] [0, 0, 1, Infinity]", []),
        ("[0, 0, 1, 1) (0, 0, 1, 1]", []),
        ("[0, 0, 1] [0, 0, 1, 1, 1] [0 0 1 1] [0, 0, 1, 1,] [0,, 0, 1, 1]", []),
        ("[0, 0, 1, 1", []),
        ("[a, 0, 1, 1] [0x0, 0, 1, 1] [., 0, 1, 1] [1e, 0, 1, 1]", []),
        ("[0, 0, ١, 1]", []),
        ("", []),
    ],
)
def test_find_boxes(text: str, boxes: list[tuple[float, float, float, float]]) -> None:
    found = find_boxes(text)
    assert found == boxes
    assert all(math.copysign(1, value) > 0 for box in found for value in box)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("click(0.25, 1)", [(0.25, 1.0)]),
        ("[0.1,0.2] then (3e-1, 0.4)", [(0.1, 0.2), (0.3, 0.4)]),
        ("[(0.1, 0.2), (0.3, 0.4)]", [(0.1, 0.2), (0.3, 0.4)]),
        ("[0.1, 0.2, 0.3, 0.4] (0.5)", []),
        ("(1.5, 0) (-1, 0) (nan, 0) (0, inf) (0, 1]", []),
    ],
)
def test_find_points(text: str, points: list[tuple[float, float]]) -> None:
    assert find_points(text) == points


def test_long_hostile_text_is_read_in_linear_time() -> None:
    # Quadratic matching would take minutes on these.
    for text in (
        "[" + "1" * 500_000,
        "[" + "1," * 250_000,
        "[" * 500_000,
        "[1" + " " * 500_000,
        "(.1" * 160_000,
    ):
        assert find_boxes(text) == [] and find_points(text) == [] and find_non_finite(text) is None
    assert parse_answer("x" + " " * 500_000 + "y").text.endswith("y")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("at [nan, 0.1, 0.2, 0.3].", "[nan, 0.1, 0.2, 0.3]"),
        ("[0.1, 0.2, -inf, 0.3]", "[0.1, 0.2, -inf, 0.3]"),
        ("[0.5, Infinity]", "[0.5, Infinity]"),
        ("(0.5, NaN)", "(0.5, NaN)"),
        ("(0, 0, 1, 1e999)", "(0, 0, 1, 1e999)"),
        ("the domain is (0, inf), or [0, inf) or (-inf, 0]", None),
        ("[0.1, 0.2] (an inf) [nan] nan, 1", None),
        ("[nancy, 0.1] [info, 1]", None),
    ],
)
def test_find_non_finite(text: str, found: str | None) -> None:
    assert find_non_finite(text) == found


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0, 0, 37, 11)),
        ((0.5, 0.5, 0.5, 0.5), (19, 6, 19, 6)),
        ((-3.0, -0.1, 1.7, 1e300), (0, 0, 37, 11)),
        ((0.0134, 0.045, 0.0136, 0.046), (0, 0, 1, 1)),
    ],
)
def test_pixel_box(box: tuple[float, float, float, float], pixels: tuple[int, int, int, int]) -> None:
    assert pixel_box(box, 37, 11) == pixels


def test_pixel_box_recovers_every_pixel_box() -> None:
    width, height = 960, 541
    for left in range(0, width, 7):
        for top in range(0, height, 11):
            exact = (left, top, min(left + 5, width), min(top + 3, height))
            box = tuple(float(Fraction(v, s)) for v, s in zip(exact, (width, height) * 2, strict=True))
            assert pixel_box(box, width, height) == exact  # type: ignore[arg-type]


def test_pixel_box_is_what_pillow_crops() -> None:
    image = Image.new("RGB", (37, 11))
    assert image.crop(pixel_box((0.25, 0.0, 0.75, 1.0), *image.size)).size == (19, 11)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pixel_box_refuses(bad: float) -> None:
    with pytest.raises(UserError, match="not a number"):
        pixel_box((0.0, bad, 1.0, 1.0), 10, 10)
    with pytest.raises(UserError, match="0 x 10 pixels"):
        pixel_box((0.0, 0.0, 1.0, 1.0), 0, 10)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("<notthink>[0.5830, 0.1090]", "<D>[0.5830, 0.1090]"),
        ("<nothink> x ", "<D> x "),
        ("\n <|dummy_84|>x", "<D>x"),
        ("<think>a</think>b", "<think>a</think>b"),
        (" plain", " plain"),
        ("say <nothink>", "say <nothink>"),
        ("<nothink><nothink>x", "<D><nothink>x"),
        ("", ""),
    ],
)
def test_canonical_answer(value: str, expected: str) -> None:
    assert canonical_answer(value, "<D>") == expected
    assert canonical_answer(canonical_answer(value, "<|dummy_84|>"), "<|dummy_84|>") == canonical_answer(
        value, "<|dummy_84|>"
    )
