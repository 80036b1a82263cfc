"""From files to the packed sequences of each step, in an order that seed and step alone decide.

The lines are shuffled (``Lines`` knows where they lie), measured (``Reader.plan``), drawn from their sources by
weight, and packed into sequences (``fill_sequences``) until a step is full. Every rank makes the same steps and
loads its own share of each (``train/data/loader.py``). What a step holds depends on nothing but the data, the stage and
the seed: not on the ranks, the loader processes, or where a run was taken up again.
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
from train.data.line_index import Line, Lines
from train.data.mixture import Source
from train.data.reader import Loaded, Planned, Reader, Skipped
from train.data.workers import Workers
from train.recipe import Stage

CHUNK = 16  # lines that one worker measures at a time
Gather = Callable[[Any], list[Any]]  # what each rank hands in, on all of them


def alone(value: Any) -> list[Any]:
    return [value]


class Corpus:
    """The data of a run and the processes that read it.

    data: one source's files, or sources with shares. workers: loader processes, 0 for none. cache: a folder for
    unpacked ``.gz`` files and the indexes of archives; a temporary one without it. timeout: seconds an image may
    take in a worker. rank, gather: this process among those that share the measuring, each a part of the lines.

    ``counts``: records that were ``bad`` (only with skip_bad; otherwise the first stops the run), or ``dropped`` or
    ``shortened`` because they exceed the stage's sequence length. Each record counts once, whatever the epochs.
    """

    def __init__(
        self,
        data: Sequence[Path | Source],
        processor: Processor,
        stage: Stage,
        skip_bad: bool = False,
        workers: int = 0,
        cache: Path | None = None,
        timeout: float = 0.0,
        rank: int = 0,
        world: int = 1,
        gather: Gather = alone,
    ):
        self.stage, self.skip_bad, self.rank, self.world, self.gather = stage, skip_bad, rank, world, gather
        self.processor = processor
        if cache is None:
            self._temporary = TemporaryDirectory(prefix="phi4rv-")
            cache = Path(self._temporary.name)
        files = tuple(path for path in data if not isinstance(path, Source))
        self.sources = [s for s in data if isinstance(s, Source)] + ([Source(files)] if files else [])
        self.lines = [Lines(source.files, cache) for source in self.sources]
        self.reader = Reader(processor, stage, cache, timeout)
        self.workers = Workers(self.reader, workers)
        self.measured: Counter[str] = Counter()  # what was skipped or shortened for what its line said
        self.told = False  # whether somebody has read all lines already, and told what is bad
        self.unreadable = 0  # records that this rank found unreadable when it decoded their pictures

    def __len__(self) -> int:
        """Records: lines of all sources."""
        return sum(map(len, self.lines))

    def close(self) -> None:
        self.workers.close()

    def order(self, source: int, seed: int, epoch: int) -> Sequence[int]:
        """The lines of one source in one epoch: a function of these numbers, or as they are written."""
        count = len(self.lines[source])
        if self.stage.order == "file" and epoch == 0:
            return range(count)
        # Of the sum only 32 bits count.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch + source * 2_654_435_761)
        # As numpy's: iterating a tensor makes objects of all its elements at once.
        return torch.randperm(count, generator=generator).numpy()  # type: ignore[return-value]

    def plans(self, lines: Iterator[Line]) -> Iterator[list[Planned | Skipped]]:
        """What ``Reader.plan`` makes of each line, in order; measured ahead, and shared out among workers and ranks."""
        chunk = CHUNK if self.workers.count or self.world > 1 else 1
        chunks = iter(lambda: list(islice(lines, chunk)), [])
        rounds = iter(lambda: list(islice(chunks, self.world)), [])
        mine = (turn[self.rank] if self.rank < len(turn) else [] for turn in rounds)
        for _, made in self.workers.in_order("plan_all", mine, 2 * self.workers.count):
            for part in self.gather(made):
                yield from part

    def plan(self, line: Line) -> list[Planned]:
        """The usable conversations of one line, counted and checked as in a run."""
        return [planned for item in self.reader.plan(line) if (planned := self.accept(item))]

    def load(self, sequence: Sequence[Planned]) -> PackedBatch | None:
        """One packed row, read here and now; None if skip_bad left nothing of it."""
        return self.loaded(sequence, self.reader.load(sequence))

    def loaded(self, sequence: Sequence[Planned], result: Loaded) -> PackedBatch | None:
        """Counts what could not be read, or stops at it."""
        for place, message in result.failures:
            self.unreadable += self._bad(message, sequence[place].again)
        return result.batch

    def accept(self, item: Planned | Skipped, again: bool = False) -> Planned | None:
        """Counts what is skipped, unless it was counted in an earlier epoch; UserError for bad without skip_bad."""
        if isinstance(item, Skipped):
            if item.what == "bad":
                self.measured["bad"] += self._bad(item.message, again, self.told or self.rank > 0)
            elif not again:
                self.measured[item.what] += 1
            return None
        if item.shortened and not again:
            self.measured["shortened"] += 1
        return replace(item, again=again) if again else item

    @property
    def counts(self) -> dict[str, int]:
        return with_bad(self.measured, self.unreadable)

    def place(self, position: dict[str, Any]) -> dict[str, Any]:
        """A step's position with what this rank has found unreadable: what a run that goes on has to know."""
        return {**position, "unreadable": self.unreadable}

    def summary(self) -> str:
        """``2 bad, 1 dropped`` or ``nothing skipped``."""
        return ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items())) or "nothing skipped"

    def _bad(self, message: str, again: bool, told: bool = False) -> int:
        """1 if it is to be counted."""
        if not self.skip_bad:
            raise UserError(message)
        if not (again or told):
            tqdm.write(f"skipped: {message}", file=sys.stderr)  # print would write into the progress bar
        return not again


def with_bad(counts: Mapping[str, int], bad: int) -> dict[str, int]:
    """``counts`` with so many more bad ones, and without zeros."""
    return {what: n for what, n in (Counter(counts) + Counter(bad=bad)).items() if n}
