"""The ``flash-attn`` packages as one more implementation of packed attention, where one is importable.

Version 4 (``flash_attn.cute``), 3 (``flash_attn_interface``, in some builds inside ``flash_attn_3``) and 2
(``flash_attn``), the newest first.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Version: where its module may lie and, for a GPU's major compute capability, the largest head dim it has kernels for.
VERSIONS: dict[int, tuple[tuple[str, ...], dict[int, int]]] = {
    4: (("flash_attn.cute",), {9: 256, 10: 128, 11: 128}),
    3: (("flash_attn_interface", "flash_attn_3.flash_attn_interface"), {9: 256}),
    2: (("flash_attn",), dict.fromkeys((8, 9, 10, 12), 256)),
}


def load_module(version: int) -> ModuleType:
    """The version's module. ImportError, or what else comes of a build for another PyTorch, if there is none."""
    *others, last = VERSIONS[version][0]
    for name in others:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(last)


@functools.cache
def _import(version: int) -> Callable[..., Any] | None:
    try:
        return load_module(version).flash_attn_varlen_func
    except (ImportError, AttributeError, OSError, RuntimeError):  # not installed, or built for another PyTorch
        return None


def supported(device: torch.device, head_dim: int, versions: Sequence[int] = tuple(VERSIONS)) -> list[int]:
    """The importable versions, newest first, that have kernels for this device and head dim."""
    if device.type != "cuda":
        return []
    major = torch.cuda.get_device_capability(device)[0]
    fits = [n for n in versions if head_dim % 8 == 0 and head_dim <= VERSIONS[n][1].get(major, 0)]
    return [n for n in fits if _import(n)]


def unavailable_reason(device: torch.device) -> str | None:
    """Why no version runs on this device, or None."""
    if device.type != "cuda":
        return "flash-attn needs CUDA"
    return None if supported(device, 64) else "no version of flash-attn that runs on this GPU is importable"


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    key_ends: Tensor | None = None,
    version: int | None = None,
    deterministic: bool = True,
) -> Tensor:
    """As ``reference.packed_attention``, float16 and bfloat16; ``version`` None: the newest that has the head dim.

    deterministic: gradients of the same bits every time, at some cost. ValueError with key_ends, which flash-attn does
    not have, and where no version runs.
    """
    if key_ends is not None:
        raise ValueError("packed_attention: flash-attn has no key_ends; use the torch or the triton kernels")
    found = supported(q.device, q.shape[-1], tuple(VERSIONS) if version is None else (version,))
    if not found:
        wanted = "flash-attn" if version is None else f"flash-attn {version}"
        raise ValueError(f"packed_attention: no {wanted} for head dim {q.shape[-1]} on {q.device} is importable")
    function = _import(found[0])
    assert function is not None
    out = function(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        causal=causal, deterministic=deterministic,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out
