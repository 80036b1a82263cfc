"""Random access to the lines of JSON Lines files, by an index of eight bytes a line."""

from __future__ import annotations

import gzip
import os
import shutil
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi4rv.errors import UserError
from phi4rv.processing.index_cache import cached_index

INDEX_CACHE_MIN_BYTES = 64 << 20  # indexes of smaller files are not cached


@dataclass(frozen=True)
class Line:
    """A line of a JSON Lines file: ``size`` bytes from ``offset`` of ``path``. ``where``: ``file:number`` in errors."""

    file: Path
    path: Path  # where file's lines can be read: itself, or what a .gz was unpacked to
    offset: int
    size: int
    number: int

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"

    def read(self) -> bytes:
        """UserError if the file has gone, or has become shorter."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}; it was there at the start") from None
        if len(content) < self.size:
            raise UserError(f"{self.path}: has become shorter since the start; put the whole file back")
        return content.partition(b"\n")[0]


class JsonLines(Sequence[Line]):
    """The non-blank lines of ``files``, one file after another.

    ``cache``: a folder for unpacked files (see ``unpacked``) and indexes. UserError for a file that cannot be read to
    its end, or that has no line.
    """

    def __init__(self, files: Sequence[Path], cache: Path):
        self.files = [_IndexedFile(Path(file), unpacked(Path(file), cache), cache) for file in files]
        ends = [0]
        for indexed in self.files:
            ends.append(ends[-1] + len(indexed))
        self._first = ends

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Line:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._first, index) - 1
        return self.files[number].line(index - self._first[number])


class _IndexedFile:
    """One file's lines. The index of a large file is in ``cache``: memory-mapped, shared by all processes of a node."""

    def __init__(self, file: Path, path: Path, cache: Path):
        self.file, self.path = file, path
        try:
            self.size = path.stat().st_size
            large = self.size >= INDEX_CACHE_MIN_BYTES
            index = cached_index(path, cache, lambda: _build_index(path)) if large else _build_index(path)
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}; give a JSON Lines file") from None
        blank = int(index[0])
        self._blank, self._starts = index[1 : 1 + blank], index[1 + blank :]
        if not len(self):
            raise UserError(f"{file}: no records, it is empty; give at least one good JSON object on a line")

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, index: int) -> Line:
        start = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self) else self.size
        number = index + 1 + int(np.searchsorted(self._blank, index, "right"))
        return Line(self.file, self.path, start, end - start, number)


def _build_index(path: Path) -> np.ndarray:
    """uint64: the number of blank lines, for each of them how many others stand before it, where the others begin."""
    starts, blank, at = array("Q"), array("Q"), 0
    with open(path, "rb") as lines:
        for line in lines:
            if line.isspace():
                blank.append(len(starts))
            else:
                starts.append(at)
            at += len(line)
    return np.concatenate([np.array([len(blank)], np.uint64), np.array(blank), np.array(starts)]).astype(np.uint64)


def unpacked(file: Path, cache: Path) -> Path:
    """``file``, or for a ``.gz`` its unpacked copy in ``cache``, made if it is not there yet.

    A gzip stream has no random access. The copy's name has name, size and date of the ``.gz``: it is made once.
    """
    if file.suffix != ".gz":
        return file
    try:
        stat = file.stat()
        path = cache / f"{file.stem}-{zlib.crc32(bytes(file.resolve())):08x}-{stat.st_size}-{stat.st_mtime_ns}"
        if path.exists():
            return path
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            with gzip.open(file, "rb") as compressed, open(partial, "wb") as out:
                shutil.copyfileobj(compressed, out, 1 << 20)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: the gzip stream is broken ({error}); give a whole .gz file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be unpacked to {cache}: {error.strerror}") from None
    return path
