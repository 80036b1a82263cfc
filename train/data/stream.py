"""The samples of a run in order, packed into global batches; resumed at a saved position without reading what precedes
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi4rv.errors import UserError
from train.data.flops import flops
from train.data.packed_dataset import PackedDataset
from train.data.packing import pack_sequences
from train.data.reader import SampleInfo

Position = dict[str, Any]  # plain JSON; its keys are part of the saved format


@dataclass(frozen=True)
class GlobalBatch:
    """The packed sequences of one optimizer step, the FLOPs of each, and the position where the next step begins.

    step: from 1. skipped: counts of what measuring has left out since the beginning of the run.
    """

    step: int
    sequences: list[list[SampleInfo]]
    row_flops: list[int]
    skipped: dict[str, int]
    position: Position

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[list[SampleInfo]]:
        return iter(self.sequences)


class StepStream:
    """The global batches of a run. ``position``: that of a ``GlobalBatch``, to continue after it."""

    def __init__(self, dataset: PackedDataset, seed: int, position: Position | None = None):
        self.dataset, self.seed = dataset, seed
        sources = range(len(dataset.lines))
        start = position or {}
        records = [len(lines) for lines in dataset.lines]
        if start.get("records", records) != records:
            raise UserError(f"--resume: the data had {start['records']} records when the run was saved, not {records}")
        self.step: int = start.get("step", 0)
        # Of each source: epoch, lines of it that are done, conversations of the next line that are done.
        self.cursors: list[list[int]] = [list(cursor) for cursor in start.get("places", [[0, 0, 0] for _ in sources])]
        self.drawn: list[int] = list(start.get("drawn", [0 for _ in sources]))
        self.buffer = [self._restore(*reference) for reference in start.get("waiting", [])]
        dataset.skip_counts.clear()
        dataset.skip_counts.update(start.get("skipped", {}))
        dataset.unreadable = start.get("unreadable", 0)

    def steps(self) -> Iterator[GlobalBatch]:
        """Each holds full sequences of at least ``stage.global_batch`` samples in all, their number a multiple of
        ``stage.multiple()``, so that ranks get equal shares. ``max_steps`` of them, or as many as the epochs give; then
        the last one may be smaller.
        """
        stage, multiple = self.dataset.stage, self.dataset.stage.multiple()
        sequences: list[list[SampleInfo]] = []
        if stage.max_steps and self.step >= stage.max_steps:
            return
        for sequence in pack_sequences(self.samples(), len, stage.sequence_length, self.buffer):
            sequences.append(sequence)
            if sum(map(len, sequences)) >= stage.global_batch and len(sequences) % multiple == 0:
                yield self._global_batch(sequences)
                sequences = []
                if self.step == stage.max_steps:
                    return
        if sequences:
            yield self._global_batch(sequences)

    def samples(self) -> Iterator[SampleInfo]:
        """Samples of all sources by their shares: the next one is from the source furthest behind its share."""
        shares = [source.share for source in self.dataset.sources]
        streams = [self.source_samples(number) for number in range(len(shares))]
        while True:
            total = sum(self.drawn) + 1
            lag = [(share or 1.0) * total - drawn for share, drawn in zip(shares, self.drawn, strict=True)]
            number = lag.index(max(lag))
            info = next(streams[number], None)
            if info is None:
                return
            self.drawn[number] += 1
            yield info

    def source_samples(self, number: int) -> Iterator[SampleInfo]:
        """Epoch after epoch of one source, from its cursor on; endless with ``max_steps``."""
        dataset, cursor = self.dataset, self.cursors[number]
        while dataset.stage.max_steps or cursor[0] < dataset.stage.epochs:
            epoch, done = cursor[:2]
            found = any(cursor[1:])  # a resumed run had found some
            order, lines = dataset.epoch_order(number, self.seed, epoch), dataset.lines[number]
            measured = dataset.measure_lines(lines[int(index)] for index in order[done:])
            for index, items in zip(order[done:], measured, strict=False):
                for conversation in range(cursor[2], len(items)):
                    cursor[2] = conversation + 1
                    info = dataset.accept_sample(items[conversation], epoch > 0)
                    if info:
                        found = True
                        yield replace(info, ref=(number, int(index), conversation))
                cursor[1:] = cursor[1] + 1, 0
            if not found:
                raise UserError(
                    f"--sequence-length: none of the {len(lines)} records is usable within "
                    f"{dataset.stage.sequence_length} tokens ({dataset.summary()})"
                )
            cursor[:] = epoch + 1, 0, 0

    def _global_batch(self, sequences: list[list[SampleInfo]]) -> GlobalBatch:
        self.step += 1
        buffer = [[*info.ref, info.repeated] for info in self.buffer]
        skipped = dict(self.dataset.skip_counts)
        position = {
            "step": self.step,
            "records": [len(lines) for lines in self.dataset.lines],
            "places": [list(cursor) for cursor in self.cursors],
            "drawn": list(self.drawn),
            "waiting": buffer,
            "skipped": skipped,
        }
        return GlobalBatch(self.step, sequences, [self._row_flops(s) for s in sequences], skipped, position)

    def _row_flops(self, sequence: Sequence[SampleInfo]) -> int:
        lengths, patches = [len(p) for p in sequence], [n for p in sequence for n in p.patches]
        labelled, stage = sum(p.labelled for p in sequence), self.dataset.stage
        return flops(self.dataset.processor.config, lengths, patches, labelled, stage.trains).total

    def _restore(self, source: int, index: int, conversation: int, repeated: bool) -> SampleInfo:
        """A sample that was in the packing buffer."""
        line = self.dataset.lines[source][index]
        info = self.dataset.reader.measure(line)[conversation]
        if not isinstance(info, SampleInfo):
            raise UserError(f"--resume: {line.where} could be read when the run was saved, but now: {info.message}")
        return replace(info, ref=(source, index, conversation), repeated=repeated)


def global_batches(
    dataset: PackedDataset, seed: int, position: Position | None = None
) -> Callable[[], Iterator[GlobalBatch]]:
    """Makes iterators over the run's global batches, each from ``position`` on; endless with ``stage.max_steps``."""
    if len(dataset.sources) > 1 and not dataset.stage.max_steps:
        raise UserError("--max-steps: give the number of steps; the sources of a mixture end at different times")
    return lambda: StepStream(dataset, seed, position).steps()


def count_steps(dataset: PackedDataset, seed: int) -> int:
    """Number of steps in the stage's epochs: measures every record once, and reports the bad ones."""
    try:
        steps = sum(1 for _ in global_batches(dataset, seed)())
    except BaseException:
        dataset.close()
        raise
    dataset.bad_reported = True
    return steps
