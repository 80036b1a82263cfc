"""Which tile sizes, warps and pipeline stages a kernel runs with.

Each kernel names the configurations that it may be given, by case (a head dim, say), in a ``SearchSpace``. What
``python -m benchmarks.tune`` measured to be fastest stands in ``tuned.json`` by device; on a device that is not in it
the first candidate runs. So a first call never tunes, and tests can go through every candidate.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch

# Keyword arguments of a launch: tile sizes, num_warps, num_stages.
Config = dict[str, int]
TABLE = Path(__file__).parents[1] / "tuned.json"


def make_configs(names: Sequence[str], *rows: Sequence[int]) -> list[Config]:
    """Configurations with the same keyword arguments, a row of numbers each."""
    return [dict(zip(names, row, strict=True)) for row in rows]


class SearchSpace:
    """One kernel's candidates. ``name``: ``file.kernel``; ``cases``: case -> candidates, the default first."""

    all: ClassVar[list[SearchSpace]] = []
    # (name, case) of every pick so far: tells tuning what a function runs.
    picked: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, name: str, cases: dict[str, Sequence[Config]]):
        self.name, self.cases = name, cases
        self._forced: Config | None = None
        SearchSpace.all.append(self)

    def pick(self, case: str, device: torch.device) -> Config:
        """The configuration for ``case`` on ``device``."""
        SearchSpace.picked.add((self.name, case))
        if self._forced is not None and self._forced in self.cases[case]:
            return self._forced
        measured = _tuned_configs().get(_device_name(device), {}).get(self.name, {}).get(case)
        return measured or self.cases[case][0]

    @contextmanager
    def forced(self, config: Config) -> Iterator[None]:
        """Inside the block this kernel gets ``config`` in every case that lists it: for tests and tuning."""
        self._forced = config
        try:
            yield
        finally:
            self._forced = None


@functools.lru_cache
def _tuned_configs() -> dict[str, dict[str, dict[str, Config]]]:
    return json.loads(TABLE.read_text())


@functools.lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
