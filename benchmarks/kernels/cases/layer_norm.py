"""LayerNorm at the vision tower's width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.layer_norm import layer_norm

EPS = 1e-6


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    T, C = (8, 48) if tiny else (28800, 1152)
    peers = {
        "torch": lambda x, w, b: F.layer_norm(x, (C,), w, b, EPS),
        "torch.compile": torch.compile(lambda x, w, b: reference.layer_norm(x, w, b, EPS)),
        "liger": _liger,
    }

    def inputs(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(T, C, grad=True), draw.normal(C, grad=True), draw.normal(C, grad=True)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return layer_norm(x, w, b, EPS)

    row = T * C * 2  # bytes of one bf16 tensor
    goal = ("copy", 0.9)
    return [
        Case("layer_norm", f"{T}x{C} forward", inputs, ours, peers, bytes=2 * row, goal=goal),
        # reads x and the gradient, writes one
        Case("layer_norm", f"{T}x{C} backward", inputs, ours, peers, bytes=3 * row, backward=True, goal=goal),
    ]


def _liger(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, w, b, EPS)
