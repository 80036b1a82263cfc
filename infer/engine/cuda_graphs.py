"""CUDA graphs of a step, one for each shape of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class CudaGraphs:
    """``run(key, step)`` is ``step()``: run eagerly the first time, which compiles its kernels and warms libraries up,
    captured the second time and then, as ever after, replayed.

    A step reads and writes the same tensors each time. All graphs share one memory pool: a result is valid until the
    next run of any key, and whatever reads it is launched before that. Without ``enabled`` every run is eager.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self._warm: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def warmed_up(self, key: Hashable) -> bool:
        """Whether a run of ``key`` takes the time that later ones will take."""
        return key in (self._captured if self.enabled else self._warm)

    def run(self, key: Hashable, step: Callable[[], T]) -> T:
        if not self.enabled or key not in self._warm:
            self._warm.add(key)
            return step()
        if key not in self._captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = step()
            self._pool = self._pool or graph.pool()
            self._captured[key] = graph, result
        graph, captured = self._captured[key]
        graph.replay()
        return captured
