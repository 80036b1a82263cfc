"""Patch embedding of images as large as they come and of images of every size."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.patch_embed import patch_embed

LARGEST = [[60, 60]] * 8
# Sixteen grids between 256 and 3600 patches, upright and lying.
MIXED = [
    [16, 16], [60, 60], [20, 40], [45, 31], [32, 64], [52, 69], [18, 15], [24, 24],
    [48, 75], [64, 36], [30, 60], [13, 20], [58, 62], [40, 40], [37, 53], [27, 19],
]  # fmt: skip


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    if tiny:
        return _cases("2 images", [[3, 5], [4, 4]], 24, 32, 16)
    return _cases("8 images", LARGEST, 768, 1152, 256) + _cases("16 images", MIXED, 768, 1152, 256)


def _cases(name: str, grids: list[list[int]], K: int, C: int, N: int) -> list[Case]:
    P = sum(math.prod(grid) for grid in grids)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        weights = (draw.normal(*shape, grad=True) for shape in ((C, K), (C,), (N, C)))
        return draw.normal(P, K), *weights, draw.ints(grids)

    # torch.compile breaks the graph where the reference asks for the grids' numbers, and compiles the rest.
    peers = {"torch": reference.patch_embed, "torch.compile": torch.compile(reference.patch_embed)}
    read, parameters, written = P * K * 2, (C * K + C + N * C) * 2, P * C * 2
    flops = 2 * P * K * C
    sizes = f"{name}, {P} patches"
    return [
        Case("patch_embed", f"{sizes} forward", inputs, patch_embed, peers, read + parameters + written, flops),
        Case("patch_embed", f"{sizes} backward", inputs, patch_embed, peers, read + written + parameters, flops, True),
    ]
