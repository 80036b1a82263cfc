"""Attention inside each document of a packed row (FlashAttention-2, Dao 2023), forward and operator.

Scores and sums stay in registers: a program holds a tile of queries and walks over the keys that it may see with a
running maximum and sum, base 2. Blocks outside a document or wholly above the diagonal are not visited; only those on
an edge pay for a mask. A head of 72 channels is multiplied as 64 + 16, not as 128. 4·D operations a score.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels import packed_attention_backward
from triton_kernels.common.launch import check, check_float
from triton_kernels.common.schedule import (
    contiguous_heads,
    head_dim_case,
    load_head,
    load_tile,
    num_visible_keys,
    online_softmax_step,
    schedule_tiles,
    split_head_dim,
    store_head,
)
from triton_kernels.common.tuning import SearchSpace

FORWARD = SearchSpace(
    "packed_attention.forward",
    {
        "64": [
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        ],
        "72": [
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        ],
        "128": [
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        ],
        "other": [
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        ],
        "float32": [
            {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        ],
    },
)


@triton.jit
def _attention_inner(
    acc, acc_tail, row_sum, row_max, q_main, q_tail, k, v, k_rows, v_rows, k_stride, v_stride, first, last, seen,
    length, scale, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys from first to last to a tile's state."""
    for n in range(first, last, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        inside = columns < length
        kn = k + tl.cast(n, tl.int64) * k_stride
        s = tl.dot(q_main, tl.trans(load_head(kn, k_rows, inside, 0, MAIN, D, MASKED)), input_precision="ieee")
        if TAIL:
            s = tl.dot(
                q_tail, tl.trans(load_head(kn, k_rows, inside, MAIN, TAIL, D, MASKED)), s, input_precision="ieee"
            )
        if MASKED:
            s = tl.where(columns[None, :] < seen[:, None], s, float("-inf"))
        p, rescale, row_sum, row_max = online_softmax_step(s, row_sum, row_max, scale, q_main.dtype)
        vn = v + tl.cast(n, tl.int64) * v_stride
        acc = tl.dot(
            p, load_head(vn, v_rows, inside, 0, MAIN, D, MASKED), acc * rescale[:, None], input_precision="ieee"
        )
        if TAIL:
            v_tail = load_head(vn, v_rows, inside, MAIN, TAIL, D, MASKED)
            acc_tail = tl.dot(p, v_tail, acc_tail * rescale[:, None], input_precision="ieee")
    return acc, acc_tail, row_sum, row_max


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, tiles, key_ends, q_stride, k_stride, v_stride, T, H, GROUP, scale,
    CAUSAL: tl.constexpr, EXTENDED: tl.constexpr,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, start, length = load_tile(tiles, cu_seqlens)
    if block < 0:
        return
    head = tl.program_id(1)
    # D is a constant here so that the compiler sees addresses of 16 bytes.
    q += start * q_stride + head * D
    k += start * k_stride + head // GROUP * D
    v += start * v_stride + head // GROUP * D
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < length
    q_rows = rows.to(tl.int64) * q_stride
    k_rows = tl.arange(0, BLOCK_N).to(tl.int64) * k_stride
    v_rows = tl.arange(0, BLOCK_N).to(tl.int64) * v_stride
    q_main = load_head(q, q_rows, inside, 0, MAIN, D, True)
    q_tail = load_head(q, q_rows, inside, MAIN, TAIL, D, True) if TAIL else q_main

    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, length) - 1
    seen = num_visible_keys(rows, start, length, key_ends, CAUSAL, EXTENDED)
    unmasked = num_visible_keys(first, start, length, key_ends, CAUSAL, EXTENDED) // BLOCK_N * BLOCK_N
    end = num_visible_keys(last, start, length, key_ends, CAUSAL, EXTENDED)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    scale = tl.zeros((BLOCK_M,), tl.float32) + scale * 1.4426950408889634  # exp(x) = exp2(x / ln 2)
    acc, acc_tail, row_sum, row_max = _attention_inner(
        acc, acc_tail, row_sum, row_max, q_main, q_tail, k, v, k_rows, v_rows, k_stride, v_stride,
        0, unmasked, seen, length, scale, D, MAIN, TAIL, BLOCK_N, False,
    )  # fmt: skip
    acc, acc_tail, row_sum, row_max = _attention_inner(
        acc, acc_tail, row_sum, row_max, q_main, q_tail, k, v, k_rows, v_rows, k_stride, v_stride,
        unmasked, end, seen, length, scale, D, MAIN, TAIL, BLOCK_N, True,
    )  # fmt: skip

    out += (start * H + head) * D
    out_rows = rows.to(tl.int64) * (H * D)
    store_head(out, acc / row_sum[:, None], out_rows, inside, 0, MAIN, D)
    if TAIL:
        store_head(out, acc_tail / row_sum[:, None], out_rows, inside, MAIN, TAIL, D)
    natural = (row_max * scale + tl.log2(row_sum)) * 0.6931471805599453
    tl.store(lse + head.to(tl.int64) * T + start + rows, natural, mask=inside)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, key_ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and the log-sum-exp of the scaled scores (H, T) float32; see ``packed_attention``."""
    name = "packed_attention"
    check(q.ndim == 3 and k.ndim == 3, f"{name}: q and k must be (rows, heads, channels)")
    T, H, D = q.shape
    G = k.shape[1]
    check_float(q, f"{name}: q")
    check(k.dtype == v.dtype == q.dtype, f"{name}: k is {k.dtype} and v {v.dtype}, must be {q.dtype} like q")
    check(D <= 256, f"{name}: head dim {D}, must be at most 256")
    check(k.shape == v.shape == (T, G, D), f"{name}: k {tuple(k.shape)}, v {tuple(v.shape)}, must be ({T}, heads, {D})")
    check(G > 0 and H % G == 0, f"{name}: {H} query heads are no multiple of {G} key heads")
    offsets = cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1 and len(cu_seqlens) > 0
    check(offsets, f"{name}: cu_seqlens must be (documents + 1,) int32")
    if key_ends is not None:
        check(causal, f"{name}: key_ends are for causal attention only")
        fits = key_ends.dtype == torch.int32 and key_ends.shape == (T,)
        check(fits, f"{name}: key_ends must be ({T},) int32")
    out = q.new_empty((T, H, D))
    lse = q.new_empty((H, T), dtype=torch.float32)
    q, k, v = contiguous_heads(q), contiguous_heads(k), contiguous_heads(v)
    config = FORWARD.pick(head_dim_case(D, q.dtype), q.device)
    main, tail = split_head_dim(D)
    tiles = schedule_tiles(cu_seqlens, T, max_seqlen, config["BLOCK_M"], causal)
    if len(tiles):
        with torch.cuda.device_of(q):
            _forward_kernel[(len(tiles), H)](
                q, k, v, out, lse, cu_seqlens, tiles, key_ends, q.stride(0), k.stride(0), v.stride(0), T, H, H // G,
                1 / math.sqrt(D), CAUSAL=causal, EXTENDED=key_ends is not None, D=D, MAIN=main, TAIL=tail, **config,
            )  # fmt: skip
    return out, lse


forward = torch.library.custom_op("phi4rv_triton::packed_attention", launch_forward, mutates_args=())


@forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, key_ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, max_seqlen, causal, key_ends = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, key_ends)
    ctx.max_seqlen, ctx.causal = max_seqlen, causal
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, key_ends = ctx.saved_tensors
    if dout is None:
        return (None,) * 7
    grads = packed_attention_backward.backward(
        dout, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, ctx.causal, key_ends
    )
    return *grads, None, None, None, None


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    key_ends: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v inside each document of a packed row. Returns (T, H, D).

    q (T, H, D), k and v (T, G, D) of one dtype, D ≤ 256, H a multiple of G: query head h reads key head h // (H // G).
    Views of a row that holds queries, keys and values are read in place. cu_seqlens (N+1,) int32: document n is rows
    cu_seqlens[n]:cu_seqlens[n+1], and together they are all T rows; max_seqlen bounds their lengths. Causal: a row sees
    itself and what precedes it in its document. key_ends (T,) int32, causal only: row t sees the keys of its document
    before max(t + 1, key_ends[t]), counted in the packed row; inside a document they may not decrease. ValueError for
    anything else that shapes and dtypes tell.

    The same input gives the same bits, gradients included; see ``packed_attention_backward``.
    """
    return forward(q, k, v, cu_seqlens, max_seqlen, causal, key_ends)[0]
