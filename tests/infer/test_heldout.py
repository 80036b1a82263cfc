"""The measure at the end of a run, on cases worked out by hand, and the pictures that show it."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infer.heldout import MAX_RUNNING, Question, answers, centre_in, iou, score, shuffle_images
from phi4rv.processing.answers import Answer, Box, parse_answer
from phi4rv.processing.chat_template import Message
from phi4rv.processing.processor import Prompt
from phi4rv.processing.records import Record
from tests.small import picture, small_model
from train.figures.curves import Run, draw_curves
from train.figures.prediction_sheet import RIGHT, TILE, WRONG, prediction_sheet


def question(text: str, right: str, *images: Any) -> Question:
    return Question(Prompt(text, images, "nothink"), parse_answer(right))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.5), 1.0),
        ((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), 0.0),  # they share an edge
        ((0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 1.0, 1.0), 0.0),  # apart both ways: no product of two negatives
        ((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0), 1 / 3),
        ((0.0, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75), 0.25),
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0),
        ((0.5, 0.5, 0.5, 0.5), (0.0, 0.0, 1.0, 1.0), 0.0),
    ],
)
def test_iou(a: Box, b: Box, expected: float) -> None:
    assert iou(a, b) == iou(b, a) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((0.3, 0.3, 0.5, 0.5), True),
        ((0.0, 0.0, 1.0, 1.0), True),  # ten times too large, its centre in the middle
        ((0.0, 0.4, 0.4, 0.4), True),  # on the edge
        ((0.0, 0.0, 0.3, 0.9), False),
        ((0.3, 0.7, 0.5, 0.9), False),
    ],
)
def test_centre_in(box: Box, inside: bool) -> None:
    assert centre_in(box, (0.2, 0.2, 0.6, 0.6)) is inside


def test_score_by_hand() -> None:
    asked = [
        question("a", "[0.0, 0.0, 0.5, 0.5]"),
        question("b", "[0.0, 0.0, 0.5, 0.5]"),
        question("c", "[0.0, 0.0, 0.5, 0.5]"),
        question("d", "[0.0, 0.0, 0.5, 0.5]"),
        question("e", "Two buttons."),
        question("f", "Red"),
        question("g", "Blue"),
    ]
    said = [
        "[0.0, 0.0, 0.5, 0.5]",  # 1, 1
        "[0.0, 0.0, 1.0, 0.5] or [0.0, 0.0, 0.5, 0.5]",  # only the first counts: centre on the edge, half
        "It is at the top left.",  # no box
        "[0.6, 0.6, 0.9, 0.9]",
        " two buttons. ",
        "Reddish",
        "",
    ]
    assert score(asked, [parse_answer(text) for text in said]) == {
        "boxes": 4,
        "point_in_box": 2 / 4,
        "iou": pytest.approx((1 + 0.5) / 4),
        "texts": 3,
        "exact_match": pytest.approx(1 / 3),
    }


def test_score_without_a_kind_is_not_a_number() -> None:
    only_texts = score([question("e", "Yes")], [parse_answer("Yes")])
    assert only_texts["exact_match"] == 1
    assert only_texts["boxes"] == 0
    assert only_texts["iou"] is None, "NaN is not JSON"
    with pytest.raises(ValueError, match="zip"):
        score([question("e", "Yes")], [])


def test_shuffled_gives_each_another_picture_of_the_same_count() -> None:
    asked = [
        question("a", "1", "A"),
        question("b", "2", "B1", "B2"),
        question("c", "3", "C"),
        question("d", "4", "D"),
    ]
    mixed = shuffle_images(asked)
    assert [list(q.prompt.images) for q in mixed] == [["C"], ["B1", "B2"], ["D"], ["A"]]
    assert [(q.prompt.text, q.reference.text, q.prompt.mode) for q in mixed] == [
        (q.prompt.text, q.reference.text, q.prompt.mode) for q in asked
    ]


def test_question_of_a_record() -> None:
    """The first turn, with its own images alone, in the mode of its right answer."""
    turns = [
        Message("user", "<image> Where?"),
        Message("assistant", "<think>Left.</think> [0.1, 0.2, 0.3, 0.4]"),
        Message("user", "And here <image>?"),
        Message("assistant", "<nothink>No."),
    ]
    made = Question.from_record(Record([Path("a.png"), Path("b.png")], turns, "d.jsonl:1"))
    assert made.prompt == Prompt("<image> Where?", [Path("a.png")], "think")
    assert made.reference == Answer("Left.", "[0.1, 0.2, 0.3, 0.4]", [(0.1, 0.2, 0.3, 0.4)], [])
    direct = Question.from_record(Record([], turns[2:], "d.jsonl:1"))
    assert direct.prompt.mode == "nothink"
    assert direct.reference.text == "No."
    system = Message("system", "Be brief.")
    led = Question.from_record(Record([Path("a.png")], [system, *turns[:2]], "d.jsonl:1"))
    assert led.prompt.messages() == [system, turns[0]]
    assert led.reference == made.reference


def test_answers_come_in_order_over_several_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = small_model()
    asked = [question(f"What is {n} and {n % 3}?", "1") for n in range(7)]
    together = answers(model, processor, asked)
    assert len(asked) < MAX_RUNNING
    monkeypatch.setattr("infer.heldout.MAX_RUNNING", 3)
    assert answers(model, processor, asked) == together
    assert len({answer.text for answer in together}) > 1, "the case cannot tell the order"
    assert answers(model, processor, []) == []


def test_the_sheet_shows_boxes_texts_and_nothing(tmp_path: Path) -> None:
    image = tmp_path / picture(tmp_path, "a.png", 300, 200)
    wide = tmp_path / picture(tmp_path, "b.png", 4000, 3)
    asked = [
        question("<image>\nWhere is Save?", "[0.1, 0.1, 0.4, 0.4]", image),
        question("<image>\nWhere is Save?", "[0.1, 0.1, 0.4, 0.4]", image),
        question("<image>\n" + "How many of them are there? " * 20, "Four.", wide),
        question("<image> and <image>", "Two pictures are left out.", image, image),
        question("<image>\nWhat?", "A tree — größer", image),
    ]
    said = ["[0.2, 0.2, 0.3, 0.3]", "[0.6, 0.6, 0.9, 0.9] [0, 0, 1, 1]", "five " * 100, "-", ""]
    path = tmp_path / "sheet.png"
    prediction_sheet(path, asked, [parse_answer(text) for text in said])
    sheet = Image.open(path).convert("RGB")
    tiles = [sheet.crop((n * TILE, 0, (n + 1) * TILE, TILE)) for n in range(4)]

    def shows(tile: Image.Image, colour: str) -> bool:
        wanted = tuple(bytes.fromhex(colour[1:]))
        return any(pixel == wanted for _, pixel in tile.getcolors(TILE * TILE))

    assert [shows(tile, RIGHT) for tile in tiles] == [True, True, False, False]
    assert [shows(tile, WRONG) for tile in tiles] == [False, True, False, False]


def test_the_sheet_of_no_question(tmp_path: Path) -> None:
    prediction_sheet(tmp_path / "sheet.png", [], [])
    assert Image.open(tmp_path / "sheet.png").width > 0


@pytest.mark.parametrize("losses", [[2.0], [3.0, 1.0], [0.0, 0.0, 0.0], [float(i % 7) for i in range(200)]], ids=len)
def test_loss_curve(tmp_path: Path, losses: list[float]) -> None:
    steps = [{"step": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    draw_curves(tmp_path / "loss.png", [Run("run", steps)], ["loss"])
    curve = Image.open(tmp_path / "loss.png").convert("RGB")
    curve.load()
    if len(losses) > 1:
        assert (31, 119, 180) in [pixel for _, pixel in curve.getcolors(2**20)]
