"""RMSNorm with the residual addition at the decoder's width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.rms_norm import rms_norm

EPS = 1e-5


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    T, C = (8, 64) if tiny else (16384, 5120)
    peers = {
        "torch": _torch,
        "torch.compile": torch.compile(lambda x, r, w: reference.rms_norm(x, w, EPS, r)),
        "liger": _liger,
    }

    def inputs(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(T, C, grad=True), draw.normal(T, C, grad=True), draw.normal(C, grad=True)

    def ours(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, w, EPS, r)

    row = T * C * 2  # bytes of one bf16 tensor
    goal = ("copy", 0.9)
    return [
        Case("rms_norm", f"{T}x{C} forward", inputs, ours, peers, bytes=4 * row, goal=goal),
        # reads the sum and both gradients, writes one: x and the residual share theirs
        Case("rms_norm", f"{T}x{C} backward", inputs, ours, peers, bytes=4 * row, backward=True, goal=goal),
    ]


def _torch(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x + r
    return F.rms_norm(s, s.shape[-1:], w, EPS), s


def _liger(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    normed, summed = LigerFusedAddRMSNormFunction.apply(x, r, w, EPS)
    return normed, summed
