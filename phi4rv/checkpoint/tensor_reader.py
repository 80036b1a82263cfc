"""Tensors of safetensors files onto a device, as fast as the page cache and the bus allow.

Threads read the files piece by piece into pinned buffers, and each piece goes to the GPU by a copy on a stream of its
own: reading, copying and what the caller does with the tensors before overlap. (``safe_open`` maps a file and copies
from pages that are not pinned, which the driver does in one thread and through a buffer of its own.)
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi4rv.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
PIECE = 8 << 20  # bytes that a thread reads at a time
# A thread copies some 6 GB/s out of the page cache, the bus of an H100 takes 55.
THREADS = 16
BUFFERS = 2 * THREADS  # each thread fills one while the one before is copied
AHEAD = PIECE * BUFFERS  # bytes that are on their way behind the tensor that the caller gets next


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ``size`` bytes of ``file`` from ``start`` on. ``dtype``: safetensors' name of it."""

    name: str
    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def stored(file: Path) -> list[Stored]:
    """The tensors of a safetensors file, from its header. UserError if it is missing or not whole."""
    try:
        safe_open(file, "pt")  # checks that header and length fit
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        raise UserError(f"{file}: missing, though the index names it") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file, truncated or damaged ({error})") from None
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found.append(Stored(name, file, 8 + length + start, end - start, entry["dtype"], tuple(entry["shape"])))
    return found


def read(wanted: Sequence[Stored], device: torch.device | str) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors one after another in the order given, on ``device`` and in their stored dtypes.

    A GPU holds, beside those given, less than AHEAD bytes of what comes behind them and one more tensor. On a CPU they
    are pages of the file, to be copied before the next is asked for. UserError if a file ends before its header says.
    """
    device = torch.device(device)
    if device.type == "cuda":
        yield from staged(wanted, device, Staging(device))
        return
    for item in wanted:
        # Opened anew for each tensor: closing drops the mapped pages of the one before.
        with safe_open(item.file, "pt") as file:
            yield item, file.get_tensor(item.name).to(device)


class Staging:
    """Pinned buffers between files and a GPU, and the stream that empties them."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        # Each with the event of its last copy, which must have passed before the buffer is filled anew.
        self.free: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        for buffer in torch.empty(BUFFERS, PIECE, dtype=torch.uint8, pin_memory=True):
            self.free.put((buffer, None))

    def order(self) -> None:
        """What is sent from now on is written after all that the caller has begun: it may still read that memory."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def send(self, buffer: Tensor, target: Tensor) -> Any:
        """Begins the copy of ``buffer`` to ``target``; its event."""
        with torch.cuda.stream(self.stream):
            target.copy_(buffer, non_blocking=True)
            return self.stream.record_event(torch.cuda.Event(blocking=True))  # who waits leaves its core to others

    def arrive(self, event: Any) -> None:
        """What the caller begins from now on sees the copy."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """Waits for all copies: where reading ends early, their targets are about to be freed."""
        self.stream.synchronize()


def staged(wanted: Sequence[Stored], device: torch.device, staging: Staging) -> Iterator[tuple[Stored, Tensor]]:
    """``read`` by way of ``staging``."""
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        for file in dict.fromkeys(item.file for item in wanted):
            files[file] = os.open(file, os.O_RDONLY)
            stack.callback(os.close, files[file])
        stack.callback(staging.finish)
        pool = ThreadPoolExecutor(THREADS)
        stack.callback(pool.shutdown, cancel_futures=True)
        coming: deque[tuple[Stored, Tensor, list[Future[Any]]]] = deque()

        def begin(item: Stored) -> None:
            with torch.inference_mode(False):  # which does not reach the threads that write
                whole = torch.empty(item.size, dtype=torch.uint8, device=device)
            staging.order()
            starts = range(0, item.size, PIECE)
            pieces = [(item.start + start, whole[start : start + PIECE]) for start in starts]
            tasks = [pool.submit(_send_piece, item, files[item.file], *piece, staging) for piece in pieces]
            coming.append((item, whole, tasks))

        def arrived() -> tuple[Stored, Tensor]:
            item, whole, tasks = coming.popleft()
            for task in tasks:
                staging.arrive(task.result())
            return item, whole.view(DTYPES[item.dtype]).view(item.shape)

        for item in wanted:
            while sum(i.size for i, *_ in islice(coming, 1, None)) >= AHEAD:
                yield arrived()
            begin(item)
        while coming:
            yield arrived()


def _send_piece(item: Stored, handle: int, place: int, target: Tensor, staging: Staging) -> Any:
    """Reads the bytes of ``target`` from the file's byte ``place`` on and begins their copy; its event."""
    buffer, event = staging.free.get()
    try:
        if event:
            event.synchronize()
        _fill(item, handle, place, buffer[: len(target)])
        event = staging.send(buffer[: len(target)], target)
    finally:
        staging.free.put((buffer, event))  # also after an error, or the other threads would wait for it
    return event


def _fill(item: Stored, handle: int, place: int, target: Tensor) -> None:
    view = target.numpy().data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(handle, [view[done:]], place + done)
        except OSError as error:
            raise UserError(f"{item.file}: cannot be read ({error.strerror})") from None
        if not count:
            raise UserError(f"{item.file}: ends inside {item.name}: it was cut while it was read")
        done += count
