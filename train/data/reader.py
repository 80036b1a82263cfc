"""From a line to its tokens, and from planned samples to a packed row with decoded pictures: what workers do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from phi4rv.batch import NO_LABEL, PackedBatch, Sample, pack
from phi4rv.errors import UserError
from phi4rv.processing.answers import canonical_answer
from phi4rv.processing.chat_template import IMAGE_TOKEN, THINK, Message
from phi4rv.processing.image_files import ImageFiles
from phi4rv.processing.images import image_size, open_image, patchify
from phi4rv.processing.processor import Processor, with_patches
from phi4rv.processing.records import Record, parse_line
from train.data.line_index import Line
from train.recipe import Stage


@dataclass(frozen=True)
class Planned:
    """One conversation, measured: what packing has to know. Its text and pictures stay on the disk till ``load``.

    conversation: which of its line's; turns: how many of its turns are kept; length: tokens, images included;
    patches: of each image; labelled: tokens with a target; thinking: whether the first answer begins with a thought.
    ``ref`` says where in the run's sources it comes from.
    """

    line: Line
    conversation: int
    turns: int
    length: int
    grids: tuple[tuple[int, int], ...]
    labelled: int
    thinking: bool
    shortened: bool = False
    ref: tuple[int, int, int] = (0, 0, 0)  # source, line, conversation
    again: bool = False  # seen in an earlier epoch: counted then

    @property
    def where(self) -> str:
        return self.line.where

    @property
    def patches(self) -> list[int]:
        return [rows * cols for rows, cols in self.grids]

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class Skipped:
    """What is left out: ``bad`` with its message, or ``dropped`` because it is too long."""

    what: str
    message: str


@dataclass(frozen=True)
class Loaded:
    """A packed row, None if nothing of it could be read; ``failures``: place in the sequence, and what is wrong."""

    batch: PackedBatch | None
    failures: list[tuple[int, str]]


@dataclass
class Reader:
    """``timeout``: seconds that one image may take to read and decode, in a worker process; 0 for any time.

    Everything here is a function of the line alone (and of the disk it lies on): no order, no counts, no chance.
    """

    processor: Processor
    stage: Stage
    cache: Path | None = None
    timeout: float = 0.0
    files: ImageFiles = field(init=False)

    def __post_init__(self) -> None:
        self.files = ImageFiles(self.cache)

    def plan_all(self, lines: Sequence[Line]) -> list[list[Planned | Skipped]]:
        return [self.plan(line) for line in lines]

    def plan(self, line: Line) -> list[Planned | Skipped]:
        """Each conversation of the line; one Skipped if the line is bad as a whole."""
        content = line.read()
        try:
            records = parse_line(content, line.where, line.file.parent, self.files)
        except UserError as error:
            return [Skipped("bad", str(error))]
        return [self._plan(line, number, record) for number, record in enumerate(records)]

    def _plan(self, line: Line, number: int, record: Record) -> Planned | Skipped:
        try:
            grids = [self._grid(path) for path in record.images]
            kept = len(record.turns)
            sample = self._tokens(record.turns, grids)
            longest, shorten = self.stage.sequence_length, self.stage.too_long == "shorten"
            while shorten and len(sample) > longest and _answers(record.turns[:kept]) > 1:
                # A question goes with its answer and its images, whole: nothing is cut inside.
                kept -= 2
                sample = self._tokens(record.turns[:kept], grids)
        except UserError as error:
            return Skipped("bad", f"{record.where}: {error}")
        if len(sample) > longest:
            return Skipped("dropped", record.where)
        return Planned(
            line=line,
            conversation=number,
            turns=kept,
            length=len(sample),
            grids=tuple((rows, cols) for rows, cols in sample.grids.tolist()),
            labelled=_targets(sample),
            thinking=next(t.content for t in record.turns if t.role == "assistant").lstrip().startswith(THINK),
            shortened=kept < len(record.turns),
        )

    def _grid(self, path: Path) -> tuple[int, int]:
        with time_limit(self.timeout, str(path)):
            return self.processor.grid(*image_size(self.files.source(path), str(path)))

    def load(self, sequence: Sequence[Planned]) -> Loaded:
        """Decodes the pictures and packs; a sample that cannot be read is left out."""
        samples, failures = [], []
        for place, planned in enumerate(sequence):
            content = planned.line.read()  # a data file that has gone is nobody's bad record
            try:
                samples.append(self._load(planned, content))
            except UserError as error:
                failures.append((place, f"{planned.where}: {error}"))
        return Loaded(pack(samples) if samples else None, failures)

    def _load(self, planned: Planned, content: bytes) -> Sample:
        try:
            records = parse_line(content, planned.where, planned.line.file.parent, self.files)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{planned.where}: ")) from None
        record = records[planned.conversation]
        sample = self._tokens(record.turns[: planned.turns], list(planned.grids))
        patches = []
        for path, grid in zip(record.images, planned.grids, strict=False):  # shortening may leave the last ones out
            with time_limit(self.timeout, str(path)):
                patches.append(patchify(open_image(self.files.source(path), str(path)), *grid))
        return with_patches(sample, patches)

    def _tokens(self, turns: Sequence[Message], grids: Sequence[tuple[int, int]]) -> Sample:
        direct = self.processor.nothink_token
        said = [Message(t.role, canonical_answer(t.content, direct)) if t.role == "assistant" else t for t in turns]
        shown = grids[: sum(turn.content.count(IMAGE_TOKEN) for turn in turns)]
        return self.processor.tokens(said, shown, labelled=True)


def _answers(turns: Sequence[Message]) -> int:
    return sum(turn.role == "assistant" for turn in turns)


def _targets(sample: Sample) -> int:
    """How many tokens have a target; the first token of a document is nobody's."""
    assert sample.labels is not None
    return int((sample.labels[1:] != NO_LABEL).sum())


class _TooSlow(BaseException):
    """Not an Exception: the image readers turn every one of those into their own message."""


@contextmanager
def time_limit(seconds: float, name: str) -> Iterator[None]:
    """UserError if the block takes longer. By a signal, so only in a process's main thread; elsewhere no limit."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    running = True

    def ring(signal_number: int, frame: FrameType | None) -> None:
        if running:
            raise _TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            running = False  # what rings before this line is caught below, what rings after it is nothing
    except _TooSlow:
        raise UserError(f"{name}: not read within {seconds:g} s; see to its disk, or raise --image-timeout") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
