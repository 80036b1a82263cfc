"""Runs commands one after another, each with its own time limit and its own log; none stops those behind it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "out" / "benchmarks"
# Exit status of a command that was skipped (as in automake).
SKIPPED = 77
# Share of its limit that a command is told to use.
MARGIN = 0.9

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """``command(file, seconds)``: what to run; it may write its records to ``file``, as ``records.write`` does, and
    should end within ``seconds``. ``gpu``: there is nothing to run without one."""

    name: str
    seconds: float
    command: Callable[[Path, float], Sequence[str]]
    gpu: bool = False


def python_module(*arguments: str) -> list[str]:
    """This Python, running a module."""
    return [sys.executable, "-m", *arguments]


def run_jobs(jobs: Sequence[Job], logs: Path, have_gpu: bool) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Outcomes by job, and results by benchmark. What the commands print goes to ``logs/<job>.log``."""
    outcomes: dict[str, Outcome] = {}
    results: dict[str, Any] = {}
    logs.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        print(f"{job.name} (at most {job.seconds:.0f} s) ...", flush=True)
        if job.gpu and not have_gpu:
            outcome = {"state": "skipped", "exit": None, "seconds": 0.0, "last": "no CUDA device is here"}
        else:
            outcome, found = run_job(job, logs)
            results |= found
        outcomes[job.name] = outcome
        print(f"{job.name}: {outcome['state']} after {outcome['seconds']:.1f} s. {outcome['last']}", flush=True)
        if outcome["state"] in ("failed", "out of time"):
            print(_tail(logs / f"{job.name}.log", 40), flush=True)
    return outcomes, results


def run_job(job: Job, logs: Path) -> tuple[Outcome, dict[str, Any]]:
    """Runs one job; ends it and all that it started when its time is up."""
    log, file = logs / f"{job.name}.log", logs / f"{job.name}.json"
    for stale in (file, file.with_suffix(".png")):
        stale.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    begun = time.monotonic()
    # A file and not a pipe, which a grandchild that outlives its parent would keep open.
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                job.command(file, job.seconds * MARGIN),
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return {"state": "failed", "exit": None, "seconds": 0.0, "last": str(error)}, {}
        try:
            code: int | None = process.wait(job.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_session(process)
    state = {0: "passed", SKIPPED: "skipped", None: "out of time"}.get(code, "failed")
    found = _results(file)
    last = "" if found else _tail(log, 1)  # a table's last line is only its legend
    return {"state": state, "exit": code, "seconds": round(time.monotonic() - begun, 1), "last": last}, found


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the command's session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _results(file: Path) -> dict[str, Any]:
    """The results that the command wrote; none if it was ended while writing."""
    try:
        return dict(json.loads(file.read_text())["results"])
    except (OSError, ValueError, KeyError):
        return {}


def _tail(file: Path, lines: int) -> str:
    return "\n".join([line for line in file.read_text(errors="replace").splitlines() if line.strip()][-lines:])


def summary(outcomes: dict[str, Outcome]) -> str:
    """One line a job."""
    width = max(map(len, outcomes), default=0)
    return "\n".join(
        f"{name:{width}} {outcome['state']:11} {outcome['seconds']:6.1f} s  {outcome['last']}"[:138]
        for name, outcome in outcomes.items()
    )


def run_in_process(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> tuple[Any, str | None]:
    """``function(*arguments)`` in a new process: (result, None), or (None, why there is none)."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(max(0.0, seconds)) else (None, f"no answer in {seconds:.3g} s")
    except EOFError:
        process.join()
        return None, f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def run_inline(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> tuple[Any, str | None]:
    """As ``run_in_process``, but in this process and without a limit: where nothing hangs, and memory is not short."""
    return function(*arguments), None


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}".partition("\n")[0][:100]))
