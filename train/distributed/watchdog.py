"""What a run does when somebody ends it: SIGTERM saves and leaves; a process that dies takes the others with it."""

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

TERMINATED = 128 + signal.SIGTERM  # exit status after SIGTERM, as a shell gives it
BEREFT = 3  # exit status when another process has stopped
SILENCE = 30.0  # seconds without a sign of life after which a process counts as dead
PERIOD = 1.0  # seconds between two signs


class Terminated(BaseException):
    """The run was asked to end by SIGTERM, and has saved what it had."""


class Terminate:
    """Whether SIGTERM has come, in place of its usual effect; only the main thread of a process can be asked so."""

    def __init__(self) -> None:
        self.asked = False
        self._usual = signal.signal(signal.SIGTERM, self._note) if _main_thread() else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def close(self) -> None:
        """SIGTERM has its usual effect again."""
        if self._usual is not None:
            signal.signal(signal.SIGTERM, self._usual)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def watched(ranks: Ranks) -> Iterator[None]:
    """Runs the block under a Watch, and tells the others why this process leaves, if it leaves by an error."""
    if ranks.world == 1:
        yield
        return
    watch = Watch(ranks)
    try:
        yield
    except Terminated:  # of which the others know
        raise
    except BaseException as error:
        if not isinstance(error, UserError) and exchange_failed(error):
            watch.await_end()
        watch.tell(_line(error) or type(error).__name__)
        raise
    finally:
        watch.close()


def exchange_failed(error: BaseException) -> bool:
    """Whether it is not this process that failed, but its link to another."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


class Watch:
    """A thread that shows the other processes that this one lives and ends it when another one does not.

    Each rank watches the next one, so hundreds cost no more than two: on its own node by the process id, on another
    by a number that has to grow in torchrun's store. Who finds one dead, or leaves because of an error, says so in the
    store, and all end within seconds, whatever they wait for: an exchange that hangs on a GPU cannot be left otherwise.
    """

    def __init__(self, ranks: Ranks, silence: float = SILENCE, period: float = PERIOD):
        self.ranks, self.silence, self.period = ranks, silence, period
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A client of its own: the default one is locked while an exchange waits in it.
        self.store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=5))
        attempt = f"phi4rv/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._sign, self._end = (lambda rank: f"{attempt}/sign/{rank}"), f"{attempt}/end"
        self._closed = threading.Event()
        self._show(0)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def tell(self, message: str) -> None:
        """Ends the other processes: this one leaves because of ``message``."""
        with suppress(dist.DistError):  # the store may have gone with the process that held it
            self._say(f"{self._name(self.ranks.rank, socket.gethostname(), os.getpid())} has stopped: {message}")

    def await_end(self) -> None:
        """After an exchange failed: gives the thread time to find who died, and end this process with its name."""
        self._thread.join(self.silence + 5 * self.period)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        neighbour = (self.ranks.rank + 1) % self.ranks.world
        count, last, since = 0, b"", time.monotonic()
        while not self._closed.wait(self.period):
            count += 1
            try:
                self._show(count)
                if self.store.check([self._end]):
                    self._leave(self.store.get(self._end).decode())
                seen = self.store.get(self._sign(neighbour))
            except dist.DistError as error:
                return self._leave(f"torchrun's store on {os.environ['MASTER_ADDR']} has gone ({_line(error)})")
            if seen != last:
                last, since = seen, time.monotonic()
            _, pid, host = seen.decode().split(" ", 2)
            if (host == socket.gethostname() and gone(int(pid))) or time.monotonic() - since > self.silence:
                self._say(f"{self._name(neighbour, host, int(pid))} has died")

    def _show(self, count: int) -> None:
        self.store.set(self._sign(self.ranks.rank), f"{count} {os.getpid()} {socket.gethostname()}")

    def _say(self, message: str) -> None:
        """The first one to say something is heard."""
        self.store.compare_set(self._end, "", message)

    def _leave(self, message: str) -> None:
        # Who fails for the same reason as the others, and at the same time, should say it by itself.
        if not self._closed.wait(2 * self.period):
            print(f"error: {message}; all stop, go on with --resume", file=sys.stderr, flush=True)
            os._exit(BEREFT)

    @staticmethod
    def _name(rank: int, host: str, pid: int) -> str:
        return f"rank {rank} (process {pid} on {host})"


def gone(pid: int) -> bool:
    """Whether a process of this machine has ended, though its parent may not have taken note yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # the second: gone between opening and reading
        return Path("/proc/self/stat").exists()  # else a system without /proc, which tells nothing


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
