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
BACKENDS = ("cuda", "flash_attn", "triton", "torch")
KERNELS = ("auto", *BACKENDS)
ENV_VAR = "PHI4RV_KERNELS"

# Backend -> operation -> compute capabilities on which it has passed its parity tests and compute-sanitizer.
# A kernel that is not listed runs when it is requested by name; ``auto`` never takes it.
VERIFIED: dict[str, dict[str, tuple[str, ...]]] = {}


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation: ``function`` of ``module``, which is imported when it is selected.

    ``unavailable_reason(device)`` is None where it runs, else the reason. gradient: a further module of kernels that
    only its backward pass needs, imported where Triton is installed.
    """

    module: str
    function: str
    unavailable_reason: Callable[[torch.device], str | None] = lambda device: None
    gradient: str | None = None

    def load(self) -> Callable[..., Any]:
        if self.gradient and importlib.util.find_spec("triton"):
            importlib.import_module(self.gradient)
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


def _triton_unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a CUDA device (or TRITON_INTERPRET=1, which interprets its kernels, slowly)"
    return None


def _fp8_unavailable(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "products in fp8 need compute capability 8.9 or more"
    return _triton_unavailable(device)


def _triton_and_torch(name: str, file: str | None = None) -> dict[str, Implementation]:
    """Its definition and its Triton kernel, a function of the same name in triton_kernels/``file``.py."""
    return {
        "triton": Implementation(f"triton_kernels.{file or name}", name, _triton_unavailable),
        "torch": Implementation("phi4rv.ops.reference", name),
    }


IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "packed_attention": {
        "cuda": Implementation("phi4rv.ops.cuda", "packed_attention", cuda.unavailable_reason),
        "flash_attn": Implementation("phi4rv.ops.flash_attn", "packed_attention", flash_attn.unavailable_reason),
        **_triton_and_torch("packed_attention"),
    },
    "decode_attention": {
        "cuda": Implementation("phi4rv.ops.cuda", "decode_attention", cuda.unavailable_reason),
        **_triton_and_torch("decode_attention"),
    },
    "paged_decode_attention": {
        "cuda": Implementation("phi4rv.ops.cuda", "paged_decode_attention", cuda.unavailable_reason),
        **_triton_and_torch("paged_decode_attention", "decode_attention"),
    },
    "paged_prefill_attention": _triton_and_torch("paged_prefill_attention"),
    "rms_norm": _triton_and_torch("rms_norm"),
    "layer_norm": _triton_and_torch("layer_norm"),
    "rope": _triton_and_torch("rope"),
    "swiglu": _triton_and_torch("swiglu"),
    "gelu_tanh": _triton_and_torch("gelu_tanh", "gelu"),
    "gelu_erf": _triton_and_torch("gelu_erf", "gelu"),
    "patch_embed": _triton_and_torch("patch_embed"),
    "projector": {
        "cuda": Implementation("phi4rv.ops.cuda", "projector", cuda.unavailable_reason, "triton_kernels.projector"),
        **_triton_and_torch("projector"),
    },
    "project_into": {
        "cuda": Implementation("phi4rv.ops.cuda", "project_into", cuda.unavailable_reason, "triton_kernels.projector"),
        **_triton_and_torch("project_into", "projector"),
    },
    "quantized_projector": {
        "cuda": Implementation("phi4rv.ops.cuda", "quantized_projector", cuda.unavailable_reason),
        **_triton_and_torch("quantized_projector", "projector"),
    },
    "scatter_rows": _triton_and_torch("scatter_rows", "projector"),
    "fp8_linear": {
        "triton": Implementation("triton_kernels.fp8_linear", "fp8_linear", _fp8_unavailable),
        "torch": Implementation("phi4rv.ops.reference", "fp8_linear"),
    },
    "linear_cross_entropy": _triton_and_torch("linear_cross_entropy"),
    "quantized_linear": _triton_and_torch("quantized_linear"),
    "decode_gemv": {
        "cuda": Implementation("phi4rv.ops.cuda", "decode_gemv", cuda.unavailable_reason),
        **_triton_and_torch("decode_gemv", "quantized_linear"),
    },
    "adamw": _triton_and_torch("adamw"),
}


class Operations:
    """The selected implementation of each operation, as attributes: ``ops.rms_norm(x, weight, eps)``.

    ``kernels``: ``auto`` (the fastest that is verified here) or one backend for every operation, followed, separated
    by commas, by exceptions such as ``packed_attention=flash_attn``; None reads PHI4RV_KERNELS and then means ``auto``.
    ``cuda`` for every operation means csrc/'s kernels and, for operations that csrc/ has none of, Triton's.
    UserError if a requested backend cannot run an operation, naming the reason.
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
        origin = "--kernels" if kernels else ENV_VAR
        default, exceptions = _parse(kernels or os.environ.get(ENV_VAR) or "auto", origin)
        self.backends: dict[str, str] = {}
        for name, implementations in IMPLEMENTATIONS.items():
            backend = exceptions.get(name, default)
            if backend == "cuda" and name not in exceptions and "cuda" not in implementations:
                backend = "triton"
            if backend == "auto":
                backend = _fastest_verified(name, torch.device(device))
            if backend not in implementations:
                raise UserError(f"{origin}: {name} has no {backend} implementation, only {', '.join(implementations)}")
            reason = implementations[backend].unavailable_reason(torch.device(device))
            if reason:
                raise UserError(f"{origin}: {name} cannot run as {backend} on {device}: {reason}")
            self.backends[name] = backend
            setattr(self, name, implementations[backend].load())
        if "cuda" in self.backends.values():
            cuda.load()

    def __str__(self) -> str:
        """One line: which backend runs which operations."""
        names = dict.fromkeys(self.backends.values())
        return "; ".join(f"{name}: {', '.join(n for n, b in self.backends.items() if b == name)}" for name in names)


def _parse(kernels: str, origin: str) -> tuple[str, dict[str, str]]:
    """``triton,adamw=torch`` -> ("triton", {"adamw": "torch"}). UserError for a name that is unknown."""
    default, exceptions = "auto", {}
    for part in kernels.split(","):
        name, _, backend = part.strip().rpartition("=")
        if backend not in KERNELS:
            raise UserError(f"{origin}: {backend!r} is unknown, must be one of {', '.join(KERNELS)}")
        if name and name not in IMPLEMENTATIONS:
            raise UserError(f"{origin}: {name!r} is no operation, must be one of {', '.join(IMPLEMENTATIONS)}")
        if name:
            exceptions[name] = backend
        else:
            default = backend
    return default, exceptions


def _fastest_verified(name: str, device: torch.device) -> str:
    implementations = IMPLEMENTATIONS[name]
    runs = [
        backend
        for backend in BACKENDS
        if backend in implementations and implementations[backend].unavailable_reason(device) is None
    ]
    return next(
        backend
        for backend in runs
        if backend == "torch" or _capability(device) in VERIFIED.get(backend, {}).get(name, ())
    )


def _capability(device: torch.device) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else device.type
