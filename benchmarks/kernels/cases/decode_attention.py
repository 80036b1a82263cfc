"""Decoding against a cache at the decoder's shape: 40 query and 10 key heads of 128."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.kernels.case import Case, Draw, with_cuda_kernel
from phi4rv.ops import cuda, flash_attn
from triton_kernels.decode_attention import decode_attention, paged_decode_attention

H, G, D = 40, 10, 128
FP8 = torch.float8_e4m3fn
Peers = dict[str, Callable[..., Tensor]]


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    if tiny:
        rows = [_contiguous(2, 128, 2, False), _contiguous(1, 128, 1, True), _paged(2, 128, 64, False)]
    else:
        batches = ((1, 4096), (1, 16384), (8, 4096), (64, 4096))
        rows = [
            *(_contiguous(B, N, 1, fp8) for fp8 in (False, True) for B, N in batches),
            *(_contiguous(B, N, 8, fp8) for fp8 in (False, True) for B, N in batches[1::2]),
            *(
                _paged(B, N, size, fp8)
                for size, fp8 in ((64, False), (256, False), (64, True))
                for B, N in batches[1::2]
            ),
        ]
    return [*rows, *(with_cuda_kernel(row, *_csrc(row)) for row in rows)]


def _csrc(row: Case) -> tuple[Callable[..., Tensor], tuple[str, float] | None]:
    """The CUDA kernel and its goal, for one new token and 80 MB of cache or more."""
    kernel = cuda.decode_attention if row.ours is decode_attention else cuda.paged_decode_attention
    return kernel, ("copy", 0.85) if row.shape.startswith("1 against") and row.bytes > 80e6 else None


# No goal: that is the CUDA kernel's, and this one's figures stand beside it.
def _contiguous(B: int, N: int, M: int, fp8: bool) -> Case:
    """B documents of N rows, one after the other."""

    def inputs(draw: Draw) -> tuple[Any, ...]:
        k, v = (draw.normal(B * N, G, D, dtype=FP8 if fp8 else None) for _ in "kv")
        starts, lengths = draw.ints([b * N for b in range(B)]), draw.ints([N] * B)
        return draw.normal(B, M, H, D), k, v, starts, lengths, *_scales(draw, fp8)

    # A compiled function has its own cache of shapes: one for each case.
    peers: Peers = {"torch.compile": torch.compile(_plain, dynamic=False)}
    if not fp8:
        peers |= {
            "torch flash": _flash,
            "cudnn": _cudnn,
            "flex": torch.compile(_flex, dynamic=False),
            **{f"flash-attn {n}": functools.partial(_flash_attn, n) for n in (4, 3, 2)},
        }
    return Case("decode_attention", _shape(B, N, M, fp8), inputs, decode_attention, peers, *_work(B, N, M, fp8))


def _paged(B: int, N: int, size: int, fp8: bool) -> Case:
    """The same with pages in random order."""
    count = N // size

    def inputs(draw: Draw) -> tuple[Any, ...]:
        k, v = (draw.normal(B * count, size, G, D, dtype=FP8 if fp8 else None) for _ in "kv")
        table = draw.ints(torch.randperm(B * count).view(B, count))
        return draw.normal(B, 1, H, D), k, v, table, draw.ints([N] * B), *_scales(draw, fp8)

    # Version 2 takes pages of 256 alone; no version takes fp8 with queries in bf16.
    versions = [] if fp8 else [4, 3, 2] if size % 256 == 0 else [4, 3]
    peers: Peers = {f"flash-attn {n}": functools.partial(_paged_flash_attn, n) for n in versions}
    peers["torch.compile"] = torch.compile(_paged_plain, dynamic=False)
    shape = f"{_shape(B, N, 1, fp8)} pages of {size}"
    return Case("decode_attention", shape, inputs, paged_decode_attention, peers, *_work(B, N, 1, fp8))


def _shape(B: int, N: int, M: int, fp8: bool) -> str:
    return f"{M} against {B}x{N} {'fp8' if fp8 else 'bf16'}"


def _scales(draw: Draw, fp8: bool) -> tuple[Tensor, ...]:
    return tuple(draw.normal(G, dtype=torch.float32) for _ in "kv") if fp8 else ()


def _work(B: int, N: int, M: int, fp8: bool) -> tuple[int, int]:
    """Bytes of keys and values, q and the output; operations of the two products."""
    cached = 2 * B * N * G * D * (1 if fp8 else 2)
    return cached + 2 * B * M * H * D * 2, 4 * B * M * H * D * N


def _documents(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, heads, rows, D) of documents of one length."""
    k, v = (x.view(len(q), -1, *x.shape[1:]).transpose(1, 2) for x in (k, v))
    return q.transpose(1, 2), k, v


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _documents(q, k, v)
    mask = causal_lower_right(q.shape[2], k.shape[2]) if q.shape[2] > 1 else None
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)


def _flex(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = _documents(q, k, v)
    new, keys = q.shape[2], k.shape[2]

    def causal(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return torch.where(key <= row + keys - new, score, -float("inf"))

    return flex_attention(q, k, v, score_mod=causal if new > 1 else None, enable_gqa=True).transpose(1, 2)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The definition, for documents of one length and as one product: the loop over documents cannot be compiled."""
    q, k, v = _documents(q, k, v)
    k, v = (
        x if scale is None else (x.float() * scale[:, None, None]).to(q) for x, scale in ((k, k_scale), (v, v_scale))
    )
    B, heads, new, width = q.shape
    grouped = q.reshape(B, k.shape[1], -1, width)
    scores = (grouped @ k.mT).float().view(B, heads, new, -1) * width**-0.5
    rows, keys = torch.arange(new, device=q.device), torch.arange(k.shape[2], device=q.device)
    scores = scores.masked_fill(keys > rows[:, None] + len(keys) - new, -float("inf"))
    weights = scores.softmax(-1).to(q).view(*grouped.shape[:3], -1)
    return (weights @ v).view(q.shape).transpose(1, 2)


def _paged_plain(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, *scales: Tensor
) -> Tensor:  # fmt: skip
    """``_plain`` on the rows gathered from their pages."""
    k, v = (x[table.long()].flatten(0, 2) for x in (k, v))
    return _plain(q, k, v, table, lengths, *scales)


def _flash_attn(version: int, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Version 4 has no function for caches: the usual one, causal from the lower right."""
    package = flash_attn.load_module(version)
    k, v = (x.view(len(q), -1, *x.shape[1:]) for x in (k, v))
    if version == 4:
        return package.flash_attn_func(q, k, v, causal=True)[0]
    return package.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)


def _paged_flash_attn(version: int, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    package = flash_attn.load_module(version)
    if version == 4:
        ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]
        out = package.flash_attn_varlen_func(
            q.flatten(0, 1), k, v, cu_seqlens_q=ends, max_seqlen_q=q.shape[1], seqused_k=lengths, page_table=table,
            causal=True,
        )  # fmt: skip
        return out[0].view(q.shape)
    pages = {"block_table" if version == 2 else "page_table": table}
    return package.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **pages, causal=True)
