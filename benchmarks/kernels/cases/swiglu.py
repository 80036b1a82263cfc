"""SwiGLU at the decoder's width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.swiglu import swiglu


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    T, C = (8, 64) if tiny else (16384, 17920)
    peers = {"torch": _torch, "torch.compile": torch.compile(reference.swiglu), "liger": _liger}

    def inputs(draw: Draw) -> tuple[Any, ...]:
        return (draw.normal(T, 2 * C, grad=True),)

    row = T * C * 2  # bytes of half the fused row in bf16
    goal = ("copy", 0.9)
    return [
        Case("swiglu", f"{T}x{C} forward", inputs, swiglu, peers, bytes=3 * row, goal=goal),
        # reads gate, up and the gradient, writes two
        Case("swiglu", f"{T}x{C} backward", inputs, swiglu, peers, bytes=5 * row, backward=True, goal=goal),
    ]


def _torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _liger(gate_up: Tensor) -> Tensor:
    """Takes the halves apart: of a fused row it copies them first."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))
