"""Image files, and image files inside tar archives: ``shard-0001.tar/name.png`` is read without unpacking."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np

from phi4rv.errors import UserError
from phi4rv.processing.index_cache import cached_index

MAX_OPEN_INDEXES = 256  # archives whose index a process keeps mapped


class ImageFiles:
    """Reads images by path. The index of an archive, 24 bytes a member, is built at its first use and kept in the
    folder ``cache``, where other processes and later runs find it; without one it stays in memory.
    """

    def __init__(self, cache: Path | None = None):
        self.cache = cache
        self._indexes: OrderedDict[Path, np.ndarray] = OrderedDict()

    def check(self, path: Path) -> None:
        """UserError if there is no such file, or no such member."""
        if os.path.isfile(path):
            return
        archive, member = split_archive_path(path)
        if archive is None:
            raise UserError(f"no image file at {str(path)!r}; correct 'image' or the image root")
        if self._find(archive, member) is None:
            raise UserError(f"no image file {member!r} in the archive {str(archive)!r}; correct 'image'")

    def source(self, path: Path) -> Path | bytes:
        """What ``open_image`` and ``image_size`` take: the path, or the bytes of the archive's member."""
        archive, member = split_archive_path(path)
        if archive is None:
            return path
        found = self._find(archive, member)
        if found is None:
            raise UserError(f"{path}: no such file in the archive")
        offset, size = found
        try:
            with open(archive, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f"{archive}: cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise UserError(f"{path}: the archive ends before this file does; give the whole archive")
        return content

    def _find(self, archive: Path, member: str) -> tuple[int, int] | None:
        """Offset and size of a member's bytes."""
        index = self._index(archive)
        row = int(np.searchsorted(index[:, 0], _key(member)))
        if row == len(index) or index[row, 0] != _key(member):
            return None
        return int(index[row, 1]), int(index[row, 2])

    def _index(self, archive: Path) -> np.ndarray:
        """(N, 3) uint64, sorted: hash of the member's name, offset, size."""
        if archive in self._indexes:
            self._indexes.move_to_end(archive)
            return self._indexes[archive]
        index = (
            _build_index(archive)
            if self.cache is None
            else cached_index(archive, self.cache, lambda: _build_index(archive))
        )
        self._indexes[archive] = index
        if len(self._indexes) > MAX_OPEN_INDEXES:
            self._indexes.popitem(last=False)
        return index


def split_archive_path(path: Path) -> tuple[Path | None, str]:
    """(archive, member) of ``….tar/member`` where that archive is a file; else (None, "")."""
    for parent in path.parents:
        if parent.suffix == ".tar" and os.path.isfile(parent):
            return parent, path.relative_to(parent).as_posix()
    return None, ""


def _key(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def _build_index(archive: Path) -> np.ndarray:
    rows: dict[np.uint64, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as members:
            for member in members:
                if member.isfile() and not member.issparse():
                    rows[_key(member.name.removeprefix("./"))] = (member.offset_data, member.size)  # the last of a name
                members.members.clear()  # type: ignore[attr-defined]  # else it remembers every one
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive}: not a whole, uncompressed tar archive ({error})") from None
    except OSError as error:
        raise UserError(f"{archive}: cannot be read: {error.strerror}") from None
    index = np.array([(key, *place) for key, place in rows.items()], np.uint64).reshape(-1, 3)
    return index[np.argsort(index[:, 0])]
