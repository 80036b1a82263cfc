"""``train/main.py``: what a run leaves behind, and one line for everything that is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import phi4rv
from phi4rv.processing.processor import Prompt
from tests.small import (
    ROOT,
    mixed_data,
    mixed_records,
    picture,
    record,
    small_checkpoint,
    timeless,
    weights,
    write_jsonl,
)
from train import recipe
from train.figures.metrics import read_metrics
from train.main import main

GOOD = record("Hello?", "<nothink>Yes.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model"))


def train(*arguments: object) -> int:
    return main(["--device", "cpu", *map(str, arguments)])


def small_run(checkpoint: Path, data: Path, output: Path, *more: object) -> int:
    line = ["--checkpoint", checkpoint, "--data", data, "--output", output, "--sequence-length", 256]
    return train(*line, "--global-batch", 4, "--max-steps", 3, "--lr", 1e-3, "--warmup", 1, *more)


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, and the only one of its kind; a progress bar may stand before it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.endswith("\n")
    assert errors == err.splitlines()[-1:]
    return errors[0]


def assert_opens(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) > 100


def test_a_short_run_leaves_everything(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = mixed_data(tmp_path), tmp_path / "deep" / "out"
    heldout = write_jsonl(tmp_path / "heldout.jsonl", mixed_records(tmp_path, 5))
    assert small_run(checkpoint, data, output, "--save-every", 2, "--heldout", heldout) == 0
    names = {"metrics.jsonl", "model", "step-2", "loss.png", "predictions.png"}
    assert {path.name for path in output.iterdir()} == names
    assert_opens(output / "loss.png")
    assert_opens(output / "predictions.png")

    *steps, scores = read_metrics(output / "metrics.jsonl")
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    for entry in steps:
        assert entry["steps"] == 3
        assert entry["tokens"] <= entry["sequences"] * 256
        assert entry["filling"] == pytest.approx(entry["tokens"] / (entry["sequences"] * 256))
        assert 0 < entry["labelled"] < entry["tokens"]
        assert entry["samples"] >= 4
        assert entry["seconds"] > 0
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["seconds"])
        assert entry["images_per_second"] == pytest.approx(entry["images"] / entry["seconds"])
        assert entry["grad_norm"] > 0
        assert entry["skipped"] == {}
    assert [entry["lr"] for entry in steps] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert scores.keys() == {"heldout", "shuffled"}
    assert scores["heldout"]["texts"] == 5
    assert 0 <= scores["heldout"]["exact_match"] <= 1

    model, processor = phi4rv.load(output / "model", device="cpu")
    assert torch.isfinite(model(processor([Prompt("Hello?")]))).all()
    out = capsys.readouterr().out
    assert "stage 2: " in out
    assert "exact_match" in out
    assert "data: nothing skipped" in out


def test_the_embedded_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data, no checkpoint, no output folder given; a second run does not touch the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "EMBEDDED_RECORDS", {1: (40, 4), 2: (40, 4), 3: (40, 4)})
    assert train("--max-steps", 2, "--global-batch", 4) == 0
    first = tmp_path / "out" / "stage-2"
    assert {p.name for p in first.iterdir()} == {
        "data",
        "metrics.jsonl",
        "model",
        "loss.png",
        "predictions.png",
    }
    assert len((first / "data" / "stage2-train.jsonl").read_text().splitlines()) == 40
    entries = read_metrics(first / "metrics.jsonl")
    assert len(entries) == 3
    assert entries[-1]["heldout"]["boxes"] + entries[-1]["heldout"]["texts"] == 4
    assert train("--max-steps", 2, "--global-batch", 4) == 0
    second = tmp_path / "out" / "stage-2-2"
    assert timeless(second / "metrics.jsonl") == timeless(first / "metrics.jsonl")
    ours, theirs = weights(first / "model"), weights(second / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "the same seed, the same bits"
    assert train("--max-steps", 1, "--global-batch", 4, "--seed", 1, "--output", "third") == 0
    assert read_metrics(Path("third/metrics.jsonl"))[0]["loss"] != entries[0]["loss"]


def test_epochs_without_max_steps(checkpoint: Path, tmp_path: Path) -> None:
    data = mixed_data(tmp_path)
    assert small_run(checkpoint, data, tmp_path / "out", "--max-steps", 0, "--epochs", 2) == 0
    entries = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert sum(entry["samples"] for entry in entries) == 24
    assert {entry["steps"] for entry in entries} == {len(entries)}


def test_skip_bad_is_counted_and_told(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = picture(tmp_path, "cut.png", 300, 200)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    bad = ["{", record("<image>", "A.", "gone.png"), record("<image> What?", "A.", name)]
    data = write_jsonl(tmp_path / "d.jsonl", [*mixed_records(tmp_path, 8), *bad])
    assert small_run(checkpoint, data, tmp_path / "out", "--skip-bad", "--max-steps", 6) == 0
    captured = capsys.readouterr()
    assert "data: 3 bad" in captured.out
    skipped = [line for line in captured.err.splitlines() if line.startswith("skipped: ")]
    assert sorted(line.split(": ")[1] for line in skipped) == [f"{data}:{n}" for n in (10, 11, 9)]
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["skipped"] == {"bad": 3}


BAD_LINES: dict[str, tuple[Any, str]] = {
    "broken line": ('{"conversations": [[', "broken JSON"),
    "unknown role": ({"conversations": [[{"from": "robot", "value": "Hi"}]]}, "is from 'robot'"),
    "empty conversation": ({"conversations": [[]]}, "an empty list"),
    "no conversations": ({"conversations": []}, "an empty list"),
    "more marks": (record("<image> <image>", "A.", "a.png"), "marks: 2, images: 1"),
    "fewer marks": (record("What? <image>", "A.", "a.png", "a.png"), "marks: 1, images: 2"),
    "NaN coordinates": (
        record("<image> Where?", "<nothink>[nan, 0.1, 0.2, 0.3]", "a.png"),
        "[nan, 0.1, 0.2, 0.3]",
    ),
    "NaN itself": ('{"image": NaN, "conversations": []}', "NaN is not JSON"),
    "missing image": (record("<image>", "A.", "gone.png"), "no image file at"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    line, words = BAD_LINES[kind]
    picture(tmp_path, "a.png", 40, 40)
    data = write_jsonl(tmp_path / "d.jsonl", [GOOD, line, GOOD])
    assert small_run(checkpoint, data, tmp_path / "out") == 2
    error = the_error(capsys)
    assert error.startswith(f"error: {data}:2: ")
    assert words in error


def test_a_picture_that_cannot_be_decoded_is_named_by_its_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = picture(tmp_path, "cut.png", 300, 200)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:300])
    data = write_jsonl(tmp_path / "d.jsonl", [GOOD, record("<image> What?", "A.", name)])
    assert small_run(checkpoint, data, tmp_path / "out") == 2
    assert the_error(capsys).startswith(f"error: {data}:2: {tmp_path / name}: ")


WRONG: dict[str, Callable[[Path], tuple[list[object], str]]] = {
    "stage": lambda d: (["--stage", "4"], "--stage: '4' is unknown, must be one of 1, 2, 3"),
    "stage as a word": lambda d: (["--stage", "two"], "--stage: 'two' is unknown, must be one of 1, 2, 3"),
    "negative steps": lambda d: (["--max-steps=-1"], "--max-steps: -1 must be 0 to 10^9"),
    "negative saves": lambda d: (["--save-every=-1"], "--save-every: -1 must be 0 to 10^9"),
    "negative seed": lambda d: (["--seed=-1"], "--seed: -1 must be at least 0 and below 2^32"),
    "a seed no generator takes": lambda d: (["--seed", 2**70], "--seed: "),
    "empty batch": lambda d: (["--global-batch", "0"], "--global-batch: 0 must be 1 to 10^9"),
    "negative rate": lambda d: (["--lr=-1e-3"], "--lr: -0.001 must be above 0"),
    "rate nan": lambda d: (["--lr", "nan"], "--lr: nan must be"),
    "rate inf": lambda d: (["--lr", "inf"], "--lr: inf must be"),
    "sequence": lambda d: (["--sequence-length", "5"], "--sequence-length: none of the 12 records"),
    "device": lambda d: (["--device", "abacus"], "--device: abacus cannot be used"),
    "option": lambda d: (["--colour"], "unrecognized arguments: --colour"),
    "no such data": lambda d: (["--data", d / "gone.jsonl"], "gone.jsonl: cannot be read"),
    "data is a folder without any": lambda d: (["--data", ROOT / "csrc"], "--data: " + str(ROOT / "csrc") + " cannot"),
    "no file of the pattern": lambda d: (["--data", d / "x*.jsonl"], "--data: no file matches"),
    "one weight": lambda d: (["--data", f"{d}/data.jsonl=1", d], "has no weight and others have"),
    "weight 0": lambda d: (["--data", f"{d}/data.jsonl=0"], "the weight of"),
    "weight word": lambda d: (["--data", f"{d}/data.jsonl=half"], "'half' is not a weight; write FILE=0.2"),
    "endless mixture": lambda d: (["--data", f"{d}/data.jsonl=1", f"{d}=2", "--max-steps", "0"], "--max-steps: give"),
    "workers": lambda d: (["--workers", "-1"], "--workers: -1 must be 0 to 1024"),
    "timeout": lambda d: (["--image-timeout", "nan"], "--image-timeout: nan must be above 0"),
    "multiple": lambda d: (["--sequence-multiple", "-2"], "--sequence-multiple: -2 must be 0 to 10^9"),
    "no data in it": lambda d: (["--data", write_jsonl(d / "e.jsonl", [])], "e.jsonl: no records"),
    "no such held-out data": lambda d: (["--heldout", d / "gone.jsonl"], "gone.jsonl: cannot be read"),
    "no checkpoint": lambda d: (["--checkpoint", d / "gone"], "gone: not a folder"),
    "a file in the way": lambda d: (["--output", write_jsonl(d / "file", [])], "file cannot be written"),
    "a file on the way": lambda d: (
        ["--output", write_jsonl(d / "file", []) / "out"],
        "out cannot be written",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    arguments, words = WRONG[kind](tmp_path)
    assert small_run(checkpoint, mixed_data(tmp_path), tmp_path / "out", *arguments) == 2
    assert words in the_error(capsys)


def test_a_folder_that_holds_a_run_is_left_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = mixed_data(tmp_path), tmp_path / "out"
    assert small_run(checkpoint, data, output) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert small_run(checkpoint, data, output) == 2
    error = the_error(capsys)
    assert f"--output: {output} already holds a run" in error
    assert "--resume" in error
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.main.train", interrupt)
    assert small_run(checkpoint, mixed_data(tmp_path), tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; continue with --resume from the last save"


def test_the_program_itself(checkpoint: Path, tmp_path: Path) -> None:
    """``python train/main.py`` from the project's folder: status 2, one line, nothing on stdout."""
    data = write_jsonl(tmp_path / "d.jsonl", [json.dumps(GOOD), "not JSON"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "train/main.py",
        "--checkpoint",
        checkpoint,
        "--data",
        data,
        "--output",
        tmp_path / "out",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {data}:2: ")
    assert len(done.stderr.splitlines()) == 1
