"""The decoder's products with a quantised weight: 1 row (decoding one sequence), and 8 and 64 in two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from phi4rv.ops.low_precision import FORMATS, GROUP_SIZE, QuantizedWeight
from triton_kernels.quantized_linear import quantized_linear

# (N, K): fused qkv, attention's output, fused gate and up, down, head.
SHAPES = [(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920), (200064, 5120)]


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    one, few = ([(48, 256)], [(48, 256)]) if tiny else (SHAPES, [SHAPES[0], SHAPES[3]])
    return [
        _case(format, rows, N, K)
        for rows, shapes in ((1, one), (8, few), (64, few))
        for format in FORMATS
        for N, K in shapes
    ]


def _case(format: str, rows: int, N: int, K: int) -> Case:
    groups = -(-K // GROUP_SIZE)
    int4 = format.startswith("int4")
    weight = N * groups * (GROUP_SIZE // 2 + 2 + (format == "int4_zero")) if int4 else N * K + 4 * N

    def inputs(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(rows, K), _random(draw, format, N, K), _Lazy(draw, N, K)

    return Case(
        "quantized_linear",
        f"{format} {rows}x{K} to {N}",
        inputs,
        lambda x, q, _: quantized_linear(x, q),
        _peers(format, rows),
        bytes=weight + 2 * rows * (N + K),
        flops=2 * rows * N * K,
        goal=("copy", 0.75) if rows == 1 else None,
    )


def _random(draw: Draw, format: str, N: int, K: int) -> QuantizedWeight:
    """Any bytes and scales: what they mean does not change the time."""
    groups = -(-K // GROUP_SIZE)
    if not format.startswith("int4"):
        typed = torch.int8 if format == "int8" else torch.float8_e4m3fn
        return QuantizedWeight(
            format, draw.normal(N, K // 2, dtype=torch.bfloat16).view(typed), draw.normal(N, dtype=torch.float32),
            None, (N, K),
        )  # fmt: skip
    data = draw.normal(N, groups * GROUP_SIZE // 4, dtype=torch.bfloat16).view(torch.uint8)
    zeros = draw.normal(N, groups, dtype=torch.bfloat16).to(torch.uint8) if format == "int4_zero" else None
    return QuantizedWeight(format, data, draw.normal(N, groups, dtype=torch.bfloat16), zeros, (N, K))


class _Lazy:
    """The peers' own forms of a weight, made when first asked for and kept: packing is not timed."""

    def __init__(self, draw: Draw, N: int, K: int):
        self.shape, self.draw = (N, K), draw
        self.made: dict[str, Any] = {}

    def get(self, form: str, make: Callable[[Tensor], Any]) -> Any:
        if form not in self.made:
            self.made[form] = make(self.draw.normal(*self.shape, dtype=torch.bfloat16) / self.shape[1])
        return self.made[form]


def _peers(format: str, rows: int) -> dict[str, Callable[..., Any]]:
    peers: dict[str, Callable[..., Any]] = {"torch bf16": _bf16}
    if rows == 1:  # more shapes would take long to compile
        compiled = torch.compile(reference.quantized_linear)
        peers["torch.compile"] = lambda x, q, _: compiled(x, q)
    if format == "int8":
        return peers | {"torch int8": _int8pack}
    if format == "int4_zero":
        return peers | {"torch int4": _int4pack}
    if format == "fp8":
        return peers | {"torch fp8 x fp8": _scaled}
    return peers


def _bf16(x: Tensor, q: QuantizedWeight, weights: _Lazy) -> Tensor:
    return F.linear(x, weights.get("bf16", lambda w: w))


def _int8pack(x: Tensor, q: QuantizedWeight, weights: _Lazy) -> Tensor:
    return torch._weight_int8pack_mm(x, q.data, weights.get("scales", lambda w: q.scales.to(x.dtype)))


def _int4pack(x: Tensor, q: QuantizedWeight, weights: _Lazy) -> Tensor:
    """tinygemm, as torchao's int4 weight-only layers call it."""

    def pack(w: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch._convert_weight_to_int4pack(q.data, 8)
        scales_and_zeros = torch.stack([q.scales, torch.zeros_like(q.scales)], -1).transpose(0, 1).contiguous()
        return packed, scales_and_zeros

    packed, scales_and_zeros = weights.get("int4", pack)
    return torch._weight_int4pack_mm(x, packed, GROUP_SIZE, scales_and_zeros)


def _scaled(x: Tensor, q: QuantizedWeight, weights: _Lazy) -> Tensor:
    """The library's product, whose rows are quantised too (not timed)."""
    one = weights.get("one", lambda w: torch.ones(x.shape[0], 1, device=x.device))
    rows = weights.get("x", lambda w: x.to(torch.float8_e4m3fn))
    return torch._scaled_mm(rows, q.data.t(), one, q.scales[None], out_dtype=x.dtype)
