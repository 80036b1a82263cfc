"""Loader processes: a pool of Readers beside the training process, with results in the order of the requests."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from phi4rv.config import Config
from phi4rv.errors import UserError
from phi4rv.processing.processor import Processor
from train.data.reader import Reader
from train.recipe import Stage

RESULT_TIMEOUT = 60.0  # seconds, on top of ten times --image-timeout, that a result may take


class WorkerPool:
    """``count`` processes, started at the first request; with 0 the calling thread does the work itself."""

    def __init__(self, reader: Reader, count: int = 0):
        self.reader, self.count = reader, count
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False

    def imap(self, method: str, items: Iterable[Any], ahead: int) -> Iterator[tuple[Any, Any]]:
        """Each item and the result of the Reader's ``method`` on it, in order; ``ahead`` items are in flight.

        None for an item that is None. UserError if a process has died, or does not answer.
        """
        if not self.count:
            for item in items:
                yield item, None if item is None else getattr(self.reader, method)(item)
            return
        pending: deque[tuple[Any, Future[Any] | None]] = deque()
        for item in items:
            pending.append((item, None if item is None else self._submit(method, item)))
            if len(pending) > ahead:
                yield self._result(*pending.popleft())
        while pending:
            yield self._result(*pending.popleft())

    def _submit(self, method: str, item: Any) -> Future[Any]:
        if self._closed:  # by the training thread, while the loader's thread submits
            raise self._worker_died()
        if self._pool is None:
            reader = self.reader
            # spawn: a fork would copy a process in which CUDA, gloo and OpenMP have threads.
            self._pool = ProcessPoolExecutor(
                self.count,
                multiprocessing.get_context("spawn"),
                _init_worker,
                (reader.processor.files, reader.processor.config, reader.stage, reader.cache, reader.timeout),
            )
        try:
            return self._pool.submit(_call_reader, method, item)
        except BrokenProcessPool:
            raise self._worker_died() from None

    def _result(self, item: Any, future: Future[Any] | None) -> tuple[Any, Any]:
        try:
            limit = 10 * self.reader.timeout + RESULT_TIMEOUT if self.reader.timeout else None
            return item, None if future is None else future.result(limit)
        except BrokenProcessPool:
            raise self._worker_died() from None
        except FutureTimeout:
            raise UserError(
                f"--workers: the loader processes have not answered for {limit:.0f} s; the disk with the data hangs"
            ) from None

    def _worker_died(self) -> UserError:
        return UserError(
            f"--workers: one of the {self.count} loader processes died (killed, or out of memory); "
            "continue with --resume, with fewer --workers if memory is short"
        )

    def close(self) -> None:
        """Ends the processes and drops pending requests."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            children = multiprocessing.active_children()  # nothing else here starts any
            for process in children:
                process.kill()
            for process in children:
                process.join(5)
            self._pool = None


_reader: Reader | None = None


def _init_worker(files: dict[str, bytes], config: Config, stage: Stage, cache: Path | None, timeout: float) -> None:
    global _reader
    # Ctrl-C, and SIGTERM to a whole group or job (SLURM), are handled by the training process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _reader = Reader(Processor(files, config), stage, cache, timeout)


def _exit_with_parent() -> None:
    """Else this process would wait for ever after the training process was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call_reader(method: str, item: Any) -> Any:
    return getattr(_reader, method)(item)
