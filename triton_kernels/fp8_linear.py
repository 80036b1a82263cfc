"""A linear layer that trains with products in fp8: rows are rounded here, the library multiplies.

``torch._scaled_mm`` with a scale for each row of both operands (on sm_90 CUTLASS's kernel, which writes bfloat16).
Which product is in fp8 is torchao's recipe ``rowwise_with_gw_hp``: the output and x's gradient, and not the weight's
gradient, whose sum over tokens is where rounding hurts. Unlike there the rounded weight of the forward pass also
serves x's gradient: its scales are multiplied into the incoming gradient before that is rounded.

Rounding is memory-bound: a row is read twice, the second time from the cache, and half as many bytes are written. It
is done on the bits: GPUs before sm_89 have no e4m3, and Triton's interpreter loses the carry into its exponent.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4rv.ops.low_precision import FP8_MAX, MIN_SCALE
from triton_kernels.common.launch import check, check_float, flatten_to_2d
from triton_kernels.common.tuning import SearchSpace

ROW = SearchSpace(
    "fp8_linear.row",
    {
        "row": [
            {"BLOCK": 4096, "num_warps": 8},
            {"BLOCK": 2048, "num_warps": 4},
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 8192, "num_warps": 8},
        ]
    },
)
LARGEST, MIN_NORMAL = tl.constexpr(FP8_MAX), tl.constexpr(MIN_SCALE)


@triton.jit
def _e4m3(v):
    """The codes (int32) of float32 values of at most 448, to nearest, ties to even."""
    raw = v.to(tl.int32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    # Three bits of mantissa stay, and a carry goes into the exponent, whose bias is 7 and not 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ codes are multiples of 2⁻⁹, which the sum with 1.5 · 2²³ rounds to.
    small = (tl.abs(v) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return tl.where(v == v, code, 0x7F) | ((raw >> 24) & 0x80)


@triton.jit
def _quantize_rows_kernel(x, by, data, scales, stride, C, BY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    data += row * C
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v = tl.load(x + cols, mask=cols < C, other=0.0).to(tl.float32)
        if BY:
            v *= tl.load(by + cols, mask=cols < C, other=0.0)
        top = tl.maximum(top, tl.where(v == v, tl.abs(v), float("inf")))  # NaN, as infinity, makes the row NaN
    scale = tl.div_rn(tl.max(top, 0), LARGEST)
    inverse = tl.where(scale >= MIN_NORMAL, tl.div_rn(1.0, scale), 0.0)
    for start in range(0, C, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        v = tl.load(x + cols, mask=cols < C, other=0.0).to(tl.float32)
        if BY:
            v *= tl.load(by + cols, mask=cols < C, other=0.0)
        v *= inverse
        v = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))  # NaN stays
        tl.store(data + cols, _e4m3(v).to(tl.uint8), mask=cols < C)
    tl.store(scales + row, scale)


def launch(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``quantize_rows``."""
    check_float(x, "quantize_rows: x")
    right = by is None or (by.shape == x.shape[-1:] and by.dtype == torch.float32)
    check(right, f"quantize_rows: by must be float32 {tuple(x.shape[-1:])}")
    flat = flatten_to_2d(x)
    data = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.zeros(len(flat), dtype=torch.float32, device=x.device)
    if flat.numel():
        config = ROW.pick("row", x.device)
        with torch.cuda.device_of(x):
            _quantize_rows_kernel[(len(flat),)](
                flat, flat if by is None else by.contiguous(), data.view(torch.uint8), scales,
                flat.stride(0), flat.shape[1], BY=by is not None, **config,
            )  # fmt: skip
    return data.view(x.shape), scales.view(x.shape[:-1])


operator = torch.library.custom_op("phi4rv_triton::quantize_rows", launch, mutates_args=())


@operator.register_fake
def _(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor]:
    data = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return data, x.new_empty(x.shape[:-1], dtype=torch.float32)


def quantize_rows(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (…, C) · by (C,) -> values in float8_e4m3fn (…, C) and float32 scales (…): scale · value. No gradient.

    x float32, float16 or bfloat16, by float32; ValueError for anything else.
    """
    return operator(x.detach(), by)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        (a, a_scales), (b, b_scales) = quantize_rows(x), quantize_rows(weight)
        # Sums in fewer bits, as torchao has it for the output alone.
        return torch._scaled_mm(
            a, b.t(), a_scales[:, None], b_scales[None], out_dtype=x.dtype, use_fast_accum=True
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            b, b_scales = quantize_rows(weight)  # again: kept, it would be half of a weight's memory in every layer
            a, a_scales = quantize_rows(grad, b_scales)
            columns = b.t().contiguous().t()  # the library wants them adjacent
            ones = b_scales.new_ones(1, weight.shape[1])
            dx = torch._scaled_mm(a, columns, a_scales[:, None], ones, out_dtype=x.dtype)
        if ctx.needs_input_grad[1]:
            dw = torch.mm(grad.t(), x)
        return dx, dw


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K) · weightᵀ (N, K) -> (T, N); see ``reference.fp8_linear``.

    On a GPU both bfloat16; K and N multiples of 16. ValueError for anything else.
    """
    check(x.ndim == 2 and weight.ndim == 2 and x.shape[1] == weight.shape[1], "fp8_linear: x (T, K), weight (N, K)")
    check(x.dtype == weight.dtype, f"fp8_linear: x is {x.dtype}, weight {weight.dtype}, must be the same")
    check(not x.is_cuda or x.dtype == torch.bfloat16, f"fp8_linear: x is {x.dtype}, must be bfloat16")
    check(not any(n % 16 for n in weight.shape), f"fp8_linear: {tuple(weight.shape)} must be multiples of 16")
    return _Fp8Linear.apply(x, weight)
