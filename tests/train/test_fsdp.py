"""Sharded over two processes on gloo: the numbers of one process to rounding, saves that any number reads."""

from pathlib import Path
from typing import Any

import pytest
import torch

from phi4rv.model.activation_checkpointing import CHECKPOINTING
from tests.processes import finish, read_log, run, start, until_step_three
from tests.small import mixed_records, record, small_checkpoint, timeless, weights, write_jsonl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Five steps; most records have no image, so that a rank often has none; rows that two cannot share evenly."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = mixed_records(folder, 3) + [record(f"Say {i}. " * (i % 4 + 1), f"<nothink>{i}.") for i in range(14)]
    data = write_jsonl(folder / "data.jsonl", lines)
    line = ["--checkpoint", small_checkpoint(folder), "--data", data, "--device", "cpu", "--stage", 2]
    line += ["--max-steps", 5, "--global-batch", 4, "--sequence-length", 128, "--warmup", 1, "--lr", 1e-3, "--seed", 3]
    return [*line, "--save-every", 2]


@pytest.fixture(scope="module")
def single(inputs: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("single")
    assert run(1, output / "log", [*inputs, "--output", output / "out"]) == [0], read_log(output / "log")
    return output / "out"


def assert_close(output: Path, single: Path, steps: int = 5) -> None:
    ours, theirs = timeless(output / "metrics.jsonl"), timeless(single / "metrics.jsonl")
    assert [e["step"] for e in ours] == [e["step"] for e in theirs] == list(range(1, steps + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)  # float32 sums of squares
        assert a["lr"] == b["lr"] and a["tokens"] == b["tokens"]
    ours, theirs = weights(output / "model"), weights(single / "model")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients", "full"])
def test_two_processes_are_one(inputs: list[Any], single: Path, tmp_path: Path, shard: str) -> None:
    log, output = tmp_path / "log", tmp_path / "out"
    assert run(2, log, [*inputs, "--output", output, "--shard", shard]) == [0, 0], read_log(log) + read_log(log, 1)
    assert_close(output, single)
    if shard != "none":
        assert f"sharded: {shard}, 1 replica(s) of 2 process(es)" in read_log(log)


@pytest.mark.parametrize("kind", CHECKPOINTING[1:])
def test_recomputing_gathers_again(inputs: list[Any], single: Path, tmp_path: Path, kind: str) -> None:
    log, output = tmp_path / "log", tmp_path / "out"
    argv = [*inputs, "--output", output, "--shard", "full", "--checkpointing", kind]
    assert run(2, log, argv) == [0, 0], read_log(log) + read_log(log, 1)
    assert_close(output, single)


def test_unequal_shares_with_loader_processes(inputs: list[Any], tmp_path: Path) -> None:
    """A rank with fewer rows must not plan further ahead than one that is still busy: planning is done together."""
    log, output = tmp_path / "log", tmp_path / "out"
    argv = [*inputs, "--output", output, "--shard", "full", "--workers", 4, "--sequence-multiple", 3]
    argv += ["--global-batch", 3, "--max-steps", 24, "--save-every", 100]
    assert finish(start(2, log, [str(a) for a in argv]), 90) == [0, 0], read_log(log)


def test_bfloat16(inputs: list[Any], tmp_path: Path) -> None:
    """float32 masters, bfloat16 weights in products; one process has the masters beside the weights."""
    for world, shard in ((1, "none"), (2, "full")):
        log, output = tmp_path / f"log-{shard}", tmp_path / shard
        argv = [*inputs, "--output", output, "--shard", shard, "--dtype", "bfloat16"]
        assert run(world, log, argv) == [0] * world, read_log(log)
    ours, theirs = timeless(tmp_path / "full" / "metrics.jsonl"), timeless(tmp_path / "none" / "metrics.jsonl")
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], rel=5e-3)  # CPUs round otherwise
    assert weights(tmp_path / "full" / "model")["decoder.norm.weight"].dtype == torch.bfloat16


def test_sharded_inside_and_replicated_across(inputs: list[Any], single: Path, tmp_path: Path) -> None:
    log, output = tmp_path / "log", tmp_path / "out"
    argv = [*inputs, "--output", output, "--shard", "full", "--replicas", 2, "--max-steps", 5]
    assert run(4, log, argv) == [0] * 4, read_log(log)
    assert_close(output, single)
    assert "sharded: full, 2 replica(s) of 2 process(es)" in read_log(log)


def test_stage_one_sharded(inputs: list[Any], tmp_path: Path) -> None:
    """The projector alone trains: tower and decoder are gathered, and get no gradients."""
    outputs = [tmp_path / "one", tmp_path / "two"]
    for world, output in enumerate(outputs, 1):
        log = tmp_path / f"log-{world}"
        argv = [*inputs, "--output", output, "--stage", 1, "--shard", "gradients"]
        assert run(world, log, argv) == [0] * world, read_log(log)
    assert_close(outputs[1], outputs[0])
    ours, start = weights(outputs[1] / "model"), weights(Path(inputs[1]))
    assert [n for n in start if not torch.equal(ours[n], start[n])] == [n for n in start if n.startswith("projector.")]


@pytest.mark.parametrize(("before", "after"), [((2, "full"), (1, "none")), ((1, "none"), (2, "full"))])
def test_another_number_of_processes_goes_on(
    inputs: list[Any], single: Path, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    log, output = tmp_path / "log", tmp_path / "out"
    argv = [*inputs, "--output", output, "--resume", "--shard"]
    terminated = start(before[0], log, [str(a) for a in [*argv, before[1]]], until_step_three)
    assert finish(terminated) == [143] * before[0], read_log(log)
    assert (output / "step-3").is_dir() and not (output / "model").exists()
    assert run(after[0], log, [*argv, after[1]]) == [0] * after[0], read_log(log)
    assert_close(output, single)


@pytest.mark.parametrize(
    ("options", "world", "words"),
    [
        (["--shard", "full", "--replicas", 2], 3, "--replicas: 2 replicas cannot share 3 process(es) evenly"),
        (["--shard", "full", "--replicas", 2], 1, "--replicas: 2 replicas cannot share 1 process(es) evenly"),
        (["--replicas", 2], 1, "nothing is sharded between them; give --shard too"),
        (["--keep", -1], 1, "--keep: -1 must be 0 to 10^9"),
    ],
)
def test_wrong_options(inputs: list[Any], tmp_path: Path, options: list[Any], world: int, words: str) -> None:
    assert run(world, tmp_path / "log", [*inputs, "--output", tmp_path / "out", *options]) == [2] * world
    assert words in read_log(tmp_path / "log")
    assert "Traceback" not in read_log(tmp_path / "log")
