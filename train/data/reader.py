"""What loader processes do: measure the samples of a line, and load measured samples as a packed row with images."""

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
class SampleInfo:
    """One conversation, measured: what packing has to know. Its text and images stay on the disk until ``load_row``.

    conversation: its number in the line; turns: how many of its turns are kept; length: tokens, images included;
    patches: of each image; labelled: tokens with a target; reasoning: whether the first answer begins with a thought.
    """

    line: Line
    conversation: int
    turns: int
    length: int
    grids: tuple[tuple[int, int], ...]
    labelled: int
    reasoning: bool
    shortened: bool = False
    ref: tuple[int, int, int] = (0, 0, 0)  # source, line, conversation
    repeated: bool = False  # seen, and counted, in an earlier epoch

    @property
    def where(self) -> str:
        return self.line.where

    @property
    def patches(self) -> list[int]:
        return [rows * cols for rows, cols in self.grids]

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is left out: ``bad`` with the error, or ``dropped`` because it is too long."""

    reason: str
    message: str


@dataclass(frozen=True)
class LoadedRow:
    """A packed row, None if nothing of it could be read; ``failures``: position in the sequence, and the error."""

    batch: PackedBatch | None
    failures: list[tuple[int, str]]


@dataclass
class Reader:
    """``timeout``: seconds that one image may take to read and decode in a worker process; 0 for no limit.

    Stateless: every result depends on the line and the files alone.
    """

    processor: Processor
    stage: Stage
    cache: Path | None = None
    timeout: float = 0.0
    files: ImageFiles = field(init=False)

    def __post_init__(self) -> None:
        self.files = ImageFiles(self.cache)

    def measure_lines(self, lines: Sequence[Line]) -> list[list[SampleInfo | SkippedSample]]:
        return [self.measure(line) for line in lines]

    def measure(self, line: Line) -> list[SampleInfo | SkippedSample]:
        """Each conversation of the line; one ``SkippedSample`` if the whole line is bad."""
        content = line.read()
        try:
            records = parse_line(content, line.where, line.file.parent, self.files)
        except UserError as error:
            return [SkippedSample("bad", str(error))]
        return [self._measure(line, number, record) for number, record in enumerate(records)]

    def _measure(self, line: Line, number: int, record: Record) -> SampleInfo | SkippedSample:
        try:
            grids = [self._grid(path) for path in record.images]
            turns = len(record.turns)
            sample = self._tokenize(record.turns, grids)
            longest, shorten = self.stage.sequence_length, self.stage.too_long == "shorten"
            while shorten and len(sample) > longest and _count_answers(record.turns[:turns]) > 1:
                # Whole turns go: a question with its answer and its images.
                turns -= 2
                sample = self._tokenize(record.turns[:turns], grids)
        except UserError as error:
            return SkippedSample("bad", f"{record.where}: {error}")
        if len(sample) > longest:
            return SkippedSample("dropped", record.where)
        return SampleInfo(
            line=line,
            conversation=number,
            turns=turns,
            length=len(sample),
            grids=tuple((rows, cols) for rows, cols in sample.grids.tolist()),
            labelled=_count_targets(sample),
            reasoning=next(t.content for t in record.turns if t.role == "assistant").lstrip().startswith(THINK),
            shortened=turns < len(record.turns),
        )

    def _grid(self, path: Path) -> tuple[int, int]:
        with time_limit(self.timeout, str(path)):
            return self.processor.grid(*image_size(self.files.source(path), str(path)))

    def load_row(self, sequence: Sequence[SampleInfo]) -> LoadedRow:
        """Decodes the images and packs the row; a sample that cannot be read is left out."""
        samples, failures = [], []
        for position, info in enumerate(sequence):
            content = info.line.read()  # raises: a missing data file is not a bad record
            try:
                samples.append(self._load_sample(info, content))
            except UserError as error:
                failures.append((position, f"{info.where}: {error}"))
        return LoadedRow(pack(samples) if samples else None, failures)

    def _load_sample(self, info: SampleInfo, content: bytes) -> Sample:
        try:
            records = parse_line(content, info.where, info.line.file.parent, self.files)
        except UserError as error:
            raise UserError(str(error).removeprefix(f"{info.where}: ")) from None
        record = records[info.conversation]
        sample = self._tokenize(record.turns[: info.turns], list(info.grids))
        patches = []
        for path, grid in zip(record.images, info.grids, strict=False):  # shortening may leave the last ones out
            with time_limit(self.timeout, str(path)):
                patches.append(patchify(open_image(self.files.source(path), str(path)), *grid))
        return with_patches(sample, patches)

    def _tokenize(self, turns: Sequence[Message], grids: Sequence[tuple[int, int]]) -> Sample:
        direct = self.processor.nothink_token
        messages = [Message(t.role, canonical_answer(t.content, direct)) if t.role == "assistant" else t for t in turns]
        used_grids = grids[: sum(turn.content.count(IMAGE_TOKEN) for turn in turns)]
        return self.processor.tokens(messages, used_grids, labelled=True)


def _count_answers(turns: Sequence[Message]) -> int:
    return sum(turn.role == "assistant" for turn in turns)


def _count_targets(sample: Sample) -> int:
    """How many tokens have a target; the first token of a document is never one."""
    assert sample.labels is not None
    return int((sample.labels[1:] != NO_LABEL).sum())


class _ImageTimeout(BaseException):
    """A BaseException, as the image readers turn every Exception into an error of their own."""


@contextmanager
def time_limit(seconds: float, name: str) -> Iterator[None]:
    """UserError if the block takes longer. Uses SIGALRM: no limit outside of a process's main thread."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    running = True

    def on_alarm(signal_number: int, frame: FrameType | None) -> None:
        if running:
            raise _ImageTimeout

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            running = False  # an alarm before this line is caught below, one after it does nothing
    except _ImageTimeout:
        raise UserError(f"{name}: not read within {seconds:g} s; check its disk, or raise --image-timeout") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
