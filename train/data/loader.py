"""The rows that a rank works on, ready when it asks for them: decoded ahead, pinned, and copied on their own stream."""

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
from train.data.corpus import Corpus, with_bad
from train.data.packing import share
from train.data.reader import Loaded
from train.data.stream import Step
from train.distributed.context_parallel import ALONE, Context


@dataclass(frozen=True)
class Prepared:
    """A step and this rank's rows of it, read as they are asked for."""

    step: Step
    batches: Iterator[PackedBatch]
    corpus: Corpus

    @property
    def skipped(self) -> dict[str, int]:
        """What was left out so far; complete when the rows have been read."""
        return with_bad(self.step.skipped, self.corpus.unreadable)


def prefetch(
    source: Iterator[Step], corpus: Corpus, rank: int, world: int, pin: bool = False, context: Context = ALONE
) -> Iterator[Prepared]:
    """Every step of ``source``. Its rows are read ahead, across the steps' borders: one beside the row in use, on a
    thread, and two for each loader process. ``pin``: in pinned memory, which a GPU copies from without waiting.
    ``context``: the ranks that share this one's rows; they take turns to read one and hand out its parts.
    """
    begun: list[tuple[Step, int]] = []
    turns, readers = cycle(range(context.size)), deque[int | None]()  # of each thing wanted, who reads it

    def wanted() -> Iterator[Any]:
        for step in source:
            shares = share(step.costs, world // context.size)
            rows, most = shares[rank // context.size], max(map(len, shares))
            begun.append((step, most))
            readers.append(None)
            yield None  # the step itself: a rank without a row has it too
            for number in rows:
                readers.append(next(turns))
                yield step.sequences[number] if readers[-1] == context.rank else None
            # Equally many on every rank: all look equally many steps ahead, and a step is planned by all together.
            for _ in range(most - len(rows)):
                readers.append(None)
                yield None

    answers = corpus.workers.in_order("load", wanted(), 2 * corpus.workers.count * context.size)

    def following() -> tuple[Any, Any] | None:
        ready = next(answers, None)
        if ready is None or (reader := readers.popleft()) is None:
            return ready
        sequence, loaded = ready[0], ready[1] or Loaded(None, [])
        batch = context.hand_out(loaded.batch, reader)
        return sequence, replace(loaded, batch=pinned(batch) if pin and batch is not None else batch)

    # One compute thread in here: a second OpenMP team that spins would halve the speed of a CPU's training step.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = pool.submit(following)

        def advance() -> tuple[Any, Any] | None:
            nonlocal ahead
            ready = ahead.result()
            ahead = pool.submit(following)
            return ready

        def rows(count: int) -> Iterator[PackedBatch]:
            for _ in range(count):
                ready = advance()
                assert ready is not None
                batch = None if ready[1] is None else corpus.loaded(*ready)
                if batch is not None:
                    yield batch

        while advance() is not None:
            step, count = begun.pop(0)
            batches = rows(count)
            yield Prepared(step, batches, corpus)
            for _ in batches:  # those that nobody asked for
                pass


def pinned(batch: PackedBatch) -> PackedBatch:
    """The same batch in page-locked memory."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    locked: dict[str, Any] = {name: t.pin_memory() for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(batch, **locked)


def on_device(batches: Iterable[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """The batches on ``device``. To a GPU each is copied on a stream of its own while the one before it is in use."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copy(batch: PackedBatch | None) -> PackedBatch | None:
        with torch.cuda.stream(copies):
            return None if batch is None else batch.to(device, non_blocking=True)

    waiting = iter(batches)
    ahead = copy(next(waiting, None))
    while ahead is not None:
        main.wait_stream(copies)
        ready = ahead
        for f in fields(ready):
            if isinstance(tensor := getattr(ready, f.name), Tensor):
                tensor.record_stream(main)  # its memory is the copies' own till main has done with it
        yield ready
        ahead = copy(next(waiting, None))
