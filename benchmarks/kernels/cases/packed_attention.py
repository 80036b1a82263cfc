"""Packed attention at the vision tower's and the decoder's shapes, beside every implementation that PyTorch has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.case import Case, Draw, with_cuda_kernel
from phi4rv.ops import cuda, flash_attn, reference
from triton_kernels.packed_attention import packed_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def cases(tiny: bool) -> list[Case]:
    """tiny: shapes for a CPU."""
    images = [5, 17, 30] if tiny else [256 + 3344 * i // 15 for i in range(16)]  # of 256 to 3600 patches
    large = [40, 40] if tiny else [3600] * 8
    tokens = 64 if tiny else 16384
    heads, decoder = (2, (4, 2)) if tiny else (16, (40, 10))
    return [
        *_both("NaFlex", images, heads, heads, 72, False, (1.0, 1.0)),
        *_both("NaFlex", large, heads, heads, 72, False, (1.0, 1.0)),
        *_both("causal", [tokens], *decoder, 128, True, (0.85, 0.8)),
        *_both("causal", [tokens // 4] * 4, *decoder, 128, True, (0.85, 0.8)),
        *_both("causal", _ragged(tokens, 8 if tiny else 64), *decoder, 128, True, (0.85, 0.8)),
        # Not the model's: so that every head dim has a measured and a compiled kernel.
        *_both("bidirectional", large, heads, heads, 64, False, None),
        *_both("bidirectional", large, heads, heads, 80, False, None),
    ]


def _ragged(tokens: int, documents: int) -> list[int]:
    """Lengths in proportion to 1, 2, … ``documents``, mixed."""
    steps = documents * (documents + 1) // 2
    ends = [0, *(tokens * s // steps for s in accumulate(range(1, documents + 1)))]
    lengths = [b - a for a, b in pairwise(ends)]
    return [lengths[i * 5 % documents] for i in range(documents)]


def _both(
    name: str, lengths: list[int], H: int, G: int, D: int, causal: bool, goals: tuple[float, float] | None
) -> list[Case]:
    """Forward and backward of one shape; with goals, the forward of csrc/ too."""
    T = sum(lengths)

    def inputs(draw: Draw) -> tuple[Any, ...]:
        row = draw.normal(T, H + 2 * G, D)  # one row of queries, keys and values, as the model has it
        q, k, v = (x.detach().requires_grad_() for x in row.split([H, G, G], 1))
        return q, k, v, draw.ints([0, *accumulate(lengths)]), max(lengths)

    def ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return packed_attention(q, k, v, cu_seqlens, max_seqlen, causal)

    peers: dict[str, Attention] = {
        "torch": functools.partial(_each, lengths=lengths, causal=causal),
        "torch flash": functools.partial(_torch_flash, causal=causal),
        "cudnn": functools.partial(_cudnn, lengths=lengths, causal=causal),
        "flex": _flex(lengths, causal),
        **{f"flash-attn {n}": functools.partial(_flash_attn, n, causal=causal) for n in flash_attn.VERSIONS},
    }
    scores = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    flops = 4 * D * H * scores
    row = 2 * T * D  # bytes of one bf16 head
    shape = f"{name} {H}/{G}x{D}, {T} in {len(lengths)}"
    forward, backward = [("peer", goal) for goal in goals] if goals else [None, None]
    first = Case(
        "packed_attention", f"{shape} forward", inputs, ours, peers,
        bytes=(2 * H + 2 * G) * row, flops=flops, goal=forward,
    )  # fmt: skip

    def csrc(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return cuda.packed_attention(q, k, v, cu_seqlens, max_seqlen, causal)

    mixed = len(set(lengths)) > 1
    goal = ("peer", 1.0) if causal else ("product", 0.6 if mixed else 0.65)
    # reads q, k, v, out and its gradient, writes three gradients; 2.5: five products for the two of the forward
    second = Case(
        "packed_attention", f"{shape} backward", inputs, ours, peers,
        bytes=(4 * H + 4 * G) * row, flops=flops * 5 // 2, backward=True, goal=backward,
    )  # fmt: skip
    second_goal = ("peer", 1.0) if causal else ("product", 0.45 if mixed else 0.5)
    if not goals:
        return [first, second]
    return [first, with_cuda_kernel(first, csrc, goal), second, with_cuda_kernel(second, csrc, second_goal)]


def _each(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, lengths: list[int], causal: bool
) -> Tensor:
    """The definition, but that it is told the lengths: scaled_dot_product_attention of each document."""
    documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([reference.attention(*document, causal) for document in documents])


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """FlashAttention-2 as PyTorch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        window_size=(-1, 0 if causal else -1), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, lengths: list[int], causal: bool
) -> Tensor:
    """cuDNN takes documents of one length as a batch, others as a nested tensor."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    equal = len(set(lengths)) == 1

    def batch(x: Tensor) -> Tensor:
        if equal:
            return x.unflatten(0, (len(lengths), -1)).transpose(1, 2)
        return torch.nested.nested_tensor_from_jagged(x.contiguous(), cu_seqlens).transpose(1, 2)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(
            batch(q), batch(k), batch(v), is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
    return out.flatten(0, 1) if equal else out.values()


def _flex(lengths: list[int], causal: bool) -> Attention:
    """FlexAttention, compiled; its block mask is made once, as a model makes it once for all layers."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    @functools.cache
    def prepared(device: torch.device) -> tuple[Any, BlockMask]:
        documents = torch.repeat_interleave(
            torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
        )

        def mask(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
            same = documents[row] == documents[key]
            return same & (row >= key) if causal else same

        T = len(documents)
        return torch.compile(flex_attention), create_block_mask(mask, None, None, T, T, device=device, _compile=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        compiled, mask = prepared(q.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attend


def _flash_attn(
    version: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> Tensor:
    flash_attn.load_module(version)  # says why it cannot be imported
    return flash_attn.packed_attention(
        q, k, v, cu_seqlens, max_seqlen, causal, version=version, deterministic=False
    )  # fmt: skip
