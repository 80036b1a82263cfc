"""The vocabulary head's loss: 8192 rows, a fifth of them labelled (as in this data) or all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import reference
from triton_kernels.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU.

    Liger-Kernel and PyTorch's chunked loss compute the gradients during their forward pass: only forward and backward
    together compare. Useful work is three products; the fourth, ours and not needed where logits are kept, does not
    count.
    """
    T, C, V = (8, 16, 100) if tiny else (8192, 5120, 200064)
    losses = {
        "torch": _torch,
        "torch.compile": torch.compile(_torch),
        "torch chunked": _chunked,
        "liger": _liger,
    }
    size = (T + V) * C * 2  # bytes of hidden and weight
    found = []
    for percent in (20, 100):
        labelled = round(T * percent / 100)
        product = 2 * labelled * V * C
        shape = f"{T}x{C} to {V}, {percent} % labelled"
        forward = {name: losses[name] for name in ("torch", "torch.compile")}
        both = {name: _with_gradients(loss) for name, loss in losses.items()}
        goal = ("peer", 1.3)
        found += [
            Case(
                "linear_cross_entropy", f"{shape}, forward", _inputs(T, C, V, labelled), _ours, forward, size, product
            ),
            Case(
                "linear_cross_entropy",
                f"{shape}, forward and backward",
                _inputs(T, C, V, labelled),
                _with_gradients(_ours),
                both,
                2 * size,
                3 * product,
                goal=goal,
            ),
        ]
    return found


def _inputs(T: int, C: int, V: int, labelled: int) -> Callable[[Draw], tuple[Any, ...]]:
    def inputs(draw: Draw) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        targets = torch.full((T,), reference.NO_LABEL)
        rows = torch.randperm(T, generator=generator)[:labelled]
        targets[rows] = torch.randint(V, (labelled,), generator=generator)
        weight = draw.normal(V, C).mul_(C**-0.5).requires_grad_()  # logits of standard deviation 1
        return draw.normal(T, C, grad=True), weight, draw.ints(targets, torch.int64)

    return inputs


def _with_gradients(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    def both(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        total = loss(hidden, weight, targets)
        return total.detach(), *torch.autograd.grad(total, (hidden, weight))

    return both


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets)[0]


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return reference.linear_cross_entropy(hidden, weight, targets)[0]


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)
