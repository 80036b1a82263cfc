"""The projector from image features to token embeddings, and its rows' way into the token sequence (LLaVA's
mlp2x_gelu, Liu et al. 2024).

Two products, the first finished with bias and exact GELU, the second with bias and, in ``project_into``, each row
written straight to its place. Neither the activation nor what it is of is kept for the backward pass: one more product
makes both again, as the activation and its slope. The backward pass's products that need no finishing (the gradients
of weights and of x) are torch.mm, cuBLAS's: a kernel of ours would do the same work no faster.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4rv.ops.low_precision import QuantizedWeight, fake_quantize_float8
from phi4rv.ops.projector_gradient import (
    project_into_backward,
    projector_backward,
    save_project_into,
    save_projector,
)
from triton_kernels.common.gemm import gemm
from triton_kernels.common.launch import check, check_float, flatten_to_2d
from triton_kernels.common.tuning import Config, SearchSpace
from triton_kernels.gelu import gelu_erf
from triton_kernels.quantized_linear import quantized_linear


def _config(M: int, N: int, K: int, num_warps: int, num_stages: int, persistent: int, tma: int) -> Config:
    tile = {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K, "GROUP_M": 8}
    return {**tile, "PERSISTENT": persistent, "TMA": tma, "num_warps": num_warps, "num_stages": num_stages}


_TMA = [_config(128, 256, 64, 8, 3, 1, 1), _config(128, 256, 64, 8, 4, 0, 1), _config(128, 128, 64, 8, 3, 0, 1)]
_LOADS = [_config(128, 256, 64, 8, 3, 0, 0), _config(128, 128, 64, 8, 3, 0, 0)]
GEMM = SearchSpace(
    "projector.gemm",
    {
        "gelu": _TMA + _LOADS,
        "linear": _TMA + _LOADS,
        "gelu and slope": [_TMA[0], _TMA[2], _LOADS[1]],  # the others spill
        "times slope": _TMA + _LOADS,
        "float32": [_config(64, 64, 32, 4, 2, 0, 0), _config(64, 64, 32, 8, 2, 0, 0)],
    },
)
SCATTER = SearchSpace("projector.place", {"row": [{"num_warps": 8}, {"num_warps": 4}]})


@triton.jit
def _invert_kernel(index, position, P, T, BLOCK: tl.constexpr):
    """position[index[p]] = p."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(index + p, mask=p < P, other=0)
    tl.device_assert((t >= 0) & (t < T), "index outside the row")
    tl.store(position + t, p, mask=p < P)


@triton.jit
def _scatter_kernel(
    row, values, position, out, row_stride, values_stride, C, COVERED: tl.constexpr, BLOCK: tl.constexpr
):
    """Copies the rows that have no position. The others become their value, zero, or stay for another to write."""
    t = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    p = tl.load(position + t).to(tl.int64)
    if p < 0:
        kept = tl.load(row + t * row_stride + cols, mask=inside)
        tl.store(out + t * C + cols, kept, mask=inside)
    elif COVERED == "value":
        value = tl.load(values + p * values_stride + cols, mask=inside)
        tl.store(out + t * C + cols, value.to(out.dtype.element_ty), mask=inside)
    elif COVERED == "zero":
        tl.store(out + t * C + cols, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)


def _gemm(a: Tensor, b: Tensor, out: Tensor, epilogue: str, **rest: Tensor | None) -> Tensor:
    case = "float32" if a.dtype == torch.float32 else epilogue
    return gemm(a, b, out, GEMM.pick(case, a.device), epilogue=epilogue, **rest)


def _check(name: str, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> None:
    check_float(x, f"{name}: x")
    check(x.ndim == 2, f"{name}: x has {x.ndim} dimensions, must have 2")
    same = all(w.dtype == x.dtype for w in (w0, b0, w1, b1))
    check(same, f"{name}: weights and biases must be {x.dtype}, as x is")
    check(w0.ndim == 2 and w1.ndim == 2, f"{name}: w0 and w1 must have 2 dimensions")
    (H, C0), (C, H1) = w0.shape, w1.shape
    check(x.shape[1] == C0, f"{name}: w0 is {tuple(w0.shape)}, must be (…, {x.shape[1]})")
    check(H1 == H, f"{name}: w1 is {tuple(w1.shape)}, must be (…, {H})")
    check(b0.shape == (H,), f"{name}: b0 is {tuple(b0.shape)}, must be ({H},)")
    check(b1.shape == (C,), f"{name}: b1 is {tuple(b1.shape)}, must be ({C},)")


def _check_index(name: str, row: Tensor, index: Tensor, P: int, C: int) -> None:
    check_float(row, f"{name}: row")
    check(row.ndim == 2 and row.shape[1] == C, f"{name}: row is {tuple(row.shape)}, must be (T, {C})")
    check(index.shape == (P,), f"{name}: index is {tuple(index.shape)}, must be ({P},)")
    check(index.dtype == torch.int64, f"{name}: index is {index.dtype}, must be int64")


def _scatter(row: Tensor, index: Tensor, covered: str, values: Tensor | None = None) -> Tensor:
    """A contiguous copy of row, its rows in index as ``covered`` says; see ``_scatter_kernel``."""
    T, C = row.shape
    out = row.new_empty((T, C))
    if not T or not C:
        return out
    row = flatten_to_2d(row)
    values = row if values is None else flatten_to_2d(values)
    position = row.new_full((T,), -1, dtype=torch.int32)
    with torch.cuda.device_of(row):
        if len(index):
            grid = (triton.cdiv(len(index), 1024),)
            _invert_kernel[grid](index.contiguous(), position, len(index), T, BLOCK=1024)
        _scatter_kernel[(T,)](
            row, values, position, out, row.stride(0), values.stride(0), C,
            COVERED=covered, BLOCK=triton.next_power_of_2(C), **SCATTER.pick("row", row.device),
        )  # fmt: skip
    return out


def _activation(x: Tensor, w0: Tensor, b0: Tensor) -> Tensor:
    return _gemm(x, w0, x.new_empty((len(x), len(w0))), "gelu", bias=b0.contiguous())


def launch_forward(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """See ``projector``."""
    _check("projector", x, w0, b0, w1, b1)
    h = _activation(flatten_to_2d(x), w0, b0)
    return _gemm(h, w1, x.new_empty((len(x), len(w1))), "linear", bias=b1.contiguous())


def launch_into(row: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, index: Tensor) -> Tensor:
    """See ``project_into``."""
    _check("project_into", x, w0, b0, w1, b1)
    _check_index("project_into", row, index, len(x), len(w1))
    out = _scatter(row, index, "elsewhere")
    h = _activation(flatten_to_2d(x), w0, b0)
    return _gemm(h, w1, out, "linear", bias=b1.contiguous(), index=index.contiguous())


def launch_backward(dy: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, wanted: list[bool]) -> list[Tensor]:
    """Those gradients of x, w0, b0, w1, b1 that are wanted, in this order."""
    check_float(x, "projector's gradient: x")
    of_x, of_w0, of_b0, of_w1, of_b1 = wanted
    dy, x = flatten_to_2d(dy), flatten_to_2d(x)
    h, slope = (x.new_empty((len(x), len(w0))) for _ in range(2))
    if any(wanted[:4]):
        _gemm(x, w0, h, "gelu and slope", bias=b0.contiguous(), slope=slope)
    dw1 = [torch.mm(dy.T, h)] if of_w1 else []
    del h
    # Where the slope was there is the gradient before the activation now.
    dpre = _gemm(dy, w1.T, slope, "times slope", slope=slope) if any(wanted[:3]) else slope
    dx = [torch.mm(dpre, w0)] if of_x else []
    dw0 = [torch.mm(dpre.T, x)] if of_w0 else []
    db0 = [dpre.sum(0)] if of_b0 else []
    db1 = [dy.sum(0)] if of_b1 else []
    return dx + dw0 + db0 + dw1 + db1


def launch_scatter(row: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """See ``scatter_rows``."""
    check(values.ndim == 2, f"scatter_rows: values has {values.ndim} dimensions, must have 2")
    check_float(values, "scatter_rows: values")
    _check_index("scatter_rows", row, index, *values.shape)
    return _scatter(row, index, "value", values)


def launch_clear(row: Tensor, index: Tensor) -> Tensor:
    """A copy of row (T, C), its rows in index zero."""
    return _scatter(row, index, "zero")


forward = torch.library.custom_op("phi4rv_triton::projector", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::projector_backward", launch_backward, mutates_args=())
into = torch.library.custom_op("phi4rv_triton::project_into", launch_into, mutates_args=())
scatter = torch.library.custom_op("phi4rv_triton::scatter_rows", launch_scatter, mutates_args=())
clear = torch.library.custom_op("phi4rv_triton::clear_rows", launch_clear, mutates_args=())


@forward.register_fake
def _(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return x.new_empty((len(x), len(w1)))


@backward.register_fake
def _(dy: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, wanted: list[bool]) -> list[Tensor]:
    shapes = [x.shape, w0.shape, b0.shape, w1.shape, w1.shape[:1]]
    return [x.new_empty(shape) for shape, of in zip(shapes, wanted, strict=True) if of]


@into.register_fake
def _(row: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, index: Tensor) -> Tensor:
    return row.new_empty(row.shape)


@scatter.register_fake
def _(row: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return row.new_empty(row.shape)


@clear.register_fake
def _(row: Tensor, index: Tensor) -> Tensor:
    return row.new_empty(row.shape)


def _setup_scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, index = inputs
    ctx.save_for_backward(index)
    ctx.dtype = values.dtype


def _autograd_scatter_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    drow = clear(dout, index) if ctx.needs_input_grad[0] else None
    dvalues = dout.index_select(0, index).to(ctx.dtype) if ctx.needs_input_grad[1] else None
    return drow, dvalues, None


forward.register_autograd(projector_backward, setup_context=save_projector)
into.register_autograd(project_into_backward, setup_context=save_project_into)
scatter.register_autograd(_autograd_scatter_backward, setup_context=_setup_scatter_context)


def projector(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """gelu(x w0ᵀ + b0) w1ᵀ + b1 with the exact (erf) GELU: (P, Cv) -> (P, C).

    x (P, Cv), w0 (H, Cv), b0 (H,), w1 (C, H), b1 (C,), all of one dtype. ValueError for anything else.
    """
    return forward(x, w0, b0, w1, b1)


def project_into(row: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, index: Tensor) -> Tensor:
    """``row`` (T, C) with row[index[p]] replaced by the projection of x[p]; the rest as in ``projector``.

    index (P,) int64, without repeats and within 0 <= index < T: that is not checked, for it would stop the device.
    row may have another float dtype than x. ValueError for other shapes and dtypes.
    """
    return into(row, x, w0, b0, w1, b1, index)


def quantized_projector(x: Tensor, w0: QuantizedWeight, b0: Tensor, w1: QuantizedWeight, b1: Tensor) -> Tensor:
    """``projector`` with fp8 weights and rows rounded to fp8, of kernels that others use too: right, not fast."""
    h = gelu_erf(quantized_linear(fake_quantize_float8(x), w0, b0))
    return quantized_linear(fake_quantize_float8(h), w1, b1)


def scatter_rows(row: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """``row`` (T, C) with row[index[p]] replaced by values[p], (P, C), in row's dtype; index as in ``project_into``."""
    return scatter(row, values, index)
