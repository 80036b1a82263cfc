"""Rotary embedding of the decoder's fused qkv row: 40 query, 10 key and 10 value heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.rope import rope


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    T, queries, keys, D = (8, 4, 2, 16) if tiny else (16384, 40, 10, 128)
    rotated, heads = queries + keys, queries + 2 * keys

    def inputs(draw: Draw) -> tuple[Any, ...]:
        angles = draw.normal(T, D // 2, dtype=torch.float32)
        return draw.normal(T, heads, D, grad=True), angles.cos(), angles.sin()

    def ours(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(qkv, cos, sin, rotated)

    def torch_eager(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return reference.rope(qkv, cos, sin, rotated)

    def liger(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates in place what it is given; of a fused row it copies q and k first. The values stay where they are."""
        from liger_kernel.ops.rope import LigerRopeFunction

        q, k = (x.transpose(0, 1)[None] for x in qkv[:, :rotated].split([queries, keys], 1))
        q, k, *_ = LigerRopeFunction.apply(q, k, cos.repeat(1, 2)[None], sin.repeat(1, 2)[None])
        return q, k

    peers = {"torch": torch_eager, "torch.compile": torch.compile(torch_eager), "liger": liger}
    row = T * heads * D * 2  # bytes of one bf16 tensor
    table = 2 * T * (D // 2) * 4
    shape, goal = f"{T}x{heads}x{D}", ("copy", 0.9)
    return [
        Case("rope", f"{shape} forward", inputs, ours, peers, bytes=2 * row + table, goal=goal),
        Case("rope", f"{shape} backward", inputs, ours, peers, bytes=2 * row + table, backward=True, goal=goal),
    ]
