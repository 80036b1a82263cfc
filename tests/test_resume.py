"""Stopping and going on: the same run to the last bit, from saves that are whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import ROOT, mixed_data, mixed_records, small_checkpoint, timeless, weights, write_jsonl

import phi4rv
from train import main as program
from train import saving
from train.main import main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line without --output; repeats 12 records over 6 steps."""
    folder = tmp_path_factory.mktemp("inputs")
    line = [
        "--checkpoint",
        small_checkpoint(folder),
        "--data",
        mixed_data(folder),
        "--device",
        "cpu",
        "--stage",
        2,
    ]
    line += ["--max-steps", 6, "--global-batch", 5, "--sequence-length", 256, "--lr", 1e-3, "--warmup", 1]
    return [*map(str, line), "--save-every", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the run in one go."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main([*inputs, "--output", str(output)]) == 0
    return output


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run dies after ``step`` steps, its metrics already written."""
    write = program.Progress.step

    def dying(self: program.Progress, metrics: dict) -> None:
        write(self, metrics)
        if metrics["step"] == step:
            raise RuntimeError("power cut")

    monkeypatch.setattr(program.Progress, "step", dying)


def assert_same_run(output: Path, whole: Path) -> None:
    assert timeless(output / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    ours, theirs = weights(output / "model"), weights(whole / "model")
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    ours, theirs = (load_file(o / "step-6" / "optimizer.safetensors") for o in (output, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "\n".join(lines)
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize(("stopped", "saved"), [(5, 4), (3, 2), (1, None)])
def test_a_resumed_run_is_the_run_in_one_go(
    inputs: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: int,
    saved: int | None,
) -> None:
    """Also from no save at all, which begins anew."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, stopped)
        main([*inputs, "--output", str(output)])
    newest = saving.newest_step(output)
    assert (newest and newest.name) == (saved and f"step-{saved}")
    assert len(timeless(output / "metrics.jsonl")) == stopped
    assert main([*inputs, "--output", str(output), "--resume"]) == 0
    assert_same_run(output, whole)


def test_a_mixture_goes_on_with_its_loader_processes(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the position that the save holds; the number of processes is nobody's business."""
    files = [write_jsonl(tmp_path / f"{name}.jsonl", mixed_records(tmp_path, n)) for name, n in (("a", 3), ("b", 14))]
    line = [*inputs, "--data", f"{files[0]}=0.2", f"{files[1]}=0.8"]
    assert main([*line, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, 3)
        main([*line, "--output", str(tmp_path / "out"), "--workers", "1"])
    saved = json.loads((tmp_path / "out/step-2/state.json").read_text())
    assert saved["position"]["step"] == 2 and saved["position"]["drawn"] != [0, 0]
    assert main([*line, "--output", str(tmp_path / "out"), "--resume"]) == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_killed_process(inputs: list[str], whole: Path, tmp_path: Path) -> None:
    """kill -9 as soon as a save appears, metrics.jsonl cut in a line, half-written folders left behind."""
    output = tmp_path / "out"
    # Sums split over another number of threads round otherwise, and the run would not be the same to the bit.
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    command = [sys.executable, "train/main.py", *inputs, "--output", str(output)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        while not (output / "step-2").exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert saving.newest_step(output) is not None
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    stale = output / f".step-6.partial-{process.pid}"
    (stale / "model").mkdir(parents=True)
    running = output / f".step-9.partial-{os.getpid()}"
    running.mkdir()
    assert main([*inputs, "--output", str(output), "--resume"]) == 0
    assert_same_run(output, whole)
    assert not stale.exists(), "its process is dead"
    assert running.exists(), "its process is alive"


def test_resuming_what_is_finished_changes_nothing(inputs: list[str], whole: Path, tmp_path: Path) -> None:
    before = timeless(whole / "metrics.jsonl")
    assert main([*inputs, "--output", str(whole), "--resume"]) == 0
    assert timeless(whole / "metrics.jsonl") == before


@pytest.mark.parametrize("where", ["save_file", "write"])
def test_a_save_that_dies_leaves_nothing(
    inputs: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In the middle of the second save: the first stays as it was, and the run goes on from it."""
    output = tmp_path / "out"
    original, calls = getattr(saving, where), 0

    def dying(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        original(*arguments)
        if calls == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saving, where, dying)
        assert main([*inputs, "--output", str(output)]) == 130
    assert [p.name for p in output.glob("*step-*")] == ["step-2"]
    assert not list(output.glob(".*"))
    assert main([*inputs, "--output", str(output), "--resume"]) == 0
    assert_same_run(output, whole)


@pytest.mark.parametrize("where", ["save_file", "write", "metrics"])
def test_a_full_disk_is_one_line_and_keeps_the_earlier_save(
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    output = tmp_path / "out"
    holder, name = (program.Progress, "step") if where == "metrics" else (saving, where)
    original, calls = getattr(holder, name), 0

    def full(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == (4 if where == "metrics" else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    monkeypatch.setattr(holder, name, full)
    assert main([*inputs, "--output", str(output)]) == 2
    line = last_line(capsys)
    assert "No space left on device" in line
    assert where == "metrics" or f"{output / 'step-4'}: cannot be written" in line
    assert [p.name for p in output.glob("*step-*")] == ["step-2"]
    phi4rv.load(output / "step-2" / "model", device="cpu")
    assert load_file(output / "step-2" / "optimizer.safetensors")


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--lr", "2e-3", "lr=0.001, this run has lr=0.002"),
        ("--seed", "4", "seed=3, this run has seed=4"),
        ("--max-steps", "7", "max_steps=6"),
        ("--stage", "3", "stage=2"),
        ("--global-batch", "6", "global_batch=5"),
        ("--dtype", "bfloat16", "dtype=torch.float32, this run has dtype=torch.bfloat16"),
    ],
)
def test_an_option_that_changed_is_named(
    inputs: list[str], whole: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, named: str
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert main([*inputs, "--output", str(whole), "--resume", option, value]) == 2
    line = last_line(capsys)
    assert named in line
    assert "step-6" in line
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_other_data_is_named(
    inputs: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", mixed_records(tmp_path, 3))
    assert main([*inputs, "--output", str(whole), "--resume", "--data", str(other)]) == 2
    assert f"this run has data=['{other}']" in last_line(capsys)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("optimizer.safetensors", "truncate", "cannot be read"),
        ("optimizer.safetensors", "remove", "missing; the save is not whole"),
        ("optimizer.safetensors", "empty", "cannot be read"),
        ("state.json", "truncate", "broken JSON"),
        ("state.json", "remove", "missing"),
        ("model/model-00001-of-00001.safetensors", "truncate", "truncated or damaged"),
    ],
)
def test_a_damaged_save_is_named(
    inputs: list[str],
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: str,
    words: str,
) -> None:
    output = tmp_path / "out"
    assert subprocess.run(["cp", "-r", whole, output]).returncode == 0
    path = output / "step-6" / file
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else path.stat().st_size // 2])
    assert main([*inputs, "--output", str(output), "--resume"]) == 2
    line = last_line(capsys)
    assert str(path) in line
    assert words in line


def test_only_whole_saves_count(tmp_path: Path) -> None:
    for name in ("step-2", "step-10", ".step-12.partial-1", "step-x", "step-", ".step-11.old-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-99").write_text("a file")
    assert saving.newest_step(tmp_path) == tmp_path / "step-10"
    assert saving.newest_step(tmp_path / "none") is None


def test_bfloat16_resumes_from_its_masters(inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model folder holds rounded weights; what was below their rounding is in the optimizer's file."""
    line = [*inputs, "--dtype", "bfloat16", "--lr", "1e-4"]
    assert main([*line, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, 3)
        main([*line, "--output", str(tmp_path / "out")])
    assert main([*line, "--output", str(tmp_path / "out"), "--resume"]) == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    state = json.loads((tmp_path / "out/step-6/state.json").read_text())
    assert state["dtype"] == "torch.bfloat16"
    assert any(name.startswith("master/") for name in load_file(tmp_path / "out/step-6/optimizer.safetensors"))
