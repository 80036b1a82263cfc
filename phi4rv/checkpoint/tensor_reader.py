"""Tensors of safetensors files onto a device, as fast as the page cache and the bus allow.

Threads read the files chunk by chunk into pinned buffers, and each chunk goes to the GPU by a copy on a stream of its
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
CHUNK_BYTES = 8 << 20  # bytes that a thread reads at a time
# A thread copies some 6 GB/s out of the page cache, the bus of an H100 takes 55.
THREADS = 16
BUFFERS = 2 * THREADS  # each thread fills one while its last one is copied
PREFETCH_BYTES = CHUNK_BYTES * BUFFERS  # bytes in flight behind the tensor that the caller gets next


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``size`` bytes of ``file`` from ``start`` on. ``dtype``: safetensors' name of it."""

    name: str
    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> list[TensorInfo]:
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
        found.append(TensorInfo(name, file, 8 + length + start, end - start, entry["dtype"], tuple(entry["shape"])))
    return found


def read_tensors(wanted: Sequence[TensorInfo], device: torch.device | str) -> Iterator[tuple[TensorInfo, Tensor]]:
    """The tensors one after another in the order given, on ``device`` and in their stored dtypes.

    A GPU holds, beside those yielded, less than PREFETCH_BYTES of what follows and one more tensor. On a CPU they
    are pages of the mapped file, to be copied before the next is asked for. UserError if a file is shorter than its
    header says.
    """
    device = torch.device(device)
    if device.type == "cuda":
        yield from read_staged(wanted, device, StagingBuffers(device))
        return
    for item in wanted:
        # Opened anew for each tensor: closing drops the mapped pages of the one before.
        with safe_open(item.file, "pt") as file:
            yield item, file.get_tensor(item.name).to(device)


class StagingBuffers:
    """Pinned buffers between files and a GPU, and the stream that empties them."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        # Each with the event of its last copy, which must be done before the buffer is filled again.
        self.free: SimpleQueue[tuple[Tensor, Any]] = SimpleQueue()
        for buffer in torch.empty(BUFFERS, CHUNK_BYTES, dtype=torch.uint8, pin_memory=True):
            self.free.put((buffer, None))

    def wait_for_compute(self) -> None:
        """Later copies wait for the work that the caller has queued: it may still read that memory."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy_async(self, buffer: Tensor, target: Tensor) -> Any:
        """Starts the copy of ``buffer`` to ``target`` and returns its event."""
        with torch.cuda.stream(self.stream):
            target.copy_(buffer, non_blocking=True)
            return self.stream.record_event(torch.cuda.Event(blocking=True))  # a waiting thread yields its core

    def wait_for_copy(self, event: Any) -> None:
        """Makes the caller's stream wait for the copy."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def synchronize(self) -> None:
        """Waits for all copies: if reading ends early, their targets are about to be freed."""
        self.stream.synchronize()


def read_staged(
    wanted: Sequence[TensorInfo], device: torch.device, staging: StagingBuffers
) -> Iterator[tuple[TensorInfo, Tensor]]:
    """``read_tensors`` by way of ``staging``."""
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        for file in dict.fromkeys(item.file for item in wanted):
            files[file] = os.open(file, os.O_RDONLY)
            stack.callback(os.close, files[file])
        stack.callback(staging.synchronize)
        pool = ThreadPoolExecutor(THREADS)
        stack.callback(pool.shutdown, cancel_futures=True)
        in_flight: deque[tuple[TensorInfo, Tensor, list[Future[Any]]]] = deque()

        def enqueue(item: TensorInfo) -> None:
            with torch.inference_mode(False):  # which does not reach the threads that write
                whole = torch.empty(item.size, dtype=torch.uint8, device=device)
            staging.wait_for_compute()
            starts = range(0, item.size, CHUNK_BYTES)
            chunks = [(item.start + start, whole[start : start + CHUNK_BYTES]) for start in starts]
            tasks = [pool.submit(_copy_chunk, item, files[item.file], *chunk, staging) for chunk in chunks]
            in_flight.append((item, whole, tasks))

        def dequeue() -> tuple[TensorInfo, Tensor]:
            item, whole, tasks = in_flight.popleft()
            for task in tasks:
                staging.wait_for_copy(task.result())
            return item, whole.view(DTYPES[item.dtype]).view(item.shape)

        for item in wanted:
            while sum(i.size for i, *_ in islice(in_flight, 1, None)) >= PREFETCH_BYTES:
                yield dequeue()
            enqueue(item)
        while in_flight:
            yield dequeue()


def _copy_chunk(item: TensorInfo, fd: int, offset: int, target: Tensor, staging: StagingBuffers) -> Any:
    """Reads the bytes of ``target`` from the file's byte ``offset`` on and starts their copy; returns its event."""
    buffer, event = staging.free.get()
    try:
        if event:
            event.synchronize()
        _read_into(item, fd, offset, buffer[: len(target)])
        event = staging.copy_async(buffer[: len(target)], target)
    finally:
        staging.free.put((buffer, event))  # also after an error, or the other threads would wait for it
    return event


def _read_into(item: TensorInfo, fd: int, offset: int, target: Tensor) -> None:
    view = target.numpy().data
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise UserError(f"{item.file}: cannot be read ({error.strerror})") from None
        if not count:
            raise UserError(f"{item.file}: ends inside {item.name}: it was cut while it was read")
        done += count
