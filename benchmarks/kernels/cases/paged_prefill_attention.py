"""A chunk of a prompt against a paged cache at the decoder's shape: 40 query and 10 key heads of 128."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from benchmarks.kernels.case import Case, Draw
from phi4rv.ops import flash_attn, reference
from triton_kernels.packed_attention import packed_attention
from triton_kernels.paged_prefill_attention import paged_prefill_attention

FP8 = torch.float8_e4m3fn
DECODER = (40, 10, 128)
Peers = dict[str, Callable[..., Tensor]]


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU. A run is (new tokens, rows of the cache with them)."""
    if tiny:
        heads = (4, 2, 128)
        return [
            _case("a whole prompt", [(64, 64)], heads, 64),
            _case("chunks", [(40, 70), (1, 9), (0, 5)], heads, 16),
            _case("chunks", [(40, 70)], heads, 64, fp8=True),
        ]
    chunk, prompts = [(2048, 16384)], [(4096, 4096)] * 4
    suffixes = [(128, 4096 + 256 * i) for i in range(16)]
    return [
        _case("a whole prompt", [(16384, 16384)], DECODER, 64),
        _case("whole prompts", prompts, DECODER, 64),
        _case("whole prompts", prompts, DECODER, 64, fp8=True),
        _case("a chunk", chunk, DECODER, 64),
        _case("a chunk", chunk, DECODER, 16),
        _case("a chunk", chunk, DECODER, 256),
        _case("a chunk", chunk, DECODER, 64, fp8=True),
        _case("a chunk", chunk, DECODER, 16, fp8=True),
        _case("suffixes", suffixes, DECODER, 64),
        _case("suffixes", suffixes, DECODER, 64, fp8=True),
        # Not the model's: so that every head dim has a measured and a compiled kernel.
        *(_case("a chunk", chunk, (16, 16, D), 64, fp8=fp8) for D in (64, 72, 80) for fp8 in (False, True)),
    ]


def _case(name: str, runs: list[tuple[int, int]], heads: tuple[int, int, int], size: int, fp8: bool = False) -> Case:
    """Pages in random order."""
    H, G, D = heads
    new, lengths = [m for m, _ in runs], [n for _, n in runs]
    T, most = sum(new), max(-(-n // size) for n in lengths)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        k, v = (draw.normal(len(runs) * most, size, G, D, dtype=FP8 if fp8 else None) for _ in "kv")
        table = draw.ints(torch.randperm(len(runs) * most).view(len(runs), most))
        q = draw.normal(T, H + 2 * G, D)[:, :H]  # of a row of queries, keys and values, as the model has it
        scales = [draw.normal(G, dtype=torch.float32) for _ in "kv"] if fp8 else []
        return q, k, v, table, draw.ints(lengths), draw.ints([0, *accumulate(new)]), max(new), *scales

    def gathered(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``attend`` on keys and values that are packed first, which counts."""

        def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor, held: Tensor, offsets: Tensor, longest: int) -> Tensor:
            pages = [table[b, : -(-n // size)] for b, n in enumerate(lengths)]
            k, v = (torch.cat([x[i].flatten(0, 1)[:n] for i, n in zip(pages, lengths, strict=True)]) for x in (k, v))
            return attend(q, k, v, held, offsets, longest, max(lengths))

        return run

    peers: Peers = {"torch": reference.paged_prefill_attention}
    if not fp8:
        peers |= {"torch flash, gathered": gathered(_varlen), "torch flash": _flash}
        peers |= {"flash-attn 4": _flash_attn_4, "flash-attn 3": _flash_attn_3}
        if size % 256 == 0:  # the pages that version 2 takes
            peers["flash-attn 2"] = _flash_attn_2
        if new == lengths:
            peers["packed_attention, gathered"] = gathered(_packed)
    scores = sum(m * (n - m) + m * (m + 1) // 2 for m, n in runs)
    cached = 2 * sum(n for m, n in runs if m) * G * D * (1 if fp8 else 2)
    shape = f"{name} {H}/{G}x{D}, {T} of {sum(lengths)} in {len(runs)} {'fp8' if fp8 else 'bf16'} pages of {size}"
    return Case(
        "paged_prefill_attention", shape, inputs, paged_prefill_attention, peers,
        bytes=cached + 2 * T * H * D * 2, flops=4 * D * H * scores,
    )  # fmt: skip


def _packed(q: Tensor, k: Tensor, v: Tensor, held: Tensor, offsets: Tensor, longest: int, most: int) -> Tensor:
    """The kernel without pages, for whole prompts."""
    return packed_attention(q, k, v, offsets, longest, causal=True)


def _varlen(q: Tensor, k: Tensor, v: Tensor, held: Tensor, offsets: Tensor, longest: int, most: int) -> Tensor:
    keys = F.pad(held.cumsum(0, dtype=torch.int32), (1, 0))
    return _tensor(varlen_attn(q, k, v, offsets, keys, longest, most, window_size=(-1, 0), enable_gqa=True))


def _flash(q: Tensor, k: Tensor, v: Tensor, table: Tensor, held: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """PyTorch's, which reads pages too."""
    most = table.shape[1] * k.shape[1]
    out = varlen_attn(
        q, k, v, offsets, None, longest, most,
        window_size=(-1, 0), enable_gqa=True, seqused_k=held, block_table=table,
    )  # fmt: skip
    return _tensor(out)


def _flash_attn_2(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, held: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    keys, most = F.pad(held.cumsum(0, dtype=torch.int32), (1, 0)), table.shape[1] * k.shape[1]
    function = flash_attn.load_module(2).flash_attn_varlen_func
    return function(q, k, v, offsets, keys, longest, most, causal=True, block_table=table)


def _flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, held: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    return flash_attn.load_module(3).flash_attn_with_kvcache(
        q, k, v, cache_seqlens=held, page_table=table, cu_seqlens_q=offsets, max_seqlen_q=longest, causal=True
    )


def _flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, held: Tensor, offsets: Tensor, longest: int
) -> Tensor:
    out = flash_attn.load_module(4).flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=offsets, max_seqlen_q=longest, seqused_k=held, page_table=table, causal=True
    )
    return out[0]


def _tensor(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(out, Tensor)
    return out
