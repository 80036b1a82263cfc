"""GELU by its tanh approximation and exact, forward and backward (Hendrycks & Gimpel 2016).

Memory-bound: the forward pass reads and writes each element once, the backward pass reads two and writes one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.launch import check_float
from triton_kernels.common.tuning import SearchSpace

_CONFIGS = [
    {"BLOCK": 2048, "num_warps": 4},
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 1024, "num_warps": 2},
    {"BLOCK": 512, "num_warps": 1},
    {"BLOCK": 4096, "num_warps": 8},
]
FORWARD = SearchSpace("gelu.forward", {"tanh": _CONFIGS, "erf": _CONFIGS})
BACKWARD = SearchSpace("gelu.backward", {"tanh": _CONFIGS, "erf": _CONFIGS})

LOG2_E = tl.constexpr(1.4426950408889634)
PEAK = tl.constexpr(0.3989422804014327)  # of the normal density, 1 / sqrt(2π)
# (1 + tanh u) / 2 = sigmoid(2u) with u = sqrt(2/π) (x + 0.044715 x³).
SLOPE = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def normal_cdf(x):
    """Φ(x) and exp(-x²/2) in float32.

    libdevice's erf takes 36 instructions an element, too many to keep up with memory. Instead Φ(-a) exp(a²/2) for
    a >= 0 is a polynomial in a / (a + 3.75), fitted so that Φ is right to 2e-9 before rounding; without the
    cancellation of 1 + erf, small values of Φ keep their digits.
    """
    a = tl.minimum(tl.abs(x), 16.0)  # beyond, Φ(-a) is 0 in float32; inf stays out of the quotient
    s = a / (a + 3.75)
    tail = 0.22368649 + s * -0.14449416
    tail = 0.369070796 + s * tail
    tail = -1.47709901 + s * tail
    tail = 2.01957555 + s * tail
    tail = -1.4960333 + s * tail
    tail = 0.5 + s * tail
    e = tl.exp2(a * a * (-0.5 * LOG2_E))
    tail *= e
    return tl.where(x > 0, 1.0 - tail, tail), e


@triton.jit
def _forward_kernel(x, y, N, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < N
    v = tl.load(x + offsets, mask=inside).to(tl.float32)
    if EXACT:
        below, _ = normal_cdf(v)
        out = v * below
    else:
        # exp2 may overflow to inf or vanish: the quotient is then 0 or v, as it should be.
        out = v / (1.0 + tl.exp2(v * (-LOG2_E * SLOPE) * (1.0 + CUBIC * v * v)))
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dy, x, dx, N, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < N
    v = tl.load(x + offsets, mask=inside).to(tl.float32)
    g = tl.load(dy + offsets, mask=inside).to(tl.float32)
    if EXACT:
        below, e = normal_cdf(v)
        slope = below + v * (PEAK * e)
    else:
        square = v * v
        # exp2 of what is never positive: its products stay finite.
        e = tl.exp2(-LOG2_E * SLOPE * tl.abs(v) * (1.0 + CUBIC * square))
        r = 1.0 / (1.0 + e)
        slope = tl.where(v > 0, r, e * r) + e * r * r * v * (SLOPE + 3.0 * SLOPE * CUBIC * square)
    tl.store(dx + offsets, (g * slope).to(dx.dtype.element_ty), mask=inside)


def launch_forward(x: Tensor, exact: bool) -> Tensor:
    """See ``gelu_tanh`` and, ``exact``, ``gelu_erf``."""
    check_float(x, "gelu: x")
    y = x.new_empty(x.shape)
    if y.numel():
        config = FORWARD.pick("erf" if exact else "tanh", x.device)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(y.numel(), config["BLOCK"]),)](
                x.contiguous(), y, y.numel(), EXACT=exact, **config
            )
    return y


def launch_backward(dy: Tensor, x: Tensor, exact: bool) -> Tensor:
    """The gradient of x."""
    dx = x.new_empty(x.shape)
    if dx.numel():
        config = BACKWARD.pick("erf" if exact else "tanh", x.device)
        with torch.cuda.device_of(x):
            _backward_kernel[(triton.cdiv(dx.numel(), config["BLOCK"]),)](
                dy.contiguous(), x.contiguous(), dx, dx.numel(), EXACT=exact, **config
            )  # fmt: skip
    return dx


forward = torch.library.custom_op("phi4rv_triton::gelu", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::gelu_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(x: Tensor, exact: bool) -> Tensor:
    return x.new_empty(x.shape)


@backward.register_fake
def _(dy: Tensor, x: Tensor, exact: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.exact = inputs
    ctx.save_for_backward(x)


def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return backward(dy, *ctx.saved_tensors, ctx.exact), None


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, as in SigLIP2. x of any shape, float32, float16 or bfloat16, else ValueError."""
    return forward(x, False)


def gelu_erf(x: Tensor) -> Tensor:
    """x · Φ(x), the exact GELU, as in LLaVA. x of any shape, float32, float16 or bfloat16, else ValueError."""
    return forward(x, True)
