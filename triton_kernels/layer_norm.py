"""LayerNorm, forward and backward (Ba et al. 2016).

Memory-bound: the forward pass reads and writes one row, the backward pass reads two and writes one. A program holds
whole rows in registers, so nothing is read twice and the variance is that of centred values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.launch import check, check_float, flatten_to_2d, num_sms
from triton_kernels.common.tuning import SearchSpace

# Rows of the vision tower take few registers: several at once keep more loads in flight. The forward pass synchronises
# no warps where one holds the row.
NARROW = 2048
FORWARD = SearchSpace(
    "layer_norm.forward",
    {
        "narrow": [
            {"ROWS": 1, "num_warps": 1},
            {"ROWS": 1, "num_warps": 2},
            {"ROWS": 2, "num_warps": 4},
            {"ROWS": 1, "num_warps": 4},
            {"ROWS": 4, "num_warps": 8},
        ],
        "wide": [{"ROWS": 1, "num_warps": 8}, {"ROWS": 1, "num_warps": 4}, {"ROWS": 1, "num_warps": 16}],
    },
)
# PROGRAMS: how many a multiprocessor; each keeps its own weight and bias gradient.
BACKWARD = SearchSpace(
    "layer_norm.backward",
    {
        "narrow": [
            {"ROWS": 2, "PROGRAMS": 4, "num_warps": 4},
            {"ROWS": 1, "PROGRAMS": 5, "num_warps": 4},
            {"ROWS": 1, "PROGRAMS": 8, "num_warps": 1},
            {"ROWS": 1, "PROGRAMS": 6, "num_warps": 2},
            {"ROWS": 4, "PROGRAMS": 2, "num_warps": 8},
            {"ROWS": 2, "PROGRAMS": 3, "num_warps": 8},
        ],
        "wide": [{"ROWS": 1, "PROGRAMS": 2, "num_warps": 8}, {"ROWS": 1, "PROGRAMS": 1, "num_warps": 16}],
    },
)
REDUCE = SearchSpace(
    "layer_norm.finish",
    {
        "columns": [
            {"BLOCK_P": 256, "BLOCK_C": 16, "num_warps": 8},
            {"BLOCK_P": 128, "BLOCK_C": 32, "num_warps": 8},
            {"BLOCK_P": 128, "BLOCK_C": 16, "num_warps": 4},
        ]
    },
)


@triton.jit
def _forward_kernel(
    x, weight, bias, y, mean, rstd, eps, x_stride, T, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    real, inside = row < T, cols < C
    both = real[:, None] & inside
    v = tl.load(x + row[:, None] * x_stride + cols, mask=both, other=0.0).to(tl.float32)
    m = tl.sum(v, 1) / C
    v = tl.where(inside, v - m[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / C + eps)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * C + cols, (v * r[:, None] * w + b).to(y.dtype.element_ty), mask=both)
    tl.store(mean + row, m, mask=real)
    tl.store(rstd + row, r, mask=real)


@triton.jit
def _backward_kernel(
    dy, x, weight, mean, rstd, dx, partial, dy_stride, x_stride, T,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for first in range(program * ROWS, T, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        real = row < T
        both = real[:, None] & inside[None, :]
        v = tl.load(x + row[:, None] * x_stride + cols[None, :], mask=both, other=0.0).to(tl.float32)
        g = tl.load(dy + row[:, None] * dy_stride + cols[None, :], mask=both, other=0.0).to(tl.float32)
        m = tl.load(mean + row, mask=real, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=real, other=0.0)[:, None]
        # Beyond the row's end this is not 0, but the gradient that multiplies it is.
        unit = (v - m) * r
        dw += tl.sum(g * unit, 0)
        db += tl.sum(g, 0)
        g *= w
        along, level = tl.sum(g * unit, 1) / C, tl.sum(g, 1) / C
        ds = (g - level[:, None] - unit * along[:, None]) * r
        tl.store(dx + row[:, None] * C + cols[None, :], ds.to(dx.dtype.element_ty), mask=both)
    partial += program * (2 * C)
    tl.store(partial + cols, dw, mask=inside)
    tl.store(partial + C + cols, db, mask=inside)


@triton.jit
def _reduce_kernel(partial, dweight, dbias, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    which = tl.program_id(1)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)
        mask = (row < P)[:, None] & inside[None, :]
        total += tl.load(partial + (row[:, None] * 2 + which) * C + cols[None, :], mask=mask, other=0.0)
    out = dweight if which == 0 else dbias
    tl.store(out + cols, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
    """normed, mean and 1 / standard deviation, each of these (rows,) float32; see ``layer_norm``."""
    check_float(x, "layer_norm: x")
    for name, given in {"weight": weight, "bias": bias}.items():
        check(given.shape == x.shape[-1:], f"layer_norm: {name} is {tuple(given.shape)}, must be {(*x.shape[-1:],)}")
    C = x.shape[-1]
    flat = flatten_to_2d(x)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(len(flat), dtype=torch.float32) for _ in range(2))
    if len(flat):
        config = FORWARD.pick(_case(C), x.device)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(len(flat), config["ROWS"]),)](
                flat, weight.contiguous(), bias.contiguous(), y, mean, rstd, eps, flat.stride(0), len(flat), C,
                BLOCK=triton.next_power_of_2(C), **config,
            )  # fmt: skip
    return [y, mean, rstd]


def launch_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    C = x.shape[-1]
    flat, grad = flatten_to_2d(x), flatten_to_2d(dy)
    dx = x.new_empty(x.shape)
    config = dict(BACKWARD.pick(_case(C), x.device))
    most = config.pop("PROGRAMS") * num_sms(x.device)
    programs = min(triton.cdiv(len(flat), config["ROWS"]), most)
    # A row for each program, summed in a fixed order afterwards: no atomics, the same bits every time.
    partial = x.new_empty((programs, 2, C), dtype=torch.float32)
    dweight, dbias = weight.new_empty(C), weight.new_empty(C)
    with torch.cuda.device_of(x):
        if programs:
            _backward_kernel[(programs,)](
                grad, flat, weight.contiguous(), mean, rstd, dx, partial, grad.stride(0), flat.stride(0), len(flat),
                C=C, BLOCK=triton.next_power_of_2(C), **config,
            )  # fmt: skip
        finish = REDUCE.pick("columns", x.device)
        _reduce_kernel[(triton.cdiv(C, finish["BLOCK_C"]), 2)](partial, dweight, dbias, programs, C=C, **finish)
    return dx, dweight, dbias


def _case(C: int) -> str:
    return "narrow" if C <= NARROW else "wide"


forward = torch.library.custom_op("phi4rv_triton::layer_norm", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::layer_norm_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> list[Tensor]:
    count = x.shape[:-1].numel()
    return [x.new_empty(x.shape), *(x.new_empty(count, dtype=torch.float32) for _ in range(2))]


@backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])


def _autograd_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, None]:
    return *backward(grads[0], *ctx.saved_tensors), None


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias, over the last dimension.

    x (…, C) float32, float16 or bfloat16, weight and bias (C,) of one dtype. ValueError for anything else.
    """
    return forward(x, weight, bias, eps)[0]
