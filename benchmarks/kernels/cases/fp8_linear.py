"""Products of the decoder's training step in fp8, rounding included, beside the library's in bfloat16."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.fp8_linear import fp8_linear

# (N, K): fused qkv, attention's output, fused gate and up, down.
SHAPES = [(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920)]


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    T, shapes = (32, [(48, 64)]) if tiny else (8192, SHAPES)
    return [case for N, K in shapes for case in _both(T, N, K)]


def _both(T: int, N: int, K: int) -> list[Case]:
    def inputs(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(T, K, grad=True), draw.normal(N, K, grad=True)

    # F.linear rounds nothing to fp8: its results differ by more than a comparison allows.
    peers, bounds = {"torch": reference.fp8_linear, "torch bf16": F.linear}, ("torch bf16",)
    moved, flops = 2 * (T * K + N * K + T * N), 2 * T * N * K
    shape = f"{T}x{K} to {N}"
    return [
        Case("fp8_linear", f"{shape} forward", inputs, fp8_linear, peers, moved, flops, bounds=bounds),
        Case(
            "fp8_linear",
            f"{shape} backward",
            inputs,
            fp8_linear,
            peers,
            2 * moved,
            2 * flops,
            backward=True,
            bounds=bounds,
        ),
    ]
