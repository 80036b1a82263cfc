"""The projector at one image's and at eight images' patches, alone and into the token sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw
from phi4rv import reference
from triton_kernels.projector import project_into, projector, scatter_rows


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    return [case for P in ((8,) if tiny else (3600, 28800)) for case in _cases(P, tiny)]


def _cases(P: int, tiny: bool) -> list[Case]:
    Cv, C = (48, 64) if tiny else (1152, 5120)
    T = P + P // 4  # text between the images

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x = draw.normal(P, Cv, grad=True)
        return x, *(draw.normal(*s, grad=True) for s in ((C, Cv), (C,), (C, C), (C,)))

    def inputs_into(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(T, C, grad=True), *inputs(draw), draw.ints(torch.arange(P) + T - P, torch.int64)

    def inputs_scatter(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(T, C, grad=True), draw.normal(P, C, grad=True), draw.ints(torch.arange(P), torch.int64)

    peers = {"cublas products": _products, "torch": reference.projector}
    into = {"cublas products": _products_into, "torch": reference.project_into}
    scatter = {"torch": reference.scatter_rows}
    for name, definition in (("projector", peers), ("project_into", into), ("scatter_rows", scatter)):
        definition["torch.compile"] = torch.compile(getattr(reference, name))
    weights = (C * Cv + C * C + 2 * C) * 2
    row = C * 2  # bytes of one bf16 token
    forward = weights + P * (Cv * 2 + row)
    backward = 2 * weights + P * (2 * Cv * 2 + row)
    products = 2 * P * (Cv * C + C * C)  # operations of the forward pass; the backward pass must do twice as many
    goal = ("cublas products", 0.95)
    copied = (T - P) * row * 2
    placed = f"{P} of {T}"
    bare = {"bounds": ("cublas products",)}  # no bias, no GELU, nothing moved
    there, back = forward + copied, backward + copied + P * row
    return [
        Case("projector", f"{P} forward", inputs, projector, peers, forward, products, goal=goal, **bare),
        Case("projector", f"{P} backward", inputs, projector, peers, backward, 2 * products, True, **bare),
        Case(
            "project_into",
            f"{placed} forward",
            inputs_into,
            project_into,
            into,
            there,
            products,
            goal=goal,
            **bare,
        ),
        Case(
            "project_into",
            f"{placed} backward",
            inputs_into,
            project_into,
            into,
            back,
            2 * products,
            True,
            **bare,
        ),
        Case("scatter_rows", f"{placed} forward", inputs_scatter, scatter_rows, scatter, 2 * T * row),
        Case("scatter_rows", f"{placed} backward", inputs_scatter, scatter_rows, scatter, (2 * T + P) * row, 0, True),
    ]


def _products(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """What no projector can do without: neither bias nor GELU."""
    return F.linear(F.linear(x, w0), w1)


def _products_into(row: Tensor, *rest: Tensor) -> Tensor:
    return _products(*rest[:-1])
