"""Indexes of large files, made once: kept in a folder, where other processes and later runs find and map them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np


def cached_index(file: Path, cache: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """``make()``, the index of ``file``, or what an earlier call left of it in ``cache``; read-only, mapped.

    Name, place, size and date of the file are in the index's name. A full disk is an OSError and ends the run: it is
    no fault of the record that asks.
    """
    stat = file.stat()
    location = hashlib.blake2b(bytes(file.resolve()), digest_size=8).hexdigest()
    path = cache / f"{file.name}-{location}-{stat.st_size}-{stat.st_mtime_ns}.npy"
    if not path.exists():
        _save(path, make())
    return np.load(path, mmap_mode="r")


def _save(path: Path, index: np.ndarray) -> None:
    """Whole or not there; of several processes that build it at once the first one wins: others may have it mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{uuid4().hex}")  # process numbers repeat from node to node
    try:
        with open(partial, "wb") as out:
            np.save(out, index)
        with suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
