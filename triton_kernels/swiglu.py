"""SwiGLU on the fused gate-up row, forward and backward (Shazeer 2020).

Memory-bound: the forward pass reads two rows and writes one, the backward pass reads three and writes two; silu is
computed again there, not stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.launch import check, check_float, flatten_to_2d
from triton_kernels.common.tuning import SearchSpace

FORWARD = SearchSpace(
    "swiglu.forward",
    {
        "row": [
            {"BLOCK": 2048, "num_warps": 4},
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 4096, "num_warps": 8},
            {"BLOCK": 512, "num_warps": 1},
            {"BLOCK": 4096, "num_warps": 4},
        ]
    },
)
BACKWARD = SearchSpace(
    "swiglu.backward",
    {
        "row": [
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 2048, "num_warps": 4},
            {"BLOCK": 2048, "num_warps": 8},
            {"BLOCK": 4096, "num_warps": 8},
            {"BLOCK": 512, "num_warps": 1},
        ]
    },
)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-LOG2_E * x))


@triton.jit
def _forward_kernel(gate_up, out, stride, C, chunks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    cols = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    gate_up += row * stride
    g = tl.load(gate_up + cols, mask=inside).to(tl.float32)
    u = tl.load(gate_up + C + cols, mask=inside).to(tl.float32)
    tl.store(out + row * C + cols, (g * _sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dout, gate_up, dgate_up, dout_stride, stride, C, chunks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    cols = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < C
    gate_up += row * stride
    dgate_up += row * (2 * C)
    g = tl.load(gate_up + cols, mask=inside).to(tl.float32)
    u = tl.load(gate_up + C + cols, mask=inside).to(tl.float32)
    d = tl.load(dout + row * dout_stride + cols, mask=inside).to(tl.float32)
    s = _sigmoid(g)
    dg = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(dgate_up + cols, dg.to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(dgate_up + C + cols, (d * g * s).to(dgate_up.dtype.element_ty), mask=inside)


def launch_forward(gate_up: Tensor) -> Tensor:
    """See ``swiglu``."""
    check_float(gate_up, "swiglu: gate_up")
    check(gate_up.shape[-1] % 2 == 0, f"swiglu: gate_up is {tuple(gate_up.shape)}, must have an even last dimension")
    C = gate_up.shape[-1] // 2
    flat = flatten_to_2d(gate_up)
    out = gate_up.new_empty((*gate_up.shape[:-1], C))
    if out.numel():
        config = FORWARD.pick("row", gate_up.device)
        chunks = triton.cdiv(C, config["BLOCK"])
        with torch.cuda.device_of(gate_up):
            _forward_kernel[(len(flat) * chunks,)](flat, out, flat.stride(0), C, chunks, **config)
    return out


def launch_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up."""
    C = dout.shape[-1]
    grad, flat = flatten_to_2d(dout), flatten_to_2d(gate_up)
    dgate_up = gate_up.new_empty(gate_up.shape)
    if dgate_up.numel():
        config = BACKWARD.pick("row", gate_up.device)
        chunks = triton.cdiv(C, config["BLOCK"])
        with torch.cuda.device_of(gate_up):
            _backward_kernel[(len(flat) * chunks,)](
                grad, flat, dgate_up, grad.stride(0), flat.stride(0), C, chunks, **config
            )  # fmt: skip
    return dgate_up


forward = torch.library.custom_op("phi4rv_triton::swiglu", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::swiglu_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@backward.register_fake
def _(dout: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd_backward(ctx: Any, dout: Tensor) -> Tensor:
    return backward(dout, *ctx.saved_tensors)


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of the fused row (…, 2C) -> (…, C); float32, float16 or bfloat16, else ValueError."""
    return forward(gate_up)
