"""Runs drawn beside one another: every curve shows in its colour, and the table's numbers are the files'."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.small import write_jsonl
from train.figures.curves import COLOURS, LEGEND, PANELS, WIDTH, Run, default_window, draw_curves, running_mean
from train.plot import main


def entries(count: int, level: float, **others: Any) -> list[dict[str, Any]]:
    made = []
    for step in range(1, count + 1):
        loss = {
            "loss": level,
            "loss_reasoning": level + 1,
            "loss_direct": level - 1,
            "grad_norm": level,
            "lr": 1e-4 * step * level,
        }
        rates = {"tokens_per_second": 1000.0 * level, "mfu": 0.1 * level, "data_wait": level / 4, "seconds": 2.0}
        made.append({"step": step, **loss, **rates, "skipped_steps": 0, **others})
    return made


def run_folder(folder: Path, steps: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    write_jsonl(folder / "metrics.jsonl", [*steps, {"heldout": {}}])
    return folder


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {pixel for _, pixel in image.getcolors(2**24)}


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = run_folder(tmp_path / "one", entries(40, 2.0)), run_folder(tmp_path / "two", entries(60, 3.0))
    output = tmp_path / "both.png"
    assert main([str(one), str(two / "metrics.jsonl"), "--output", str(output)]) == 0
    picture = Image.open(output).convert("RGB")
    head = LEGEND * 3
    legend = picture.crop((0, 0, picture.width, head))
    assert {rgb(c) for c in COLOURS[:2]} <= colours(legend) and rgb(COLOURS[2]) not in colours(picture)
    for number in range(len(PANELS)):
        x, y = number % 2 * WIDTH, head + number // 2 * 300
        assert {rgb(c) for c in COLOURS[:2]} <= colours(picture.crop((x, y, x + WIDTH, y + 300))), number
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert first.split() == [str(one), "40", "2.0000", "3.0000", "1.0000", "2,000", "20.0%", "25.0%", "0", "0.02"]
    assert second.split()[1:6] == ["60", "3.0000", "4.0000", "2.0000", "3,000"]


def test_what_was_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU's run without a peak; a run from before modes were told apart; steps that were skipped."""
    old = [{"step": n, "loss": 2.0, "seconds": 1.0, "tokens_per_second": 5.0} for n in (1, 2)]
    broken = [
        *entries(3, 2.0, mfu=None),
        {"step": 4, "loss": None, "grad_norm": None, "seconds": 1, "skipped_steps": 1},
    ]
    runs = [run_folder(tmp_path / "old", old), run_folder(tmp_path / "broken", broken)]
    assert main([*map(str, runs), "--output", str(tmp_path / "p.png")]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert first.split()[1:] == ["2", "2.0000", "-", "-", "5", "-", "-", "-", "0.00"]
    assert second.split()[1:] == ["4", "2.0000", "3.0000", "1.0000", "2,000", "-", "21.4%", "1", "0.00"]
    nothing = [{"step": 1, "loss": None}]
    draw_curves(tmp_path / "none.png", [Run("none", nothing)], ["loss"])
    assert Image.open(tmp_path / "none.png").width == WIDTH


def test_smoothing() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert (default_window(10), default_window(200)) == (1, 10)
    steps = [{"step": n, "loss": math.nan if n == 2 else 1.0} for n in (1, 2, 3)]
    assert Run("r", steps).series("loss") == [(1, 1.0), (3, 1.0)]


WRONG: dict[str, Callable[[Path], tuple[list[object], str]]] = {
    "nothing": lambda d: ([d / "gone"], "gone: no metrics.jsonl there"),
    "no metrics in it": lambda d: ([d], ": no metrics.jsonl there"),
    "no step": lambda d: ([write_jsonl(d / "m.jsonl", [{"heldout": {}}])], "m.jsonl: no step in it"),
    "empty": lambda d: ([write_jsonl(d / "m.jsonl", [])], "m.jsonl: no step in it"),
    "a picture": lambda d: ([d / "p.png"], "p.png: not UTF-8 text"),
    "other JSON": lambda d: ([write_jsonl(d / "m.jsonl", ["[1]", "{}"])], "m.jsonl:1: no JSON object"),
    "smooth": lambda d: ([d, "--smooth", 0], "--smooth: 0 must be 1 to 10^9"),
    "output": lambda d: ([d, "--output", "a.txt"], "--output: a.txt must end in .png"),
    "no runs": lambda d: ([], "RUN"),
    "no folder": lambda d: (
        [write_jsonl(d / "m.jsonl", entries(1, 2.0)), "--output", d / "gone" / "p.png"],
        "gone/p.png: No such file or directory",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "p.png")
    line, words = WRONG[kind](tmp_path)
    assert main([*map(str, line)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and words in error
