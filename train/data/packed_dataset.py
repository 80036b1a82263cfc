"""From files to the packed sequences of each step, in an order that depends on seed and step alone.

The lines are shuffled (``JsonLines`` knows their offsets), measured (``Reader.measure``), drawn from their sources by
weight, and packed into sequences (``pack_sequences``) until a global batch is full. Every rank makes the same global
batches and loads its own rows of each (``train/data/loader.py``). A global batch depends on the data, the stage and
the seed only: not on the ranks, the loader processes, or where a run was resumed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from phi4rv.batch import PackedBatch
from phi4rv.errors import UserError
from phi4rv.processing.processor import Processor
from train.data.line_index import JsonLines, Line
from train.data.mixture import DataSource
from train.data.reader import LoadedRow, Reader, SampleInfo, SkippedSample
from train.data.workers import WorkerPool
from train.recipe import Stage

LINES_PER_TASK = 16  # lines that one worker measures at a time
AllGather = Callable[[Any], list[Any]]  # the values of all ranks, on every rank


def single_process(value: Any) -> list[Any]:
    return [value]


class PackedDataset:
    """The data of a run and the processes that read it.

    data: the files of one source, or sources with shares. workers: loader processes, 0 for none. cache: a folder for
    unpacked ``.gz`` files and the indexes of archives; temporary if not given. timeout: seconds an image may take in a
    worker. rank, world_size, all_gather: the ranks that share the measuring; each measures a part of the lines.

    ``counts``: records that were ``bad`` (only with skip_bad; otherwise the first one stops the run), or ``dropped`` or
    ``shortened`` because they exceed the stage's sequence length. Each record is counted once, not once an epoch.
    """

    def __init__(
        self,
        data: Sequence[Path | DataSource],
        processor: Processor,
        stage: Stage,
        skip_bad: bool = False,
        workers: int = 0,
        cache: Path | None = None,
        timeout: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        all_gather: AllGather = single_process,
    ):
        self.processor, self.stage, self.skip_bad = processor, stage, skip_bad
        self.rank, self.world_size, self.all_gather = rank, world_size, all_gather
        if cache is None:
            self._temporary = TemporaryDirectory(prefix="phi4rv-")
            cache = Path(self._temporary.name)
        files = tuple(path for path in data if not isinstance(path, DataSource))
        self.sources = [s for s in data if isinstance(s, DataSource)] + ([DataSource(files)] if files else [])
        self.lines = [JsonLines(source.files, cache) for source in self.sources]
        self.reader = Reader(processor, stage, cache, timeout)
        self.workers = WorkerPool(self.reader, workers)
        self.skip_counts: Counter[str] = Counter()  # what measuring skipped or shortened, by reason
        self.bad_reported = False  # whether all lines were measured before, and the bad ones printed
        self.unreadable = 0  # records whose images this rank could not decode

    def __len__(self) -> int:
        """Number of records: the lines of all sources."""
        return sum(map(len, self.lines))

    def close(self) -> None:
        self.workers.close()

    def epoch_order(self, source: int, seed: int, epoch: int) -> Sequence[int]:
        """Line numbers of one source in the order of one epoch; depends on the arguments alone."""
        count = len(self.lines[source])
        if self.stage.order == "file" and epoch == 0:
            return range(count)
        # manual_seed takes 32 bits of the sum.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + source * 2_654_435_761)
        # A numpy array: iterating over a tensor makes objects of all its elements at once.
        return torch.randperm(count, generator=generator).numpy()  # type: ignore[return-value]

    def measure_lines(self, lines: Iterator[Line]) -> Iterator[list[SampleInfo | SkippedSample]]:
        """``Reader.measure`` of each line, in order; measured ahead, and divided among workers and ranks."""
        size = LINES_PER_TASK if self.workers.count or self.world_size > 1 else 1
        chunks = iter(lambda: list(islice(lines, size)), [])
        rounds = iter(lambda: list(islice(chunks, self.world_size)), [])  # a chunk for each rank
        own_chunks = (group[self.rank] if self.rank < len(group) else [] for group in rounds)
        for _, own_results in self.workers.imap("measure_lines", own_chunks, 2 * self.workers.count):
            for results in self.all_gather(own_results):
                yield from results

    def measure(self, line: Line) -> list[SampleInfo]:
        """The usable conversations of one line, counted and checked as in a run."""
        return [info for item in self.reader.measure(line) if (info := self.accept_sample(item))]

    def load_row(self, sequence: Sequence[SampleInfo]) -> PackedBatch | None:
        """Loads one packed row in this thread; None if skip_bad left nothing of it."""
        return self.accept_row(sequence, self.reader.load_row(sequence))

    def accept_row(self, sequence: Sequence[SampleInfo], result: LoadedRow) -> PackedBatch | None:
        """Counts the samples that could not be read; UserError for the first one without skip_bad."""
        for position, message in result.failures:
            self.unreadable += self._report_bad(message, sequence[position].repeated)
        return result.batch

    def accept_sample(self, item: SampleInfo | SkippedSample, repeated: bool = False) -> SampleInfo | None:
        """Counts skipped samples, but not again in later epochs; UserError for a bad one without skip_bad."""
        if isinstance(item, SkippedSample):
            if item.reason == "bad":
                self.skip_counts["bad"] += self._report_bad(item.message, repeated, self.bad_reported or self.rank > 0)
            elif not repeated:
                self.skip_counts[item.reason] += 1
            return None
        if item.shortened and not repeated:
            self.skip_counts["shortened"] += 1
        return replace(item, repeated=repeated) if repeated else item

    @property
    def counts(self) -> dict[str, int]:
        return add_bad(self.skip_counts, self.unreadable)

    def summary(self) -> str:
        """``2 bad, 1 dropped`` or ``nothing skipped``."""
        return ", ".join(f"{n} {reason}" for reason, n in sorted(self.counts.items())) or "nothing skipped"

    def _report_bad(self, message: str, repeated: bool, printed: bool = False) -> int:
        """Prints the message once; returns 1 if the sample has to be counted."""
        if not self.skip_bad:
            raise UserError(message)
        if not (repeated or printed):
            tqdm.write(f"skipped: {message}", file=sys.stderr)  # print would write into the progress bar
        return not repeated


def add_bad(counts: Mapping[str, int], bad: int) -> dict[str, int]:
    """``counts`` with ``bad`` added to the bad ones, and without zeros."""
    return {reason: n for reason, n in (Counter(counts) + Counter(bad=bad)).items() if n}
