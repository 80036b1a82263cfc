"""GELU at the width of the vision tower's MLP, tanh and exact."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.gelu import gelu_erf, gelu_tanh


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    T, C = (8, 64) if tiny else (28800, 4304)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        return (draw.normal(T, C, grad=True),)

    row = T * C * 2  # bytes of one bf16 tensor
    kinds = {
        "tanh": (gelu_tanh, {"torch": lambda x: F.gelu(x, approximate="tanh")}, reference.gelu_tanh),
        "erf": (gelu_erf, {"torch": F.gelu}, reference.gelu_erf),
    }
    found = []
    for kind, (ours, peers, definition) in kinds.items():
        peers = {**peers, "torch.compile": torch.compile(definition)}
        for backward, tensors in ((False, 2), (True, 3)):
            shape = f"{kind} {T}x{C} {'backward' if backward else 'forward'}"
            found.append(
                Case("gelu", shape, inputs, ours, peers, bytes=tensors * row, backward=backward, goal=("copy", 0.9))
            )
    return found
