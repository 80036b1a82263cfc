"""Rotary position embedding of the fused qkv row, forward and backward (RoFormer, Su et al. 2021).

Memory-bound: reads and writes the row once. A program has several heads of one token, so that cos and sin are loaded
once for all of them; heads that are not rotated pass through the same registers. The gradient is the rotation by the
opposite angle, and so the same kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.launch import check, check_float
from triton_kernels.common.tuning import SearchSpace

SPACE = SearchSpace(
    "rope.rotate",
    {
        "row": [
            {"HEADS": 32, "num_warps": 4},
            {"HEADS": 16, "num_warps": 4},
            {"HEADS": 64, "num_warps": 8},
            {"HEADS": 32, "num_warps": 8},
            {"HEADS": 8, "num_warps": 2},
        ]
    },
)


@triton.jit
def _rotate_kernel(
    qkv, cos, sin, out, qkv_stride, cos_stride, sin_stride, heads, rotated, groups,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // groups).to(tl.int64)
    head = (program % groups) * HEADS + tl.arange(0, HEADS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = head < heads
    if BLOCK == HALF:
        c = tl.load(cos + row * cos_stride + cols)
        s = tl.load(sin + row * sin_stride + cols)
    else:
        c = tl.load(cos + row * cos_stride + cols, mask=cols < HALF, other=0.0)
        s = tl.load(sin + row * sin_stride + cols, mask=cols < HALF, other=0.0)
        inside &= cols < HALF
    if INVERSE:
        s = -s
    qkv += row * qkv_stride
    out += row * heads * (2 * HALF)
    offsets = head * (2 * HALF) + cols
    a = tl.load(qkv + offsets, mask=inside)
    b = tl.load(qkv + offsets + HALF, mask=inside)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    turned = head < rotated
    tl.store(out + offsets, tl.where(turned, (wide_a * c - wide_b * s).to(a.dtype), a), mask=inside)
    tl.store(out + offsets + HALF, tl.where(turned, (wide_b * c + wide_a * s).to(a.dtype), b), mask=inside)


def launch(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int, inverse: bool) -> Tensor:
    """See ``rope``; ``inverse``: by the opposite angle."""
    check_float(qkv, "rope: qkv")
    check(qkv.ndim == 3 and qkv.shape[2] % 2 == 0, f"rope: qkv is {tuple(qkv.shape)}, must be (T, heads, even D)")
    T, heads, D = qkv.shape
    for name, table in {"cos": cos, "sin": sin}.items():
        right = table.shape == (T, D // 2) and table.dtype == torch.float32
        check(right, f"rope: {name} is {table.dtype} {tuple(table.shape)}, must be float32 {(T, D // 2)}")
    check(0 <= rotated <= heads, f"rope: rotated is {rotated}, must be 0 to {heads}")
    adjacent = qkv.stride(2) == 1 and (heads == 1 or qkv.stride(1) == D)
    qkv = qkv if adjacent else qkv.contiguous()
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    out = qkv.new_empty(qkv.shape)
    if out.numel():
        config = dict(SPACE.pick("row", qkv.device))
        block = min(config.pop("HEADS"), triton.next_power_of_2(heads))
        groups = triton.cdiv(heads, block)
        with torch.cuda.device_of(qkv):
            _rotate_kernel[(T * groups,)](
                qkv, cos, sin, out, qkv.stride(0), cos.stride(0), sin.stride(0), heads, rotated, groups,
                HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2), HEADS=block, INVERSE=inverse, **config,
            )  # fmt: skip
    return out


rotate = torch.library.custom_op("phi4rv_triton::rope", launch, mutates_args=())


@rotate.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int, inverse: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.rotated, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return rotate(grad, *ctx.saved_tensors, ctx.rotated, not ctx.inverse), None, None, None, None


rotate.register_autograd(_autograd_backward, setup_context=_setup_context)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """Rotates the first ``rotated`` heads of the fused row qkv (T, heads, D) by cos, sin (T, D/2); the rest passes.

    Channel i is paired with i + D/2 (half-split, as in GPT-NeoX and Phi-3). qkv float32, float16 or bfloat16, cos and
    sin float32: they get no gradient. ValueError for anything else.
    """
    return rotate(qkv, cos, sin, rotated, False)
