"""How a run ends early: SIGTERM saves and exits; when one process fails, the watchdog ends the others."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from phi4rv.errors import UserError
from train.distributed.ranks import Ranks

EXIT_SIGTERM = 128 + signal.SIGTERM  # exit status after SIGTERM, as in a shell
EXIT_PEER_FAILED = 3  # exit status when another process has failed
HEARTBEAT_TIMEOUT = 30.0  # seconds without a heartbeat after which a process counts as dead
HEARTBEAT_INTERVAL = 1.0  # seconds


class Terminated(BaseException):
    """The run got SIGTERM, and has saved."""


class SigtermHandler:
    """Notes SIGTERM instead of ending the process. Does nothing outside of the main thread."""

    def __init__(self) -> None:
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._on_sigterm) if _main_thread() else None

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def close(self) -> None:
        """Restores the previous handler."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def watchdog(ranks: Ranks) -> Iterator[None]:
    """Runs the block under a ``Watchdog``; an error in it ends the other processes, with its message."""
    if ranks.world_size == 1:
        yield
        return
    thread = Watchdog(ranks)
    try:
        yield
    except Terminated:  # on all ranks
        raise
    except BaseException as error:
        if not isinstance(error, UserError) and is_communication_error(error):
            thread.wait_for_abort()
        thread.abort_others(_first_line(error) or type(error).__name__)
        raise
    finally:
        thread.close()


def is_communication_error(error: BaseException) -> bool:
    """Whether communication with another process failed, not this process itself."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


class Watchdog:
    """A thread that sends heartbeats, and ends this process when another one has died.

    Each rank watches the next one, so that hundreds cost no more than two: on its own node by the process id, on
    another by a counter in torchrun's store. A rank that finds one dead, or exits because of an error, posts that in
    the store, and all exit within seconds: nothing else ends a process whose collective hangs on a GPU.
    """

    def __init__(self, ranks: Ranks, timeout: float = HEARTBEAT_TIMEOUT, interval: float = HEARTBEAT_INTERVAL):
        self.ranks, self.timeout, self.interval = ranks, timeout, interval
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A client of its own: the default one is locked while a collective waits in it.
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
        attempt = f"phi4rv/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._heartbeat_key, self._abort_key = (lambda rank: f"{attempt}/heartbeat/{rank}"), f"{attempt}/abort"
        self._closed = threading.Event()
        self._heartbeat(0)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def abort_others(self, message: str) -> None:
        """Ends the other processes: this one stops because of ``message``."""
        with suppress(dist.DistError):  # the store may have gone with the process that held it
            name = self._process_name(self.ranks.rank, socket.gethostname(), os.getpid())
            self._post_abort(f"{name} has stopped: {message}")

    def wait_for_abort(self) -> None:
        """After a collective failed: gives the thread time to find the dead process and to exit with its name."""
        self._thread.join(self.timeout + 5 * self.interval)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        neighbour = (self.ranks.rank + 1) % self.ranks.world_size
        count, last, last_change = 0, b"", time.monotonic()
        while not self._closed.wait(self.interval):
            count += 1
            try:
                self._heartbeat(count)
                if self.store.check([self._abort_key]):
                    self._abort(self.store.get(self._abort_key).decode())
                heartbeat = self.store.get(self._heartbeat_key(neighbour))
            except dist.DistError as error:
                return self._abort(f"torchrun's store on {os.environ['MASTER_ADDR']} is gone ({_first_line(error)})")
            if heartbeat != last:
                last, last_change = heartbeat, time.monotonic()
            _, pid, host = heartbeat.decode().split(" ", 2)
            silent = time.monotonic() - last_change > self.timeout
            if silent or (host == socket.gethostname() and process_ended(int(pid))):
                self._post_abort(f"{self._process_name(neighbour, host, int(pid))} has died")

    def _heartbeat(self, count: int) -> None:
        self.store.set(self._heartbeat_key(self.ranks.rank), f"{count} {os.getpid()} {socket.gethostname()}")

    def _post_abort(self, message: str) -> None:
        """Only the first message is kept."""
        self.store.compare_set(self._abort_key, "", message)

    def _abort(self, message: str) -> None:
        # A process that fails at the same time, for the same reason, should report its own error.
        if not self._closed.wait(2 * self.interval):
            print(f"error: {message}; all processes stop; continue with --resume", file=sys.stderr, flush=True)
            os._exit(EXIT_PEER_FAILED)

    @staticmethod
    def _process_name(rank: int, host: str, pid: int) -> str:
        return f"rank {rank} (process {pid} on {host})"


def process_ended(pid: int) -> bool:
    """Whether a process on this machine has ended, also if its parent has not reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between opening and reading
        return Path("/proc/self/stat").exists()  # without /proc nothing is known


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
