"""The one list of operations, their implementations, and which of them a model runs.

A new operation is a definition in ``reference.py``, an entry here, a kernel file, a row in the parity tests and a
row in the benchmarks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from phi4rv import reference
from phi4rv.errors import UserError

KERNELS = ("auto", "torch", "triton", "cuda")
VARIABLE = "PHI4RV_KERNELS"


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation. ``why_not(device)`` is None where it runs, else the reason."""

    function: Callable[..., Any]
    why_not: Callable[[torch.device], str | None] = lambda device: None


# Fastest first: ``auto`` takes the first that runs on the device.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    name: {"torch": Implementation(getattr(reference, name))}
    for name in (
        "packed_attention",
        "decode_attention",
        "rms_norm",
        "layer_norm",
        "rope",
        "swiglu",
        "gelu_tanh",
        "patch_embed",
        "projector",
        "scatter_rows",
        "linear_cross_entropy",
        "adamw",
    )
}


class Operations:
    """The chosen implementation of each operation, as attributes: ``ops.rms_norm(x, weight, eps)``.

    ``kernels``: ``auto`` (the fastest that runs here), or one kind for every operation; None reads PHI4RV_KERNELS
    and then means ``auto``. UserError if the kind asked for cannot run an operation, naming the reason.
    """

    packed_attention: Callable[..., Any]
    decode_attention: Callable[..., Any]
    rms_norm: Callable[..., Any]
    layer_norm: Callable[..., Any]
    rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    gelu_tanh: Callable[..., Any]
    patch_embed: Callable[..., Any]
    projector: Callable[..., Any]
    scatter_rows: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    adamw: Callable[..., Any]

    def __init__(self, kernels: str | None = None, device: torch.device | str = "cpu"):
        origin = "--kernels" if kernels else VARIABLE
        kernels = kernels or os.environ.get(VARIABLE) or "auto"
        if kernels not in KERNELS:
            raise UserError(f"{origin}: {kernels!r} is unknown, must be one of {', '.join(KERNELS)}")
        self.chosen: dict[str, str] = {}
        for name, kinds in IMPLEMENTATIONS.items():
            kind = _first_that_runs(kinds, torch.device(device)) if kernels == "auto" else kernels
            if kind not in kinds:
                raise UserError(f"{origin}: {name} has no {kind} implementation, only {', '.join(kinds)}")
            reason = kinds[kind].why_not(torch.device(device))
            if reason:
                raise UserError(f"{origin}: {name} cannot run as {kind} on {device}: {reason}")
            self.chosen[name] = kind
            setattr(self, name, kinds[kind].function)

    def __str__(self) -> str:
        """One line: which kind runs which operations."""
        kinds = dict.fromkeys(self.chosen.values())
        return "; ".join(f"{kind}: {', '.join(n for n, k in self.chosen.items() if k == kind)}" for kind in kinds)


def _first_that_runs(kinds: dict[str, Implementation], device: torch.device) -> str:
    return next(kind for kind, implementation in kinds.items() if implementation.why_not(device) is None)
