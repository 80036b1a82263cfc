"""From JSONL files to the packed sequences of each step, in an order that seed and step alone decide."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from tqdm import tqdm

from phi4rv.answers import canonical_answer
from phi4rv.batch import PackedBatch, Sample, pack
from phi4rv.chat import IMAGE_MARK, Message
from phi4rv.errors import UserError
from phi4rv.images import image_size, open_image, patchify
from phi4rv.processor import Processor, with_patches
from train.packing import fill_sequences
from train.recipe import Stage
from train.records import Record, read_records


@dataclass(frozen=True)
class Planned:
    """A record as tokens; its pictures are measured but not yet decoded."""

    record: Record
    sample: Sample


class Corpus:
    """The records of ``files``, tokenized as they are asked for.

    ``counts``: how many records were ``bad`` (only with skip_bad; otherwise the first stops the run), ``dropped`` or
    ``shortened`` because they exceed the stage's sequence length. Each record counts once, whatever the epochs.
    """

    def __init__(self, files: Sequence[Path], processor: Processor, stage: Stage, skip_bad: bool = False):
        self.processor, self.stage, self.skip_bad = processor, stage, skip_bad
        self.counts: Counter[str] = Counter()
        self._counted: set[tuple[str, str]] = set()
        self.records = [r for file in files for r in read_records(file, None, skip_bad, self._on_bad)]

    def samples(self, seed: int) -> Iterator[Planned]:
        """Epoch after epoch, without end."""
        for epoch in count():
            yield from self.epoch(seed, epoch)

    def epoch(self, seed: int, epoch: int) -> Iterator[Planned]:
        """Every record once, in the stage's order; a shuffled one is a function of seed and epoch."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        found = False
        as_written = self.stage.order == "file" and epoch == 0
        order = range(len(self.records)) if as_written else torch.randperm(len(self.records), generator=generator)
        for index in map(int, order):
            planned = self.plan(self.records[index])
            if planned:
                found = True
                yield planned
        if not found:
            raise UserError(
                f"--sequence-length: none of the {len(self.records)} records is usable within "
                f"{self.stage.sequence_length} tokens ({self.summary()})"
            )

    def plan(self, record: Record) -> Planned | None:
        """The record's tokens, or None if it is bad or too long and the stage or skip_bad says to go on."""
        try:
            grids = [self.processor.grid(*image_size(path)) for path in record.images]
            turns = list(record.turns)
            sample = self._tokens(turns, grids)
            shortened = False
            longest, shorten = self.stage.sequence_length, self.stage.too_long == "shorten"
            while shorten and len(sample) > longest and _answers(turns) > 1:
                # A question goes with its answer and its images, whole: nothing is cut inside.
                del turns[-2:]
                grids = grids[: sum(turn.content.count(IMAGE_MARK) for turn in turns)]
                sample, shortened = self._tokens(turns, grids), True
        except UserError as error:
            self._bad(record, error)
            return None
        if len(sample) > self.stage.sequence_length:
            self._tally("dropped", record.where)
            return None
        if shortened:
            self._tally("shortened", record.where)
        return Planned(record, sample)

    def load(self, sequence: Sequence[Planned]) -> PackedBatch | None:
        """Decodes the pictures and packs. None if skip_bad left nothing of the sequence."""
        samples = []
        for planned in sequence:
            try:
                grids = planned.sample.grids.tolist()
                images = [open_image(path) for path in planned.record.images[: len(grids)]]
                samples.append(
                    with_patches(planned.sample, [patchify(i, *grid) for i, grid in zip(images, grids, strict=True)])
                )
            except UserError as error:
                self._bad(planned.record, error)
        return pack(samples) if samples else None

    def summary(self) -> str:
        """``2 bad, 1 dropped`` or ``nothing skipped``."""
        return ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items())) or "nothing skipped"

    def _tokens(self, turns: Sequence[Message], grids: Sequence[tuple[int, int]]) -> Sample:
        direct = self.processor.direct_token
        said = [Message(t.role, canonical_answer(t.content, direct)) if t.role == "assistant" else t for t in turns]
        return self.processor.tokens(said, grids, labelled=True)

    def _bad(self, record: Record, error: UserError) -> None:
        message = f"{record.where}: {error}"
        if not self.skip_bad:
            raise UserError(message) from None
        self._on_bad(message, record.where)

    def _on_bad(self, message: str, where: str | None = None) -> None:
        if self._tally("bad", where or message):
            tqdm.write(f"skipped: {message}", file=sys.stderr)  # print would write into the progress bar

    def _tally(self, what: str, where: str) -> bool:
        """Counts once per place; True the first time."""
        if (what, where) in self._counted:
            return False
        self._counted.add((what, where))
        self.counts[what] += 1
        return True


def _answers(turns: Sequence[Message]) -> int:
    return sum(turn.role == "assistant" for turn in turns)


Step = list[list[Planned]]


def steps(samples: Iterator[Planned], stage: Stage) -> Iterator[Step]:
    """Global batches: full sequences until they hold ``stage.global_batch`` samples or more."""
    step: Step = []
    for sequence in fill_sequences(samples, lambda planned: len(planned.sample), stage.sequence_length):
        step.append(sequence)
        if sum(map(len, step)) >= stage.global_batch:
            yield step
            step = []
    if step:
        yield step


def run_steps(corpus: Corpus, seed: int) -> Callable[[], Iterator[Step]]:
    """A source of the run's steps, endless or as long as the stage's epochs; each call begins anew."""
    stage = corpus.stage

    def begin() -> Iterator[Step]:
        if stage.max_steps:
            return islice(steps(corpus.samples(seed), stage), stage.max_steps)
        epochs = (planned for epoch in range(stage.epochs) for planned in corpus.epoch(seed, epoch))
        return steps(epochs, stage)

    return begin


Prepared = tuple[Step, list[PackedBatch], dict[str, int]]


def prefetch(source: Iterator[Step], corpus: Corpus, rank: int, world: int) -> Iterator[Prepared]:
    """Each step, one ahead of its use, on a thread: this rank's share of it decoded, and the corpus's counts."""

    def share(step: Step) -> Prepared:
        batches = [corpus.load(sequence) for sequence in step[rank::world]]
        return step, [batch for batch in batches if batch is not None], dict(corpus.counts)

    def following() -> Prepared | None:
        step = next(source, None)
        return None if step is None else share(step)

    # One compute thread in here: a second OpenMP team that spins would halve the speed of a CPU's training step.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = pool.submit(following)
        while (ready := ahead.result()) is not None:
            ahead = pool.submit(following)
            yield ready
