"""Stopping and going on: the same run to the last bit, from saves that are whole or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.small import ROOT, mixed_data, mixed_records, small_checkpoint, timeless, weights, write_jsonl
from train import main as program
from train.checkpoints import checkpointer
from train.export import export
from train.export import main as export_command
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
    write = program.MetricsLogger.log_step

    def dying(self: program.MetricsLogger, metrics: dict) -> None:
        write(self, metrics)
        if metrics["step"] == step:
            raise RuntimeError("power cut")

    monkeypatch.setattr(program.MetricsLogger, "log_step", dying)


def assert_same_run(output: Path, whole: Path) -> None:
    assert timeless(output / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    ours, theirs = weights(output / "model"), weights(whole / "model")
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    ours, theirs = saved(output / "step-6"), saved(whole / "step-6")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {name.split("/")[0] for name in theirs} == {"model", "exp_avg", "exp_avg_sq", "random"}


def saved(step: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a save, read by PyTorch's own converter."""
    dcp_to_torch_save(step, step.parent / "saved.pt")
    return torch.load(step.parent / "saved.pt")


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
    newest = checkpointer.latest_step(output)
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
    assert checkpointer.latest_step(output) is not None
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    stale = output / f".step-6.partial-{process.pid}"
    (stale / "model").mkdir(parents=True)
    running = output / f".step-9.partial-{os.getppid()}"
    running.mkdir()
    assert main([*inputs, "--output", str(output), "--resume"]) == 0
    assert_same_run(output, whole)
    assert not stale.exists(), "its process is dead"
    assert running.exists(), "its process is alive"


def test_resuming_what_is_finished_changes_nothing(inputs: list[str], whole: Path, tmp_path: Path) -> None:
    before = timeless(whole / "metrics.jsonl")
    assert main([*inputs, "--output", str(whole), "--resume"]) == 0
    assert timeless(whole / "metrics.jsonl") == before


WHERE = (
    "dcp.save",
    "write_config_and_processor",
    "replace_folder",
    "_write_metadata",
)  # of checkpointer.py, in the order of a save


def fail_in_second_save(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    holder = checkpointer.dcp if where == "dcp.save" else checkpointer
    name, calls = where.removeprefix("dcp."), 0
    original = getattr(holder, name)

    def failing(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if where != "replace_folder" or calls != 2:
            original(*arguments, **options)
        if calls == 2:
            raise error

    monkeypatch.setattr(holder, name, failing)


@pytest.mark.parametrize("where", WHERE)
def test_a_full_disk_is_one_line_and_keeps_the_earlier_save(
    inputs: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """In the second save: the first stays as it was, and the run goes on from it."""
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_in_second_save(patch, where, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert main([*inputs, "--output", str(output)]) == 2
    line = last_line(capsys)
    assert f"{output / 'step-4'}: cannot be written (No space left on device); nothing of it was left behind" in line
    assert f"then --resume, which continues from {output / 'step-2'}" in line
    assert [p.name for p in output.glob("*step-*")] == ["step-2"]
    assert not list(output.glob(".step*"))
    assert main([*inputs, "--output", str(output), "--resume"]) == 0
    assert_same_run(output, whole)


def test_full_metrics(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save that is being written when the run ends is finished."""
    step = program.MetricsLogger.log_step

    def full(self: program.MetricsLogger, metrics: dict) -> None:
        if metrics["step"] == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        step(self, metrics)

    monkeypatch.setattr(program.MetricsLogger, "log_step", full)
    output = tmp_path / "out"
    assert main([*inputs, "--output", str(output)]) == 2
    assert "No space left on device" in last_line(capsys)
    assert [p.name for p in output.glob("*step-*")] == ["step-2"]
    assert saved(output / "step-2")


def test_training_goes_on_while_a_save_is_written(
    inputs: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that writes step-2 waits for step 3: what it then writes is step 2 all the same."""
    save, step = checkpointer.dcp.save, program.MetricsLogger.log_step
    third = threading.Event()

    def late(*arguments: object, **options: object) -> None:
        assert third.wait(60)
        save(*arguments, **options)

    def telling(self: program.MetricsLogger, metrics: dict) -> None:
        step(self, metrics)
        if metrics["step"] == 3:
            third.set()

    monkeypatch.setattr(checkpointer.dcp, "save", late)
    monkeypatch.setattr(program.MetricsLogger, "log_step", telling)
    output = tmp_path / "out"
    assert main([*inputs, "--output", str(output)]) == 0
    ours, theirs = saved(output / "step-2"), saved(whole / "step-2")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(ours[name], saved(whole / "step-4")[name]) for name in theirs)


def test_the_newest_saves_are_kept(inputs: list[str], tmp_path: Path) -> None:
    assert main([*inputs, "--output", str(tmp_path / "out"), "--keep", "2"]) == 0
    assert [p.name for p in checkpointer.saved_steps(tmp_path / "out")] == ["step-4", "step-6"]
    assert not list((tmp_path / "out").glob(".step*"))


def test_an_exported_save_is_the_model(inputs: list[str], whole: Path, tmp_path: Path) -> None:
    """Byte for byte what the run wrote at its end, from the same step; a run's folder stands for its newest save."""
    export(whole / "step-6", tmp_path / "model")
    ours, theirs = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (tmp_path / "model", whole / "model"))
    assert ours == theirs
    assert export_command(["--checkpoint", str(tmp_path / "gone"), "--output", str(tmp_path / "half")]) == 2
    assert export_command(["--checkpoint", str(whole), "--output", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half, full = weights(tmp_path / "half"), weights(whole / "model")
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


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
        ("__0_0.distcp", "truncate", "cannot be read"),
        ("__0_0.distcp", "remove", "cannot be read (No such file or directory)"),
        ("__0_0.distcp", "empty", "cannot be read"),
        (".metadata", "truncate", "cannot be read"),
        ("state.json", "truncate", "broken JSON"),
        ("config.json", "remove", "missing"),
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
    assert str(path.parent if path.suffix == ".distcp" else path) in line
    assert words in line


def test_a_save_that_lost_a_file_is_left_out(
    inputs: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And made anew, from the one before it."""
    output = tmp_path / "out"
    assert subprocess.run(["cp", "-r", whole, output]).returncode == 0
    (output / "step-6" / ".metadata").unlink()
    assert main([*inputs, "--output", str(output), "--resume"]) == 0
    assert f"{output / 'step-6'}: incomplete save, ignored" in capsys.readouterr().out
    assert_same_run(output, whole)


def test_only_whole_saves_count(tmp_path: Path) -> None:
    for name in ("step-2", "step-10", "step-11", "step-12", ".step-12.partial-1", "step-x", "step-", ".step-11.old-4"):
        (tmp_path / name).mkdir()
        for file in ("state.json", ".metadata"):
            (tmp_path / name / file).touch()
    (tmp_path / "step-11" / ".metadata").unlink()
    (tmp_path / "step-12" / "state.json").unlink()
    (tmp_path / "step-99").write_text("a file")
    assert checkpointer.latest_step(tmp_path) == tmp_path / "step-10"
    assert [p.name for p in checkpointer.incomplete_steps(tmp_path)] == ["step-11", "step-12", "step-99"]
    assert checkpointer.latest_step(tmp_path / "none") is None


def test_bfloat16_resumes_from_its_masters(inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save holds the masters, and what was below the rounding of the weights with them."""
    line = [*inputs, "--dtype", "bfloat16", "--lr", "1e-4"]
    assert main([*line, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, 3)
        main([*line, "--output", str(tmp_path / "out")])
    assert main([*line, "--output", str(tmp_path / "out"), "--resume"]) == 0
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    state = json.loads((tmp_path / "out/step-6/state.json").read_text())
    assert state["dtype"] == "torch.bfloat16"
    kinds = {n: t.dtype for n, t in saved(tmp_path / "out/step-6").items()}
    assert kinds["model/decoder.norm.weight"] == kinds["exp_avg/decoder.norm.weight"] == torch.float32
    assert kinds["model/vision.head.probe"] == torch.bfloat16, "not trained: it has no master"
    assert weights(tmp_path / "out/model")["decoder.norm.weight"].dtype == torch.bfloat16
