"""Runs that are killed, asked to end, or lose a process: nothing is lost, and the same run to the last bit comes out.

``PHI4RV_KILLS=20`` kills as often as that; by default three times, to be quick.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import finish, read_log, run, start, until_step_three
from tests.small import ROOT, mixed_data, small_checkpoint, timeless, weights
from tests.train.test_resume import saved
from train.checkpoints import checkpointer

KILLS = int(os.environ.get("PHI4RV_KILLS", "3"))
STEPS = 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A save after every step, so that a kill often meets one that is being written."""
    folder = tmp_path_factory.mktemp("inputs")
    line = ["--checkpoint", small_checkpoint(folder), "--data", mixed_data(folder, 9), "--device", "cpu", "--stage", 2]
    line += ["--max-steps", STEPS, "--global-batch", 4, "--sequence-length", 128, "--warmup", 1, "--lr", 1e-3]
    return [*map(str, line), "--save-every", "1", "--keep", "2", "--seed", "5", "--resume"]


@pytest.fixture(scope="module")
def whole(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, float]]:
    """Of one process and of two: the output left alone, and the seconds that it took."""
    made = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole-{world}")
        began = time.monotonic()
        assert run(world, folder / "log", [*inputs, *shard(world), "--output", folder / "out"]) == [0] * world
        made[world] = folder / "out", time.monotonic() - began
    return made


def shard(world: int) -> list[str]:
    return ["--shard", "full"] if world > 1 else []


def assert_same_run(output: Path, whole: Path) -> None:
    assert timeless(output / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    for ours, theirs in (
        (weights(output / "model"), weights(whole / "model")),
        (saved(output / f"step-{STEPS}"), saved(whole / f"step-{STEPS}")),
    ):
        assert ours.keys() == theirs.keys()
        assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_moments(
    inputs: list[str], whole: dict[int, tuple[Path, float]], tmp_path: Path, world: int
) -> None:
    """SIGKILL to all processes or to one of them, which ends the other."""
    output, seconds = whole[world]
    moments, log, ours = random.Random(7 + world), tmp_path / "log", tmp_path / "out"
    argv, in_saves, told_of = [*inputs, *shard(world), "--output", str(ours)], 0, 0
    for number in range(KILLS):
        processes = start(world, log, argv)
        # Later than any save that is there, or nothing would ever get done.
        until, newest = time.monotonic() + 60, checkpointer.latest_step(ours)
        while number % 2 and checkpointer.latest_step(ours) == newest and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, seconds / KILLS if number % 2 else seconds / 2))
        victims = processes if number % 3 else processes[-1:]
        for process in victims:
            process.kill()
        in_saves += any(ours.glob(".step-*.partial-*"))
        codes = finish(processes)
        assert all(code in (-signal.SIGKILL, 0, 3) for code in codes), read_log(log)
        told_of += codes[0] == 3
    print(f"{KILLS} kills of {world} process(es), {in_saves} in a save, {told_of} told of by the other process")
    assert run(world, log, argv) == [0] * world, read_log(log)
    assert_same_run(ours, output)
    assert not list(ours.glob(".step-*"))
    assert len(checkpointer.saved_steps(ours)) == 2


def test_sigterm_saves_and_leaves(inputs: list[str], whole: dict[int, tuple[Path, float]], tmp_path: Path) -> None:
    """Between two saves, and sent to one of two processes."""
    argv = [*inputs, *shard(2), "--output", str(tmp_path / "out"), "--save-every", "100"]
    assert finish(start(2, tmp_path / "log", argv, until_step_three)) == [143, 143], read_log(tmp_path / "log")
    assert [p.name for p in checkpointer.saved_steps(tmp_path / "out")] == ["step-3"]
    assert read_log(tmp_path / "log", 1).splitlines()[-1] == "saved; continue with --resume"
    assert run(2, tmp_path / "log", [*argv, "--save-every", "1"]) == [0, 0]
    assert_same_run(tmp_path / "out", whole[2][0])


def test_a_process_that_dies_is_named(inputs: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = start(2, log, [*inputs, *shard(2), "--output", str(tmp_path / "out")])
    while checkpointer.latest_step(tmp_path / "out") is None:
        time.sleep(0.02)
    processes[1].kill()
    assert finish(processes, 60) == [3, -signal.SIGKILL]
    assert f"error: rank 1 (process {processes[1].pid} on " in read_log(log)
    assert "has died; all processes stop; continue with --resume" in read_log(log)


def test_a_process_that_fails_is_named(inputs: list[str], tmp_path: Path) -> None:
    """An error that one rank alone meets; the other would wait for it."""
    log = tmp_path / "log"
    assert finish(start(2, log, [*inputs, *shard(2), "--output", str(tmp_path / "out")], fail_on_rank_one), 60) == [
        3,
        2,
    ]
    assert "error: the disk of this one is gone" in read_log(log, 1)
    assert "has stopped: the disk of this one is gone; all processes stop" in read_log(log)


def fail_on_rank_one(argv: list[str]) -> int:
    from phi4rv.errors import UserError
    from train import main as program

    step = program.SkippedSteps.add

    def failing(self: Any, metrics: dict[str, Any]) -> None:
        step(self, metrics)
        if os.environ["RANK"] == "1" and metrics["step"] == 2:
            raise UserError("the disk of this one is gone")

    program.SkippedSteps.add = failing  # type: ignore[method-assign]
    return program.main(argv)


def test_torchrun_carries_on(inputs: list[str], whole: dict[int, tuple[Path, float]], tmp_path: Path) -> None:
    """A process is killed, torchrun starts all anew."""
    output = tmp_path / "out"
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*line, "train/main.py", *inputs, *shard(2), "--output", str(output)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as agent:
        while checkpointer.latest_step(output) is None and agent.poll() is None:
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        errors = agent.communicate(timeout=120)[1]
    assert agent.returncode == 0, errors
    assert_same_run(output, whole[2][0])


def test_restarts_need_a_place_to_go_on_from(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.main import main

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert main(inputs) == 2
    assert "--resume: needed with torchrun --max-restarts, and --output too" in capsys.readouterr().err
