"""Activation checkpointing: a layer's intermediate results are thrown away and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

CHECKPOINTING = ("none", "full")
# run(function, *arguments) -> function(*arguments), keeping what the backward pass needs or computing it again.
Run = Callable[..., Any]


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Keeps ``arguments`` alone (Chen et al. 2016). Nothing in the model is random, so no random state is kept."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
