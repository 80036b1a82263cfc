"""The report's protocol: questions of several kinds, how they are scored, averaged and drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.inference import command, protocol, questions
from benchmarks.inference.figure2 import HEAD, HEIGHT, LEFT, LINE, RIGHT, TOP, WIDTH, draw, round_tick
from benchmarks.inference.questions import make_questions, read_questions, sample
from phi4rv.processing.answers import parse_answer
from tests.small import PUBLISHED, picture, record, write_jsonl
from train.figures.curves import COLOURS


def asked_file(folder: Path) -> Path:
    """Two charts, a screen, and a sum without a picture."""
    image = picture(folder, "a.png", 64, 48)
    rows = [
        {"kind": "chart", **record("<image>\nHow high is it?", "<think>It says 40.</think>40 m", image)},
        {"kind": "chart", **record("<image>\nHow wide?", "<nothink>7", image)},
        {"kind": "screen", **record("<image>\nWhere is Save?", "<nothink>[0.2, 0.2, 0.4, 0.4]", image)},
        {"kind": "mathematics", **record("What is 2 + 3?", "<nothink>5")},
    ]
    return write_jsonl(folder / "asked.jsonl", rows)


def test_scores(tmp_path: Path) -> None:
    chart, _, screen, _ = read_questions(asked_file(tmp_path))
    assert (chart.kind, chart.where) == ("chart", f"{tmp_path / 'asked.jsonl'}:1")
    for said, right in (("40 m", True), ("<think>50</think> 40 M\n<|im_end|>", True), ("40", False), ("", False)):
        assert chart.right(parse_answer(said)) is right, said
    for said, right in (
        ("[0.0, 0.0, 0.6, 0.6]", True),  # its centre is 0.3, 0.3
        ("It is at [0.25, 0.25, 0.5, 0.5], I think", True),
        ("[0.35, 0.3, 0.5, 0.4]", False),
        ("[0.9, 0.9, 1.0, 1.0] or [0.2, 0.2, 0.4, 0.4]", False),  # the first counts
        ("Save", False),
    ):
        assert screen.right(parse_answer(said)) is right, said
    assert chart.prompt("nothink").mode == "nothink" and screen.prompt("auto").mode == "auto"


def test_samples_are_drawn_from_each_kind(tmp_path: Path) -> None:
    every = read_questions(make_questions(tmp_path, 6, seed=3))
    assert [(a.kind, len(a.question.prompt.images)) for a in every] == [
        (kind, 1) for kind in ("chart", "scene", "screen") for _ in range(6)
    ]
    drawn = sample(every, 4, seed=0)
    assert [a.kind for a in drawn] == ["chart"] * 4 + ["scene"] * 4 + ["screen"] * 4
    assert len({a.where for a in drawn}) == 12 and drawn == [a for a in every if a in drawn]
    assert drawn == sample(every, 4, seed=0) != sample(every, 4, seed=1)
    assert len(sample(every, 100, seed=0)) == 18
    assert all(a.right(a.question.reference) for a in every)
    assert any(a.question.reference.boxes for a in every if a.kind == "screen")


def answered(engine: str, mode: str, kind: str, right: bool, seconds: float, tokens: int) -> dict[str, Any]:
    return {"engine": engine, "mode": mode, "kind": kind, "right": right, "seconds": seconds, "tokens": tokens}


def test_kinds_count_alike() -> None:
    """However many questions each has."""
    results = [answered("phi4rv", "auto", "chart", True, 1.0, 10)] * 3
    results += [
        answered("phi4rv", "auto", "chart", False, 5.0, 30),
        answered("phi4rv", "auto", "screen", False, 4.0, 5),
    ]
    results += [answered("phi4rv", "think", "chart", True, 9.0, 99)]
    rows = protocol.summary(results)
    assert [(r["mode"], r["kind"], r["questions"]) for r in rows] == [
        ("auto", "chart", 4), ("auto", "screen", 1), ("auto", protocol.MEAN, 5),
        ("think", "chart", 1), ("think", protocol.MEAN, 1),
    ]  # fmt: skip
    assert [(r["accuracy"], r["seconds"], r["tokens"]) for r in rows[:3]] == [
        (0.75, 2.0, 15), (0.0, 4.0, 5), (0.375, 3.0, 10),
    ]  # fmt: skip
    lines = protocol.table({"rows": rows, "failed": {"vLLM": "no such model"}}).splitlines()
    assert lines[3].split() == ["phi4rv", "auto", *protocol.MEAN.split(), "5", "0.375", "3.000", "10.0"]
    assert lines[-1] == "vLLM: no such model"


def test_chart(tmp_path: Path) -> None:
    """Each mark lies where its figures say, in its engine's colour; the mean of all kinds comes first."""
    rows = protocol.summary(
        [
            answered("phi4rv", "auto", "chart", True, 2.0, 100),
            answered("phi4rv", "auto", "screen", False, 2.0, 100),
            answered("transformers", "auto", "chart", False, 8.0, 100),
            answered("transformers", "auto", "screen", False, 12.0, 100),
        ]
    )
    file = tmp_path / "new" / "figure2.png"
    draw(file, {"rows": rows, "max_new_tokens": 4096})
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    head = HEAD + 2 * LINE
    assert image.size == (2 * WIDTH, head + 3 * HEIGHT)

    def near(colour: str, x: float, y: float) -> bool:
        wanted = tuple(bytes.fromhex(colour[1:]))
        box = (int(x) - 12, int(y) - 12, int(x) + 12, int(y) + 12)
        return any(pixel == wanted for _, pixel in image.crop(box).getcolors(1 << 16) or [])

    wide = WIDTH - LEFT - RIGHT
    bottom = head + HEIGHT - 54
    at_two, at_ten = LEFT + 2 / 10 * wide, LEFT + wide  # the axis ends at 10 seconds
    middle = (head + TOP + bottom) / 2
    assert near(COLOURS[0], at_two, middle) and near(COLOURS[1], at_ten, bottom)
    assert not near(COLOURS[0], at_two, bottom) and not near(COLOURS[1], at_ten, middle)
    both = WIDTH + LEFT + wide  # 100 tokens each: the marks lie above one another
    assert near(COLOURS[0], both, middle) and near(COLOURS[1], both, bottom)


@pytest.mark.parametrize(("least", "tick"), [(0.21, 0.25), (2.0, 2.0), (20.4, 25), (51, 60), (1, 1), (0, 1)])
def test_round_ticks(least: float, tick: float) -> None:
    assert round_tick(least) == pytest.approx(tick)


def run(*options: object) -> int:
    return command.main(["--protocol", *map(str, options)])


def test_everything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This engine and transformers on a file of questions, in all three modes, give the same answers."""
    said, file, chart = (tmp_path / name for name in ("said.jsonl", "out.json", "figure2.png"))
    options = ("--checkpoint", PUBLISHED, "--dtype", "float32", "--max-new-tokens", 8, "--samples", 1)
    assert run(asked_file(tmp_path), *options, "--json", file, "--chart", chart, "--answers", said) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())["results"]["protocol"]
    assert found["failed"] == {} and protocol.table(found) in printed
    kinds = ["chart", "screen", "mathematics", protocol.MEAN]
    engines = ("phi4rv", "transformers")
    assert [(r["engine"], r["mode"], r["kind"]) for r in found["rows"]] == [
        (engine, mode, kind) for engine in engines for mode in ("auto", "think", "nothink") for kind in kinds
    ]
    assert all(r["seconds"] > 0 and 0 < r["tokens"] <= 8 for r in found["rows"])
    answers = [json.loads(line) for line in said.read_text().splitlines()]
    own, theirs = ([(a["mode"], a["where"], a["text"], a["thinking"], a["tokens"]) for a in answers if a["engine"] == e]
                   for e in engines)  # fmt: skip
    assert own == theirs and len(own) == 9 and len({text for _, _, text, _, _ in own}) > 1
    with Image.open(chart) as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5


def test_questions_are_made_up_where_none_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--checkpoint", PUBLISHED, "--max-new-tokens", 2, "--samples", 1, "--modes", "nothink", "--engines")
    assert run(*options, "phi4rv", "--dtype", "float32", "--weights", "int8") == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["phi4rv", "nothink", kind] for kind in ("chart", "scene", "screen", "mean")]


def without_kind(folder: Path) -> list[object]:
    lines = asked_file(folder).read_text().splitlines()
    return [write_jsonl(folder / "bad.jsonl", [lines[0], json.dumps(record("What?", "<nothink>That."))])]


def without_picture(folder: Path) -> list[object]:
    path = asked_file(folder)
    (folder / "a.png").write_bytes(b"not a picture")
    return [path]


def too_long(folder: Path) -> list[object]:
    asked = record("word " * 20000, "<nothink>No.")
    return [write_jsonl(folder / "long.jsonl", [{"kind": "text", **asked}])]


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        (without_kind, [], "bad.jsonl:2: 'kind' is None; name the kind of question: chart or screen, say"),
        (without_picture, [], "asked.jsonl:1: "),
        (too_long, [], "long.jsonl:1: the prompt has "),
        (lambda d: ["no.jsonl"], [], "no.jsonl: cannot be read: No such file or directory"),
        (lambda d: [], ["--samples", 0], "--samples: 0 must be 1 or more"),
        (lambda d: [], ["--chart", "x.gif"], "--chart: x.gif must end in .png"),
        (lambda d: [], ["--weights", "int5"], "--weights: 'int5' is unknown"),
        (lambda d: [], ["--modes", "slow"], "--modes: invalid choice: 'slow'"),
        (lambda d: [], ["--engines", "vLLM"], "--engines: vLLM is not installed"),
        (lambda d: [], ["--checkpoint", "/no/such"], "/no/such: not a folder"),
    ],
)
def test_bad_input_is_one_line(
    made: Any, options: list[object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(protocol, "installed", lambda: ["phi4rv"])
    monkeypatch.setattr(questions, "sample", lambda *a: pytest.fail("nothing is asked"))
    assert run(*made(tmp_path), "--checkpoint", PUBLISHED, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_code_of_the_checkpoint_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's peer trusts the folder's code: it must be named."""
    monkeypatch.setattr(protocol, "installed", lambda: list(protocol.ENGINES))
    parser = argparse.ArgumentParser()
    protocol.add_options(parser)
    assert parser.parse_args([]).engines == ["phi4rv", "transformers"]
    assert parser.parse_args(["--engines", "vLLM"]).engines == ["vLLM"]


def test_who_answers_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "error: --checkpoint: missing" in capsys.readouterr().err
