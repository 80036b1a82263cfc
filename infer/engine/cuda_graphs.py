"""CUDA graphs of a step, one for each shape of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Graphs:
    """``run(key, step)`` is ``step()``: the first time as it is, which compiles its kernels and warms libraries up, the
    second time recorded and then, as ever after, replayed. A step reads and writes the same tensors each time. All
    share memory: a result lasts until the next run of any key, and what reads it is launched before that. Without
    ``enabled`` it is always run as it is.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self._warm: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def settled(self, key: Hashable) -> bool:
        """Whether a run of ``key`` is what later ones will be."""
        return key in (self._recorded if self.enabled else self._warm)

    def run(self, key: Hashable, step: Callable[[], T]) -> T:
        if not self.enabled or key not in self._warm:
            self._warm.add(key)
            return step()
        if key not in self._recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = step()
            self._pool = self._pool or graph.pool()
            self._recorded[key] = graph, result
        graph, recorded = self._recorded[key]
        graph.replay()
        return recorded
