"""One optimiser step over a flat shard, in the three ways to keep its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from phi4rv.ops.low_precision import MOMENT_BLOCK, Moment8
from triton_kernels.adamw import adamw

LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
STEP, SEED = 10, 1
GOAL = ("copy", 0.9)


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    n = 4096 if tiny else 1 << 28
    size = f"{n >> 20}Mi" if n >> 20 else str(n)
    scales = 4 / MOMENT_BLOCK

    def float32(draw: Draw) -> tuple[Any, ...]:
        moments = draw.normal(n, dtype=torch.float32), draw.normal(n, dtype=torch.float32).abs()
        return *(draw.normal(n, dtype=torch.float32) for _ in range(2)), *moments, draw.normal(n, dtype=torch.bfloat16)

    def short(draw: Draw) -> tuple[Tensor, Tensor]:
        return draw.normal(n, dtype=torch.bfloat16), draw.normal(n)

    def bfloat16(draw: Draw) -> tuple[Any, ...]:
        return *short(draw), draw.normal(n), draw.normal(n).abs()

    def eight(draw: Draw) -> tuple[Any, ...]:
        codes = [draw.normal(n).mul(40).clamp(-127, 127).abs().to(torch.uint8) for _ in range(2)]
        shared = [draw.normal(n // MOMENT_BLOCK, dtype=torch.float32).abs() for _ in range(2)]
        return *short(draw), Moment8(codes[0], shared[0]), Moment8(codes[1], shared[1])

    compiled = {"torch.compile": torch.compile(_definition)}
    fused = {"torch fused": _fused, **compiled}
    return [
        Case("adamw", f"{size} float32, bf16 copy", float32, _ours, fused, bytes=30 * n, goal=GOAL),
        Case("adamw", f"{size} bf16 stochastic", bfloat16, _ours, fused, bytes=14 * n, goal=GOAL),
        Case(
            "adamw", f"{size} bf16, 8-bit moments", eight, _ours, {"bitsandbytes": _bitsandbytes, **compiled},
            bytes=int((10 + 4 * scales) * n), goal=GOAL,
        ),
    ]  # fmt: skip


def _ours(param: Tensor, grad: Tensor, first: Any, second: Any, copy: Tensor | None = None) -> Tensor:
    adamw(param, grad, first, second, STEP, LR, BETAS, EPS, DECAY, copy=copy, seed=SEED)
    return param


def _definition(param: Tensor, grad: Tensor, first: Any, second: Any, copy: Tensor | None = None) -> Tensor:
    reference.adamw(param, grad, first, second, STEP, LR, BETAS, EPS, DECAY, copy=copy, seed=SEED)
    return param


def _fused(param: Tensor, grad: Tensor, first: Tensor, second: Tensor, copy: Tensor | None = None) -> Tensor:
    """What ``torch.optim.AdamW(fused=True)`` calls; bf16 is rounded to nearest. The copy is a pass of its own."""
    steps = torch.full((), float(STEP), device=param.device)
    torch._fused_adamw_(
        [param], [grad], [first], [second], [], [steps],
        lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, eps=EPS, amsgrad=False, maximize=False,
    )  # fmt: skip
    if copy is not None:
        copy.copy_(param)
    return param


def _bitsandbytes(param: Tensor, grad: Tensor, first: Moment8, second: Moment8) -> Tensor:
    """Its codes mean other values than ours; torchao's 8-bit step has no function for a single tensor."""
    import bitsandbytes.functional as bnb

    signed = bnb.create_dynamic_map(signed=True).to(param.device)
    unsigned = bnb.create_dynamic_map(signed=False).to(param.device)
    bnb.optimizer_update_8bit_blockwise(
        "adam", grad, param, first.codes, second.codes, *BETAS, 0.0, 1.0, EPS, STEP, LR,
        signed, unsigned, first.scales, second.scales, weight_decay=DECAY,
    )  # fmt: skip
    return param
