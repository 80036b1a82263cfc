"""Folders that exist completely or not at all: written beside their path, then renamed to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from phi4rv.errors import UserError


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``; on exit, fsyncs it and renames it to ``path``.

    An older ``path`` is replaced only then. If anything fails, nothing of the new folder stays and the older one is
    untouched; an OSError becomes a UserError naming ``path``.
    """
    path = path.resolve()  # of a link, its target is replaced
    if not path.name or (path.exists() and not path.is_dir()):
        raise UserError(f"{path}: is not a folder that can be replaced")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        fsync_folder(partial)
        replace_folder(partial, path)
        fsync_folder(path.parent, deep=False)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be written ({reason}); nothing of it was left behind") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(new: Path, path: Path) -> None:
    """Renames ``new`` to ``path``; a folder that was there goes only after the new one is in place."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def fsync_folder(folder: Path, deep: bool = True) -> None:
    """Fsyncs the folder's entries and, with ``deep``, everything in it."""
    for file in folder.rglob("*") if deep else ():
        _fsync(file)
    _fsync(folder)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
