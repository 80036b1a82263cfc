"""Sharded over two processes on gloo: the losses and weights of one process to rounding, saves that any number reads."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small import mixed_records, record, small_checkpoint, timeless, weights, write_jsonl

from train.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["train.main", "torch.distributed.fsdp", "small"])


def run_main(argv: Sequence[str]) -> int:
    return main(list(argv))


def rank_process(rank: int, world: int, port: int, log: Path, work: Callable[..., int], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with (log.parent / f"{log.name}-{rank}").open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        status = work(arguments)
    os._exit(status)


def start(world: int, log: Path, arguments: Any, work: Callable[..., int] = run_main) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = [START.Process(target=rank_process, args=(r, world, port, log, work, arguments)) for r in range(world)]
    for process in made:
        process.start()
    return made


def finish(processes: list[Any], seconds: float = 120.0) -> list[int | None]:
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run(world: int, log: Path, argv: Sequence[Any]) -> list[int | None]:
    return finish(start(world, log, [str(a) for a in argv]))


def told(log: Path, rank: int = 0) -> str:
    return (log.parent / f"{log.name}-{rank}").read_text()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Five steps; most records have no image, so that a rank often has none; rows that two ranks cannot share evenly."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = mixed_records(folder, 3) + [record(f"Say {i}. " * (i % 4 + 1), f"<nothink>{i}.") for i in range(14)]
    data = write_jsonl(folder / "data.jsonl", lines)
    line = ["--checkpoint", small_checkpoint(folder), "--data", data, "--device", "cpu", "--stage", 2]
    line += ["--max-steps", 5, "--global-batch", 4, "--sequence-length", 128, "--warmup", 1, "--lr", 1e-3, "--seed", 3]
    return [*line, "--save-every", 2]


@pytest.fixture(scope="module")
def single(inputs: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("single")
    assert run(1, output / "log", [*inputs, "--output", output / "out"]) == [0], told(output / "log")
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
    assert run(2, log, [*inputs, "--output", output, "--shard", shard]) == [0, 0], told(log) + told(log, 1)
    assert_close(output, single)
    if shard != "none":
        assert f"sharded: {shard}, over 2 process(es), 1 time(s)" in told(log)
