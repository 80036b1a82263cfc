"""A kernel of your own, from its definition to one that is held to it: squared ReLU, forward and backward.

From the repository's root, with what `make dev` installs:

    python -m examples.custom_kernel              # parity: on the GPU, and its speed; else in Triton's interpreter
    python -m examples.custom_kernel --compile    # for an H100, on any machine: registers and spills

docs/kernels.md walks through this file.
"""

import os
import sys
from typing import Any

import torch

if not torch.cuda.is_available() and "--compile" not in sys.argv:  # before Triton, whose functions are defined by it
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from torch import Tensor

from benchmarks.kernels.case import Case
from benchmarks.kernels.timing import milliseconds
from phi4rv.ops.registry import IMPLEMENTATIONS, Implementation, Operations
from tests.kernels import offline
from tests.kernels.check import check_parity, draw
from triton_kernels.common.launch import check_float
from triton_kernels.common.tuning import SearchSpace, make_configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD = SearchSpace("squared_relu.forward", {"flat": make_configs(("BLOCK", "num_warps"), (1024, 4), (4096, 8))})
BACKWARD = SearchSpace("squared_relu.backward", {"flat": make_configs(("BLOCK", "num_warps"), (1024, 4), (2048, 8))})


def definition(x: Tensor) -> Tensor:
    """max(x, 0)² of each element (So et al. 2021)."""
    return torch.relu(x).square()


@triton.jit
def _forward(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)  # not tl.maximum, which drops a NaN
    tl.store(out + at, (value * value).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _backward(dout, x, dx, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n).to(tl.float32)
    d = tl.load(dout + at, mask=at < n).to(tl.float32)
    tl.store(dx + at, (2 * d * tl.where(value < 0, 0.0, value)).to(dx.dtype.element_ty), mask=at < n)


def launch(kernel: Any, space: SearchSpace, *inputs: Tensor) -> Tensor:
    out = torch.empty_like(inputs[-1], memory_format=torch.contiguous_format)
    if out.numel():
        config = space.pick("flat", out.device)
        grid = (triton.cdiv(out.numel(), config["BLOCK"]),)
        with torch.cuda.device_of(out):  # a launch goes to the current device
            kernel[grid](*(x.contiguous() for x in inputs), out, out.numel(), **config)
    return out


@torch.library.custom_op("phi4rv_example::squared_relu", mutates_args=())
def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² of each element, contiguous; float32, float16 or bfloat16, else ValueError."""
    check_float(x, "squared_relu: x")
    return launch(_forward, FORWARD, x)


@torch.library.custom_op("phi4rv_example::squared_relu_backward", mutates_args=())
def backward(dout: Tensor, x: Tensor) -> Tensor:
    return launch(_backward, BACKWARD, dout, x)


squared_relu.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
backward.register_fake(lambda dout, x: torch.empty_like(x, memory_format=torch.contiguous_format))
squared_relu.register_autograd(
    lambda ctx, dout: backward(dout, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def check() -> None:
    """Every configuration at sizes around the edges of a block, elements far apart, and the operator's schema."""
    for dtype in (torch.float16, torch.float32 if DEVICE == "cpu" else torch.bfloat16):
        for space in (FORWARD, BACKWARD):
            for config in space.cases["flat"]:
                with space.forced(config):
                    for size in (0, 1, 2, 1023, 1024, 1025, 5000):
                        check_parity(squared_relu, definition, (draw((DEVICE, dtype), size),))
        check_parity(squared_relu, definition, (draw((DEVICE, dtype), 9, 96).detach()[:, 16:80].T.requires_grad_(),))
    torch.library.opcheck(squared_relu, (draw((DEVICE, torch.float32), 5, 64),))


def cases(tiny: bool) -> list[Case]:
    """The rows of its benchmark: bytes are those of bfloat16, read once and written once."""
    T, C = (8, 64) if tiny else (16384, 5120)
    common = {"inputs": lambda draw: (draw.normal(T, C, grad=True),), "peers": {"torch": definition}}
    shape, size = f"{T}x{C}", 2 * T * C
    return [
        Case("squared_relu", f"{shape} forward", ours=squared_relu, bytes=2 * size, **common),
        Case("squared_relu", f"{shape} backward", ours=squared_relu, bytes=3 * size, backward=True, **common),
    ]


def main() -> None:
    if "--compile" in sys.argv:
        triton.runtime.driver.set_active(offline.Driver(90))
        seen: set[str] = set()
        for case in cases(tiny=False):
            offline.report(case, None, {}, seen)
        return
    torch.manual_seed(0)
    check()
    kinds = {"triton": Implementation(__name__, "squared_relu"), "torch": Implementation(__name__, "definition")}
    IMPLEMENTATIONS["squared_relu"] = kinds
    ops: Any = Operations("torch,squared_relu=triton", DEVICE)
    print(f"squared_relu is right on {DEVICE}, and runs as {ops.backends['squared_relu']}")
    if DEVICE == "cuda":
        x = torch.randn(16384, 5120, device=DEVICE, dtype=torch.bfloat16)
        ms = milliseconds({"torch": lambda i: definition(x), "triton": lambda i: ops.squared_relu(x)})
        print(f"forward: {ms['torch'].ms / ms['triton'].ms:.2f} times as fast as plain PyTorch")


if __name__ == "__main__":
    main()
