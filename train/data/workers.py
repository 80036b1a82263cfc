"""Loader processes: N Readers beside the training process, whose answers come in the order of the questions."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from phi4rv.config import Config
from phi4rv.errors import UserError
from phi4rv.processing.processor import Processor
from train.data.reader import Reader
from train.recipe import Stage

SILENCE = 60.0  # seconds, beside ten times --image-timeout, after which a worker that does not answer is given up


class Workers:
    """``count`` processes, started at the first question; with 0 the asking thread does the work itself."""

    def __init__(self, reader: Reader, count: int = 0):
        self.reader, self.count = reader, count
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False

    def in_order(self, method: str, items: Iterable[Any], ahead: int) -> Iterator[tuple[Any, Any]]:
        """Each item and what the Reader's ``method`` makes of it; reads ``ahead`` items further than it gives.

        An item that is None is not asked about. UserError if a process has died, or answers no more.
        """
        if not self.count:
            for item in items:
                yield item, None if item is None else getattr(self.reader, method)(item)
            return
        asked: deque[tuple[Any, Future[Any] | None]] = deque()
        for item in items:
            asked.append((item, None if item is None else self._ask(method, item)))
            if len(asked) > ahead:
                yield self._answer(*asked.popleft())
        while asked:
            yield self._answer(*asked.popleft())

    def _ask(self, method: str, item: Any) -> Future[Any]:
        if self._closed:  # by the training thread, while a loader's asked
            raise self._died()
        if self._pool is None:
            reader = self.reader
            # spawn: a fork would copy a process in which CUDA, gloo and OpenMP have threads.
            self._pool = ProcessPoolExecutor(
                self.count,
                multiprocessing.get_context("spawn"),
                _begin,
                (reader.processor.files, reader.processor.config, reader.stage, reader.cache, reader.timeout),
            )
        try:
            return self._pool.submit(_work, method, item)
        except BrokenProcessPool:
            raise self._died() from None

    def _answer(self, item: Any, future: Future[Any] | None) -> tuple[Any, Any]:
        try:
            limit = 10 * self.reader.timeout + SILENCE if self.reader.timeout else None
            return item, None if future is None else future.result(limit)
        except BrokenProcessPool:
            raise self._died() from None
        except Late:
            raise UserError(
                f"--workers: the loader processes have not answered for {limit:.0f} s; the disk under the data hangs"
            ) from None

    def _died(self) -> UserError:
        return UserError(
            f"--workers: one of the {self.count} loader processes died (killed, or out of memory); "
            "go on with --resume, with fewer --workers if memory is short"
        )

    def close(self) -> None:
        """Ends the processes; what was asked and not answered is forgotten."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            children = multiprocessing.active_children()  # nobody else here starts any
            for process in children:
                process.kill()
            for process in children:
                process.join(5)
            self._pool = None


_reader: Reader | None = None


def _begin(files: dict[str, bytes], config: Config, stage: Stage, cache: Path | None, timeout: float) -> None:
    global _reader
    # Ctrl-C, and SIGTERM to a whole group or job (SLURM), are the training process's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _reader = Reader(Processor(files, config), stage, cache, timeout)


def _end_with_parent() -> None:
    """A training process that was killed closes nothing, and this one would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(method: str, item: Any) -> Any:
    return getattr(_reader, method)(item)
