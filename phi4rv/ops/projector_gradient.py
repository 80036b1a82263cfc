"""The gradient of ``projector`` and ``project_into``, the same behind Triton's forward pass and behind csrc's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def save_projector(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def projector_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w0, b0, w1 = ctx.saved_tensors
    return _wanted(dy, x, w0, b0, w1, ctx.needs_input_grad)


def save_project_into(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, w0, b0, w1, _, index = inputs
    ctx.save_for_backward(x, w0, b0, w1, index)


def project_into_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, w0, b0, w1, index = ctx.saved_tensors
    drow = _kernels().clear_rows(dout, index) if ctx.needs_input_grad[0] else None
    # Gathered once: three products read it, two of them cuBLAS's, which cannot gather.
    dy = dout.index_select(0, index).to(x.dtype)
    return drow, *_wanted(dy, x, w0, b0, w1, ctx.needs_input_grad[1:6]), None


def _wanted(
    dy: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, w0, b0, w1 and b1, None where not wanted."""
    grads = iter(_kernels().projector_backward(dy, x, w0, b0, w1, list(wanted)) if any(wanted) else [])
    return tuple(next(grads) if of else None for of in wanted)


def _kernels() -> Any:
    """Triton's operators, which are there once the registry has loaded an implementation of the projector."""
    if not hasattr(torch.ops.phi4rv_triton, "projector_backward"):
        raise RuntimeError("the projector's gradient needs Triton's kernels: pip install triton")
    return torch.ops.phi4rv_triton
