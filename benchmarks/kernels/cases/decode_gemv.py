"""The products of decoding with what stands around them: 1 row of a decoder layer and of the head, and 8 of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Draw, with_cuda_kernel
from phi4rv.ops import cuda, reference
from phi4rv.ops.low_precision import QuantizedWeight, dequantize, quantize
from triton_kernels.quantized_linear import decode_gemv

EPS = 1e-5
# name: (N, K, with RMSNorm before, with the residual after, with SwiGLU).
SHAPES = {
    "qkv": (7680, 5120, True, False, False),
    "o": (5120, 5120, False, True, False),
    "gate_up": (35840, 5120, True, False, True),
    "down": (5120, 17920, False, True, False),
    "head": (100352, 5120, True, False, False),
}
# Share of the copy bandwidth that is wanted with one row.
GOALS = {"bf16": 0.92, "fp8": 0.85, "int4": 0.80}


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    return [
        _case(name, form, rows, tiny)
        for rows, names in ((1, tuple(SHAPES)), (8, ("gate_up", "down")))
        for form in GOALS
        for name in names
    ]


class _Weight:
    """One weight in the forms of ours and of the peers; a peer's is made when it is first asked for."""

    def __init__(self, w: Tensor, form: str):
        self.given = w if form == "bf16" else quantize(w, form)
        self.dense: Tensor | None = None

    def as_dense(self) -> Tensor:
        if self.dense is None:
            dense = self.given
            self.dense = dequantize(dense, torch.bfloat16) if isinstance(dense, QuantizedWeight) else dense
        return self.dense


def _case(name: str, form: str, rows: int, tiny: bool) -> Case:
    N, K, norm, residual, swiglu = SHAPES[name]
    if tiny:
        N, K = N // 160 // 16 * 16, 256
    columns = N // 2 if swiglu else N
    groups = -(-K // 128)
    weight = {"bf16": 2 * N * K, "fp8": N * K + 4 * N, "int4": 66 * N * groups}[form]

    def inputs(draw: Draw) -> tuple[Any, ...]:
        w = _Weight(draw.normal(N, K) * K**-0.5, form)
        packed = cuda.repack(w.given) if isinstance(w.given, QuantizedWeight) else w.given
        x, n, r = draw.normal(rows, K), draw.normal(K), draw.normal(rows, columns)
        return x, packed, n if norm else None, r if residual else None, w

    def dense(x: Tensor, _: Any, n: Tensor | None, r: Tensor | None, w: _Weight) -> Tensor:
        return reference.decode_gemv(x, w.as_dense(), n, EPS, r, swiglu)

    case = Case(
        "decode_gemv",
        f"{form} {rows} row{'s' * (rows > 1)}, {name} {K} to {N}",
        inputs,
        lambda x, _, n, r, w: decode_gemv(x, w.given, n, EPS, r, swiglu),
        {"torch bf16": dense} | ({"torch.compile": torch.compile(dense)} if rows == 1 else {}),
        bytes=weight + 2 * rows * (K + columns * (1 + residual)) + 2 * K * norm,
        flops=2 * rows * N * K,
    )
    goal = ("copy", GOALS[form]) if rows == 1 else None
    return with_cuda_kernel(case, lambda x, w, n, r, _: cuda.decode_gemv(x, w, n, EPS, r, swiglu), goal)
