"""RMSNorm fused with the residual addition, forward and backward (Zhang & Sennrich 2019).

Memory-bound: the forward pass reads x and the residual and writes their sum and the normed row, the backward pass
reads two or three rows and writes one. A program holds a whole row in registers, so nothing is read twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.launch import check, check_float, flatten_to_2d, num_sms
from triton_kernels.common.tuning import SearchSpace

FORWARD = SearchSpace("rms_norm.forward", {"row": [{"num_warps": 8}, {"num_warps": 4}, {"num_warps": 16}]})
BACKWARD = SearchSpace("rms_norm.backward", {"row": [{"num_warps": 8}, {"num_warps": 16}]})


@triton.jit
def _forward_kernel(
    x, residual, weight, normed, summed, rstd, eps, x_stride, residual_stride, C,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    s = tl.load(x + row * x_stride + cols, mask=inside, other=0.0)
    if RESIDUAL:
        s += tl.load(residual + row * residual_stride + cols, mask=inside, other=0.0)
        tl.store(summed + row * C + cols, s, mask=inside)
    s = s.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(s * s, 0) / C + eps)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * C + cols, (s * r * w).to(normed.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def _backward_kernel(
    dnormed, dsummed, summed, weight, rstd, dx, dweight, dnormed_stride, dsummed_stride, summed_stride, T, C,
    DSUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # so that the loop's row is 64 bits wide
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, T, tl.num_programs(0)):
        s = tl.load(summed + row * summed_stride + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dnormed + row * dnormed_stride + cols, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        unit = s * r
        dw += dy * unit
        dy *= w
        ds = (dy - unit * (tl.sum(dy * unit, 0) / C)) * r
        if DSUMMED:
            ds += tl.load(dsummed + row * dsummed_stride + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * C + cols, ds.to(dx.dtype.element_ty), mask=inside)
    # Each program's own row, summed in a fixed order afterwards: no atomics, the same bits every time.
    tl.store(dweight + program * C + cols, dw, mask=inside)


def launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    """normed, rstd (rows,) float32, and x + residual if there is a residual; see ``rms_norm``."""
    check_float(x, "rms_norm: x")
    check(weight.shape == x.shape[-1:], f"rms_norm: weight is {tuple(weight.shape)}, must be {tuple(x.shape[-1:])}")
    same = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    check(same, f"rms_norm: residual must have the shape and dtype of x, {tuple(x.shape)} {x.dtype}")
    C = x.shape[-1]
    flat = flatten_to_2d(x)
    added = flat if residual is None else flatten_to_2d(residual)
    normed = x.new_empty(x.shape)
    summed = normed if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty(len(flat), dtype=torch.float32)
    if len(flat):
        with torch.cuda.device_of(x):
            _forward_kernel[(len(flat),)](
                flat, added, weight.contiguous(), normed, summed, rstd, eps, flat.stride(0), added.stride(0), C,
                RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(C), **FORWARD.pick("row", x.device),
            )  # fmt: skip
    return [normed, rstd] if residual is None else [normed, rstd, summed]


def launch_backward(
    dnormed: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the residual, the same) and of the weight."""
    C = summed.shape[-1]
    dy, s = flatten_to_2d(dnormed), flatten_to_2d(summed)
    ds = dy if dsummed is None else flatten_to_2d(dsummed)
    dx = summed.new_empty(summed.shape)
    programs = min(len(s), 2 * num_sms(s.device))
    partial = weight.new_empty((programs, C), dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(s):
            _backward_kernel[(programs,)](
                dy, ds, s, weight.contiguous(), rstd, dx, partial, dy.stride(0), ds.stride(0), s.stride(0), len(s), C,
                DSUMMED=dsummed is not None, BLOCK=triton.next_power_of_2(C), **BACKWARD.pick("row", s.device),
            )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


forward = torch.library.custom_op("phi4rv_triton::rms_norm", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::rms_norm_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> list[Tensor]:
    outs = [x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)]
    return outs if residual is None else [*outs, x.new_empty(x.shape)]


@backward.register_fake
def _(dnormed: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return summed.new_empty(summed.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, weight, _ = inputs
    ctx.save_for_backward(x if residual is None else output[2], weight, output[1])
    ctx.residual = residual is not None


def _autograd_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor, Tensor | None, Tensor, None]:
    summed, weight, rstd = ctx.saved_tensors
    dnormed = summed.new_zeros(summed.shape) if grads[0] is None else grads[0]
    dx, dweight = backward(dnormed, grads[2] if ctx.residual else None, summed, weight, rstd)
    return dx, dx if ctx.residual else None, dweight, None


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = x + residual; s / sqrt(mean(s²) + eps) · weight, over the last dimension. Returns (normed, s).

    x and residual (…, C) of one dtype, weight (C,). ValueError for anything else.
    """
    outs = forward(x, residual, weight, eps)
    return outs[0], x if residual is None else outs[2]
