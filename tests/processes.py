"""Runs of train/main.py in processes of their own, one or several that train together, forked from a server that has
everything imported: a start takes a tenth of a second.
"""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from train import main as program
from train.main import main

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train.main", "torch.distributed.fsdp", "tests.small"])


def run_main(argv: Sequence[str]) -> int:
    return main(list(argv))


def until_step_three(argv: Sequence[str]) -> int:
    """The first rank gets SIGTERM in its third step."""
    step = program.MetricsLogger.log_step

    def third(self: program.MetricsLogger, metrics: dict[str, Any]) -> None:
        step(self, metrics)
        if metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    program.MetricsLogger.log_step = third  # type: ignore[method-assign]
    return main(list(argv))


def rank_process(rank: int, world_size: int, port: int, log: Path, work: Callable[..., int], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with (log.parent / f"{log.name}-{rank}").open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        status = work(arguments)
    os._exit(status)


def start(world_size: int, log: Path, arguments: Any, work: Callable[..., int] = run_main) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = [
        FORKSERVER.Process(target=rank_process, args=(r, world_size, port, log, work, arguments))
        for r in range(world_size)
    ]
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


def run(world_size: int, log: Path, argv: Sequence[Any]) -> list[int | None]:
    return finish(start(world_size, log, [str(a) for a in argv]))


def read_log(log: Path, rank: int = 0) -> str:
    return (log.parent / f"{log.name}-{rank}").read_text()
