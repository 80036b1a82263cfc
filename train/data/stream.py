"""The samples of a run in their order, packed into steps; and the place to go on from, without what lies before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi4rv.errors import UserError
from train.data.corpus import Corpus
from train.data.flops import operations
from train.data.packing import fill_sequences
from train.data.reader import Planned

Position = dict[str, Any]  # of JSON's kinds


@dataclass(frozen=True)
class Step:
    """One global batch: full sequences, the operations of each, and where the next step's samples begin.

    number: from 1. skipped: what was left out since the run's beginning, as far as the lines tell.
    """

    number: int
    sequences: list[list[Planned]]
    costs: list[int]
    skipped: dict[str, int]
    position: Position

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[list[Planned]]:
        return iter(self.sequences)


class Stream:
    """The steps of a run. ``position``: a Step's, to go on behind it."""

    def __init__(self, corpus: Corpus, seed: int, position: Position | None = None):
        self.corpus, self.seed = corpus, seed
        sources = range(len(corpus.lines))
        start = position or {}
        records = [len(lines) for lines in corpus.lines]
        if start.get("records", records) != records:
            raise UserError(f"--resume: the data had {start['records']} records when the run was saved, not {records}")
        self.number: int = start.get("step", 0)
        # Of each source: epoch, lines of it that are done, conversations of the next line that are done.
        self.places: list[list[int]] = [list(place) for place in start.get("places", [[0, 0, 0] for _ in sources])]
        self.drawn: list[int] = list(start.get("drawn", [0 for _ in sources]))
        self.waiting = [self._again(*reference) for reference in start.get("waiting", [])]
        corpus.measured.clear()
        corpus.measured.update(start.get("skipped", {}))
        corpus.unreadable = start.get("unreadable", 0)

    def steps(self) -> Iterator[Step]:
        """Global batches: full sequences until they hold ``stage.global_batch`` samples or more, and are as many as
        ranks can share evenly (``stage.sequence_multiple``). ``max_steps`` of them, or as many as the epochs give, and
        then the last may be smaller.
        """
        stage, multiple = self.corpus.stage, self.corpus.stage.multiple()
        sequences: list[list[Planned]] = []
        if stage.max_steps and self.number >= stage.max_steps:
            return
        for sequence in fill_sequences(self.samples(), len, stage.sequence_length, self.waiting):
            sequences.append(sequence)
            if sum(map(len, sequences)) >= stage.global_batch and len(sequences) % multiple == 0:
                yield self._step(sequences)
                sequences = []
                if self.number == stage.max_steps:
                    return
        if sequences:
            yield self._step(sequences)

    def samples(self) -> Iterator[Planned]:
        """Of every source as many as its share says: the next is from the one that lags most behind its share."""
        shares = [source.share for source in self.corpus.sources]
        runs = [self.source(number) for number in range(len(shares))]
        while True:
            total = sum(self.drawn) + 1
            behind = [(share or 1.0) * total - drawn for share, drawn in zip(shares, self.drawn, strict=True)]
            number = behind.index(max(behind))
            planned = next(runs[number], None)
            if planned is None:
                return
            self.drawn[number] += 1
            yield planned

    def source(self, number: int) -> Iterator[Planned]:
        """Epoch after epoch of one source, from its place on; with ``max_steps`` without end."""
        corpus, place = self.corpus, self.places[number]
        while corpus.stage.max_steps or place[0] < corpus.stage.epochs:
            epoch, done = place[:2]
            found = any(place[1:])  # or so it was before a run stopped here
            order, lines = corpus.order(number, self.seed, epoch), corpus.lines[number]
            plans = corpus.plans(lines[int(index)] for index in order[done:])
            for index, items in zip(order[done:], plans, strict=False):
                for conversation in range(place[2], len(items)):
                    place[2] = conversation + 1
                    planned = corpus.accept(items[conversation], epoch > 0)
                    if planned:
                        found = True
                        yield replace(planned, ref=(number, int(index), conversation))
                place[1:] = place[1] + 1, 0
            if not found:
                raise UserError(
                    f"--sequence-length: none of the {len(lines)} records is usable within "
                    f"{corpus.stage.sequence_length} tokens ({corpus.summary()})"
                )
            place[:] = epoch + 1, 0, 0

    def _step(self, sequences: list[list[Planned]]) -> Step:
        self.number += 1
        waiting = [[*planned.ref, planned.again] for planned in self.waiting]
        skipped = dict(self.corpus.measured)
        position = {
            "step": self.number,
            "records": [len(lines) for lines in self.corpus.lines],
            "places": [list(place) for place in self.places],
            "drawn": list(self.drawn),
            "waiting": waiting,
            "skipped": skipped,
        }
        return Step(self.number, sequences, [self._cost(s) for s in sequences], skipped, position)

    def _cost(self, sequence: Sequence[Planned]) -> int:
        lengths, patches = [len(p) for p in sequence], [n for p in sequence for n in p.patches]
        labelled, stage = sum(p.labelled for p in sequence), self.corpus.stage
        return operations(self.corpus.processor.config, lengths, patches, labelled, stage.trains).total

    def _again(self, source: int, index: int, conversation: int, again: bool) -> Planned:
        """A sample that was waiting for a place in a sequence."""
        line = self.corpus.lines[source][index]
        planned = self.corpus.reader.plan(line)[conversation]
        if not isinstance(planned, Planned):
            raise UserError(f"--resume: {line.where} could be read when the run was saved, and now: {planned.message}")
        return replace(planned, ref=(source, index, conversation), again=again)


def run_steps(corpus: Corpus, seed: int, position: Position | None = None) -> Callable[[], Iterator[Step]]:
    """A source of the run's steps, endless or as long as the stage's epochs; each call begins anew at ``position``."""
    if len(corpus.sources) > 1 and not corpus.stage.max_steps:
        raise UserError("--max-steps: give the number of steps; the sources of a mixture end at different times")
    return lambda: Stream(corpus, seed, position).steps()


def count_steps(corpus: Corpus, seed: int) -> int:
    """How many steps the stage's epochs give: measures every record once, and tells what is bad."""
    try:
        steps = sum(1 for _ in run_steps(corpus, seed)())
    except BaseException:
        corpus.close()
        raise
    corpus.told = True
    return steps
