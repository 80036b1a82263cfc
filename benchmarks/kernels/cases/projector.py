"""The projector at one image's and at eight images' patches, alone, into the token sequence and in fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw, with_cuda_kernel
from phi4rv.ops import cuda, reference
from phi4rv.ops.low_precision import QuantizedWeight, quantize
from triton_kernels.projector import project_into, projector, quantized_projector, scatter_rows


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

    def inputs_quantized(draw: Draw) -> tuple[Any, ...]:
        x, w0, b0, w1, b1 = (a.detach() for a in inputs(draw))
        return x, quantize(w0, "fp8"), b0, quantize(w1, "fp8"), b1, w0, w1

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
    alone = Case("projector", f"{P} forward", inputs, projector, peers, forward, products, goal=goal, **bare)
    placing = Case(
        "project_into", f"{placed} forward", inputs_into, project_into, into, there, products, goal=goal, **bare
    )
    rounded = Case(
        "quantized_projector",
        f"{P} fp8 forward",
        inputs_quantized,
        _without_weights(quantized_projector),
        {
            "cublas fp8 products": _scaled_products,
            "cublas bf16 products": _unquantised_products,
            "torch": _without_weights(reference.quantized_projector),
            "torch.compile": torch.compile(_without_weights(reference.quantized_projector)),
        },
        (C * Cv + C * C) + 12 * C + P * (Cv * 2 + row),
        products,
        bounds=("cublas fp8 products", "cublas bf16 products"),
    )
    return [
        alone,
        with_cuda_kernel(alone, cuda.projector, ("cublas products", 1.0)),
        Case("projector", f"{P} backward", inputs, projector, peers, backward, 2 * products, True, **bare),
        placing,
        with_cuda_kernel(placing, cuda.project_into, ("cublas products", 1.0)),
        with_cuda_kernel(rounded, _without_weights(cuda.quantized_projector), ("cublas fp8 products", 0.9)),
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


def _without_weights(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a quantised case's inputs, which end with the weights before rounding."""
    return lambda *arguments: operation(*arguments[:-2])


def _unquantised_products(x: Tensor, *rest: Any) -> Tensor:
    return F.linear(F.linear(x, rest[-2]), rest[-1])


def _scaled_products(x: Tensor, w0: QuantizedWeight, b0: Tensor, w1: QuantizedWeight, b1: Tensor, *_: Tensor) -> Tensor:
    """The library's products of rows in fp8, cast without their scales: what rounding costs at least."""
    one = torch.ones(len(x), 1, device=x.device)

    def product(x: Tensor, w: QuantizedWeight) -> Tensor:
        rows = x.to(torch.float8_e4m3fn)
        return torch._scaled_mm(rows, w.data.t(), one, w.scales[None], out_dtype=torch.bfloat16, use_fast_accum=False)

    return product(product(x, w0), w1)
