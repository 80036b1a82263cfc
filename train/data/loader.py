"""Prefetching: a rank's packed rows are decoded ahead, pinned, and copied to the device on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from phi4rv.batch import PackedBatch
from train.data.packed_dataset import PackedDataset, add_bad
from train.data.packing import balance_rows
from train.data.reader import LoadedRow
from train.data.stream import GlobalBatch
from train.distributed.context_parallel import NO_CONTEXT_PARALLEL, ContextParallel


@dataclass(frozen=True)
class PrefetchedStep:
    """A global batch and this rank's rows of it, which are loaded lazily."""

    global_batch: GlobalBatch
    batches: Iterator[PackedBatch]
    dataset: PackedDataset

    @property
    def skipped(self) -> dict[str, int]:
        """What was left out so far; complete when the rows have been loaded."""
        return add_bad(self.global_batch.skipped, self.dataset.unreadable)


def prefetch(
    global_batches: Iterator[GlobalBatch],
    dataset: PackedDataset,
    rank: int,
    world_size: int,
    pin: bool = False,
    cp: ContextParallel = NO_CONTEXT_PARALLEL,
) -> Iterator[PrefetchedStep]:
    """Every global batch with this rank's rows, which are loaded ahead, also those of the next batches: one beside the
    row in use, on a thread, and two for each loader process. ``pin``: in pinned memory, from which a GPU copies
    asynchronously. ``cp``: the ranks that share this one's rows; they take turns to load one and scatter it.
    """
    started: list[tuple[GlobalBatch, int]] = []
    turns, loading_ranks = cycle(range(cp.size)), deque[int | None]()  # of each request: the rank in cp that loads it

    def requests() -> Iterator[Any]:
        for global_batch in global_batches:
            shares = balance_rows(global_batch.row_flops, world_size // cp.size)
            rows, most = shares[rank // cp.size], max(map(len, shares))
            started.append((global_batch, most))
            loading_ranks.append(None)
            yield None  # stands for the global batch itself: a rank without a row has it too
            for number in rows:
                loading_ranks.append(next(turns))
                yield global_batch.sequences[number] if loading_ranks[-1] == cp.rank else None
            # As many requests on every rank: all look equally far ahead, as the ranks measure samples together.
            for _ in range(most - len(rows)):
                loading_ranks.append(None)
                yield None

    results = dataset.workers.imap("load_row", requests(), 2 * dataset.workers.count * cp.size)

    def load_next() -> tuple[Any, Any] | None:
        result = next(results, None)
        if result is None or (loading_rank := loading_ranks.popleft()) is None:
            return result
        sequence, row = result[0], result[1] or LoadedRow(None, [])
        batch = cp.scatter(row.batch, loading_rank)
        return sequence, replace(row, batch=pin_memory(batch) if pin and batch is not None else batch)

    # One compute thread in here: a second OpenMP team that spins would halve the speed of a CPU's training step.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = pool.submit(load_next)

        def advance() -> tuple[Any, Any] | None:
            nonlocal ahead
            result = ahead.result()
            ahead = pool.submit(load_next)
            return result

        def rows(count: int) -> Iterator[PackedBatch]:
            for _ in range(count):
                result = advance()
                assert result is not None
                batch = None if result[1] is None else dataset.accept_row(*result)
                if batch is not None:
                    yield batch

        while advance() is not None:
            global_batch, count = started.pop(0)
            batches = rows(count)
            yield PrefetchedStep(global_batch, batches, dataset)
            for _ in batches:  # those that the caller left unread
                pass


def pin_memory(batch: PackedBatch) -> PackedBatch:
    """The same batch in page-locked memory."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    locked: dict[str, Any] = {name: t.pin_memory() for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(batch, **locked)


def prefetch_to_device(batches: Iterable[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """The batches on ``device``. To a GPU each is copied on a side stream while the one before it is in use."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copy_stream, compute_stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copy(batch: PackedBatch | None) -> PackedBatch | None:
        with torch.cuda.stream(copy_stream):
            return None if batch is None else batch.to(device, non_blocking=True)

    source = iter(batches)
    ahead = copy(next(source, None))
    while ahead is not None:
        compute_stream.wait_stream(copy_stream)
        current = ahead
        for f in fields(current):
            if isinstance(tensor := getattr(current, f.name), Tensor):
                tensor.record_stream(compute_stream)  # the copy stream reuses its memory only after that
        yield current
        ahead = copy(next(source, None))
