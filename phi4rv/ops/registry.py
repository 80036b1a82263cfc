"""The one list of operations, their implementations, and which of them a model runs.

A new operation is a definition in ``reference.py``, an entry here, a kernel file, a row in the parity tests and a
row in the benchmarks.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from phi4rv.errors import UserError
from phi4rv.ops import cuda, flash_attn

# Fastest first: ``auto`` takes the first that runs on the device and has been verified there.
KINDS = ("cuda", "flash_attn", "triton", "torch")
KERNELS = ("auto", *KINDS)
VARIABLE = "PHI4RV_KERNELS"

# Kind -> operation -> compute capabilities on which it has passed its parity tests and compute-sanitizer.
# A kernel that is not listed runs when it is asked for by name, and ``auto`` leaves it alone.
VERIFIED: dict[str, dict[str, tuple[str, ...]]] = {}


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation: ``function`` of ``module``, which is imported when it is chosen.

    ``why_not(device)`` is None where it runs, else the reason.
    """

    module: str
    function: str
    why_not: Callable[[torch.device], str | None] = lambda device: None

    def load(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a CUDA device (or TRITON_INTERPRET=1, which interprets its kernels, slowly)"
    return None


def _why_not_fp8(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "products in fp8 need compute capability 8.9 or more"
    return _why_not_triton(device)


def _operation(name: str, file: str | None = None) -> dict[str, Implementation]:
    """Its definition and its Triton kernel, a function of the same name in triton_kernels/``file``.py."""
    return {
        "triton": Implementation(f"triton_kernels.{file or name}", name, _why_not_triton),
        "torch": Implementation("phi4rv.ops.reference", name),
    }


IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "packed_attention": {
        "cuda": Implementation("phi4rv.ops.cuda", "packed_attention", cuda.why_not),
        "flash_attn": Implementation("phi4rv.ops.flash_attn", "packed_attention", flash_attn.why_not),
        **_operation("packed_attention"),
    },
    "decode_attention": {
        "cuda": Implementation("phi4rv.ops.cuda", "decode_attention", cuda.why_not),
        **_operation("decode_attention"),
    },
    "paged_decode_attention": {
        "cuda": Implementation("phi4rv.ops.cuda", "paged_decode_attention", cuda.why_not),
        **_operation("paged_decode_attention", "decode_attention"),
    },
    "paged_prefill_attention": _operation("paged_prefill_attention"),
    "rms_norm": _operation("rms_norm"),
    "layer_norm": _operation("layer_norm"),
    "rope": _operation("rope"),
    "swiglu": _operation("swiglu"),
    "gelu_tanh": _operation("gelu_tanh", "gelu"),
    "gelu_erf": _operation("gelu_erf", "gelu"),
    "patch_embed": _operation("patch_embed"),
    "projector": {"cuda": Implementation("phi4rv.ops.cuda", "projector", cuda.why_not), **_operation("projector")},
    "project_into": {
        "cuda": Implementation("phi4rv.ops.cuda", "project_into", cuda.why_not),
        **_operation("project_into", "projector"),
    },
    "quantized_projector": {
        "cuda": Implementation("phi4rv.ops.cuda", "quantized_projector", cuda.why_not),
        **_operation("quantized_projector", "projector"),
    },
    "scatter_rows": _operation("scatter_rows", "projector"),
    "fp8_linear": {
        "triton": Implementation("triton_kernels.fp8_linear", "fp8_linear", _why_not_fp8),
        "torch": Implementation("phi4rv.ops.reference", "fp8_linear"),
    },
    "linear_cross_entropy": _operation("linear_cross_entropy"),
    "quantized_linear": _operation("quantized_linear"),
    "decode_gemv": {
        "cuda": Implementation("phi4rv.ops.cuda", "decode_gemv", cuda.why_not),
        **_operation("decode_gemv", "quantized_linear"),
    },
    "adamw": _operation("adamw"),
}


class Operations:
    """The chosen implementation of each operation, as attributes: ``ops.rms_norm(x, weight, eps)``.

    ``kernels``: ``auto`` (the fastest that is verified here) or one kind for every operation, and after it, separated
    by commas, exceptions such as ``packed_attention=flash_attn``; None reads PHI4RV_KERNELS and then means ``auto``.
    ``cuda`` for every operation means csrc/'s kernels and, for operations that csrc/ has none of, Triton's.
    UserError if a kind asked for cannot run an operation, naming the reason.
    """

    packed_attention: Callable[..., Any]
    decode_attention: Callable[..., Any]
    paged_decode_attention: Callable[..., Any]
    paged_prefill_attention: Callable[..., Any]
    rms_norm: Callable[..., Any]
    layer_norm: Callable[..., Any]
    rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    gelu_tanh: Callable[..., Any]
    gelu_erf: Callable[..., Any]
    patch_embed: Callable[..., Any]
    projector: Callable[..., Any]
    project_into: Callable[..., Any]
    quantized_projector: Callable[..., Any]
    scatter_rows: Callable[..., Any]
    fp8_linear: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    quantized_linear: Callable[..., Any]
    decode_gemv: Callable[..., Any]
    adamw: Callable[..., Any]

    def __init__(self, kernels: str | None = None, device: torch.device | str = "cpu"):
        origin = "--kernels" if kernels else VARIABLE
        default, exceptions = _parse(kernels or os.environ.get(VARIABLE) or "auto", origin)
        self.chosen: dict[str, str] = {}
        for name, kinds in IMPLEMENTATIONS.items():
            kind = exceptions.get(name, default)
            if kind == "cuda" and name not in exceptions and "cuda" not in kinds:
                kind = "triton"
            if kind == "auto":
                kind = _fastest_verified(name, torch.device(device))
            if kind not in kinds:
                raise UserError(f"{origin}: {name} has no {kind} implementation, only {', '.join(kinds)}")
            reason = kinds[kind].why_not(torch.device(device))
            if reason:
                raise UserError(f"{origin}: {name} cannot run as {kind} on {device}: {reason}")
            self.chosen[name] = kind
            setattr(self, name, kinds[kind].load())
        if "cuda" in self.chosen.values():
            cuda.load()

    def __str__(self) -> str:
        """One line: which kind runs which operations."""
        kinds = dict.fromkeys(self.chosen.values())
        return "; ".join(f"{kind}: {', '.join(n for n, k in self.chosen.items() if k == kind)}" for kind in kinds)


def _parse(kernels: str, origin: str) -> tuple[str, dict[str, str]]:
    """``triton,adamw=torch`` -> ("triton", {"adamw": "torch"}). UserError for a name that is unknown."""
    default, exceptions = "auto", {}
    for part in kernels.split(","):
        name, _, kind = part.strip().rpartition("=")
        if kind not in KERNELS:
            raise UserError(f"{origin}: {kind!r} is unknown, must be one of {', '.join(KERNELS)}")
        if name and name not in IMPLEMENTATIONS:
            raise UserError(f"{origin}: {name!r} is no operation, must be one of {', '.join(IMPLEMENTATIONS)}")
        if name:
            exceptions[name] = kind
        else:
            default = kind
    return default, exceptions


def _fastest_verified(name: str, device: torch.device) -> str:
    kinds = IMPLEMENTATIONS[name]
    runs = [kind for kind in KINDS if kind in kinds and kinds[kind].why_not(device) is None]
    return next(kind for kind in runs if kind == "torch" or _capability(device) in VERIFIED.get(kind, {}).get(name, ()))


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else device.type
