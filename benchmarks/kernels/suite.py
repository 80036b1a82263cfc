"""Runs the cases of every operation in a process of their own.

A kernel may hang or break its GPU for the whole process. What it was doing is then struck off (a peer) or recorded as
failed (ours), and a new process goes on from there.
"""

from __future__ import annotations

import functools
import importlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.kernels import operation_names, timing
from benchmarks.kernels.case import Case
from benchmarks.kernels.measure import (
    OURS,
    GpuBroken,
    Record,
    case_key,
    empty_record,
    gpu_is_broken,
    measure,
    short_error,
)
from phi4rv.ops import cuda

PACKAGE = "benchmarks.kernels.cases"
TIMING = "timing"
# Silence after which a process is taken to hang: compiling a peer, or ten slow calls.
HANG_SECONDS = 120.0
CASE_SECONDS = {"cuda": 0.4, "cpu": 0.05}
OUT_OF_TIME = "out of time"


@dataclass
class Progress:
    """What the processes have reported so far. ``current``: the row and variant being measured."""

    rows: list[Record] = field(default_factory=list)
    records: dict[int, Record] = field(default_factory=dict)
    excluded: dict[int, dict[str, str]] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    current: tuple[int, str] | None = None

    def next(self) -> int:
        """The first row without a record."""
        return next((i for i in range(len(self.rows)) if i not in self.records), len(self.rows))

    def complete(self) -> bool:
        return bool(self.rows) and self.next() == len(self.rows)

    def record_crash(self, reason: str) -> None:
        """A process ended before its time: a peer is not tried again, ours has failed."""
        row, variant = self.current or (self.next(), OURS)
        if variant in (OURS, TIMING):
            place = "" if variant == OURS else " while timing"
            self.records[row] = empty_record(self.rows[row], "failed", reason + place)
        else:
            self.excluded.setdefault(row, {})[variant] = reason


def run(
    only: Sequence[str] = (), seconds: float = math.inf, package: str = PACKAGE, hang_seconds: float = HANG_SECONDS
) -> dict[str, Any]:
    """Measures every row: {"device", "ceilings", "rows"}. Rows for which ``seconds`` do not suffice say so."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        # The new process reads them before its first kernel.
        os.environ |= {"TRITON_INTERPRET": "1", cuda.EMULATE: "1"}
    names = list(only) or operation_names()
    progress, deadline = Progress(), time.monotonic() + seconds
    while not progress.complete() and time.monotonic() < deadline:
        begun = len(progress.records)
        stopped = _supervise(progress, (package, names, device), deadline, hang_seconds)
        if stopped in (None, OUT_OF_TIME):
            break
        if not progress.ceilings:  # it did not come to the first row: nothing will
            progress.rows = progress.rows or [_placeholder(name) for name in names]
            progress.records = {i: empty_record(row, "failed", stopped) for i, row in enumerate(progress.rows)}
        elif progress.current or len(progress.records) == begun:
            progress.record_crash(stopped)
    progress.rows = progress.rows or [_placeholder(name) for name in names]
    rows = [
        progress.records.get(i) or empty_record(row, "not measured", OUT_OF_TIME) for i, row in enumerate(progress.rows)
    ]
    return {"device": device, "ceilings": progress.ceilings, "rows": rows}


def _supervise(progress: Progress, work: tuple[Any, ...], deadline: float, hang_seconds: float) -> str | None:
    """Starts a process and takes down what it reports. None when it did all, else why it ended."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    progress.current = None
    process = spawn.Process(
        target=_worker, args=(sender, *work, progress.next(), progress.excluded, progress.ceilings), name="kernels"
    )
    process.start()
    sender.close()
    reason = None
    try:
        while True:
            quiet = hang_seconds if progress.current else HANG_SECONDS  # starting takes its time
            left = deadline - time.monotonic()
            if left <= 0 or not receiver.poll(min(quiet, left)):
                return OUT_OF_TIME if left <= quiet else f"no answer for {quiet:g} s"
            kind, value = receiver.recv()
            if kind == "done":
                return None
            if kind == "stopped":
                reason = value
            elif kind == "at":
                progress.current = value
            elif kind == "record":
                row, record = value
                progress.records[row], progress.current = record, None
                print(f"  {_log_line(record)}", file=sys.stderr, flush=True)
            else:
                setattr(progress, kind, value)
    except EOFError:
        process.join()
        return reason or f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _log_line(record: Record) -> str:
    figure = f"{record['ms']:.4g} ms" if record["ms"] else f"{record['status']}: {record['reason']}"
    return f"{record['operation']} {record['shape']}: {figure}"


def _worker(
    sender: Connection,
    package: str,
    names: list[str],
    device: str,
    start: int,
    excluded: dict[int, dict[str, str]],
    ceilings: dict[str, float],
) -> None:
    """In the new process: measures the rows from ``start`` on and sends (kind, value) pairs."""
    if device == "cuda":
        _configure_compile()
    plan = [entry for name in names for entry in _cases(package, name)]
    plan.sort(key=lambda entry: _key(entry)["goal"] is None)  # goals first, should the time not suffice for all
    sender.send(("rows", [_key(entry) for entry in plan]))
    if not ceilings:
        ceilings = timing.ceilings(device)
        sender.send(("ceilings", ceilings))
    for row, entry in list(enumerate(plan))[start:]:
        if isinstance(entry, Case):
            try:
                record = measure(
                    entry,
                    device,
                    ceilings,
                    excluded.get(row),
                    functools.partial(_announce, sender, row),
                    CASE_SECONDS[device],
                )
            except GpuBroken as error:
                sender.send(("stopped", str(error)))
                os._exit(1)  # nothing can be freed any more
            except Exception as error:  # of the inputs, or of the timing itself
                record = empty_record(case_key(entry), "failed", short_error(error))
        else:
            record = entry
        sender.send(("record", (row, record)))
        if gpu_is_broken(device):
            os._exit(1)
    sender.send(("done", None))


def _announce(sender: Connection, row: int, variant: str) -> None:
    sender.send(("at", (row, variant)))


def _configure_compile() -> None:
    """Peers are compiled for their exact shape, and their backward pass can be run again."""
    import torch._dynamo
    import torch._functorch.config

    dynamo: Any = torch._dynamo.config
    dynamo.automatic_dynamic_shapes = False
    dynamo.recompile_limit = 256
    functorch: Any = torch._functorch.config
    functorch.donated_buffer = False


def _cases(package: str, name: str) -> list[Case | Record]:
    """The operation's cases, or one record that says why there are none."""
    try:
        return list(importlib.import_module(f"{package}.{name}").cases(tiny=not torch.cuda.is_available()))
    except Exception as error:
        return [empty_record(_placeholder(name), "failed", short_error(error))]


def _placeholder(name: str) -> Record:
    """Stands for the cases of an operation that could not be listed."""
    return {"operation": name, "shape": "", "backward": False, "goal": None}


def _key(entry: Case | Record) -> Record:
    return (
        case_key(entry)
        if isinstance(entry, Case)
        else {k: entry[k] for k in ("operation", "shape", "backward", "goal")}
    )
