"""``--data``: files, folders and patterns, with weights where they are a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from phi4rv.errors import UserError

EXTENSIONS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class DataSource:
    """Files that are read as one, and their share of the samples; None where there is only one source."""

    files: tuple[Path, ...]
    share: float | None = None


def parse_sources(arguments: Sequence[str | Path]) -> list[DataSource]:
    """``a.jsonl b.jsonl``: one source. ``a.jsonl=0.2 'web/*.jsonl=0.8'``: one source each, sampled in these
    proportions. A folder stands for the ``.jsonl`` and ``.jsonl.gz`` files below it. UserError naming the argument.
    """
    parsed = [_split_weight(str(argument)) for argument in arguments]
    weights = [weight for _, weight in parsed if weight is not None]
    if not weights:
        return [DataSource(tuple(file for name, _ in parsed for file in _expand(name)))]
    for name, weight in parsed:
        if weight is None:
            raise UserError(f"--data: {name} has no weight and others have; write {name}=WEIGHT")
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"--data: the weight of {name} is {weight}, it must be a number above 0")
    return [DataSource(tuple(_expand(name)), weight / sum(weights)) for name, weight in parsed if weight is not None]


def _split_weight(argument: str) -> tuple[str, float | None]:
    """The name and its weight; a file whose own name contains ``=`` is taken as it is."""
    name, sign, weight = argument.rpartition("=")
    if not sign or not name or Path(argument).exists():
        return argument, None
    try:
        return name, float(weight)
    except ValueError:
        raise UserError(f"--data: {argument}: {weight!r} is not a weight; write FILE=0.2") from None


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(EXTENSIONS) and p.is_file())
        if not found:
            raise UserError(f"--data: {name} cannot be read as data: no {' or '.join(EXTENSIONS)} file in the folder")
        return found
    if has_magic(name) and not path.exists():
        found = sorted(Path(p) for p in glob(name, recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"--data: no file matches {name}")
        return found
    return [path]  # JsonLines raises if it cannot be read
