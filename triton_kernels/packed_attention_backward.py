"""Gradients of packed attention: one kernel for those of the queries and one for those of the keys and values.

Nothing is added up in memory: each program owns the rows that it writes, walks over all that contribute to them in a
fixed order, and so the same input gives the same bits. The price is that scores and the products with v are computed
in both kernels, 7 products (14·D operations a score) instead of 5; with 5, one of the gradients must be accumulated by
atomics, whose order changes from run to run. Scores are recomputed from the log-sum-exp (FlashAttention-2, Dao 2023).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.schedule import (
    contiguous_heads,
    head_dim_case,
    load_head,
    load_tile,
    num_visible_keys,
    schedule_tiles,
    split_head_dim,
    store_head,
)
from triton_kernels.common.tuning import SearchSpace

DQ = SearchSpace(
    "packed_attention.dq",
    {
        "64": [
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        ],
        "72": [
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
            {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        ],
        "128": [
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
            {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        ],
        "other": [
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        ],
        "float32": [
            {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        ],
    },
)
DKDV = SearchSpace(
    "packed_attention.dkdv",
    {
        "64": [
            {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        ],
        "72": [
            {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
            {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        ],
        "128": [
            {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
            {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        ],
        "other": [
            {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        ],
        "float32": [
            {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        ],
    },
)


@triton.jit
def _dq_inner(
    dq, dq_tail, q_main, q_tail, do_main, do_tail, peak, delta, k, v, k_rows, v_rows, k_stride, v_stride,
    first, last, seen, length, scale,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from first to last give to the gradient of a tile of queries."""
    for n in range(first, last, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        inside = columns < length
        kn = k + tl.cast(n, tl.int64) * k_stride
        vn = v + tl.cast(n, tl.int64) * v_stride
        k_main = load_head(kn, k_rows, inside, 0, MAIN, D, MASKED)
        v_main = load_head(vn, v_rows, inside, 0, MAIN, D, MASKED)
        s = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
        dp = tl.dot(do_main, tl.trans(v_main), input_precision="ieee")
        if TAIL:
            k_tail = load_head(kn, k_rows, inside, MAIN, TAIL, D, MASKED)
            v_tail = load_head(vn, v_rows, inside, MAIN, TAIL, D, MASKED)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision="ieee")
            dp = tl.dot(do_tail, tl.trans(v_tail), dp, input_precision="ieee")
        if MASKED:
            s = tl.where(columns[None, :] < seen[:, None], s, float("-inf"))
        p = tl.exp2(s * scale - peak[:, None])
        ds = (p * (dp - delta[:, None])).to(q_main.dtype)
        dq = tl.dot(ds, k_main, dq, input_precision="ieee")
        if TAIL:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision="ieee")
    return dq, dq_tail


@triton.jit(do_not_specialize=["T"])
def _dq_kernel(
    q, k, v, out, dout, lse, delta, dq, cu_seqlens, tiles, key_ends, q_stride, k_stride, v_stride, T, H, GROUP, scale,
    CAUSAL: tl.constexpr, EXTENDED: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries. Leaves delta = sum(out · dout) of its rows for ``_dkdv_kernel``."""
    block, start, length = load_tile(tiles, cu_seqlens)
    if block < 0:
        return
    head = tl.program_id(1)
    q += start * q_stride + head * D
    k += start * k_stride + head // GROUP * D
    v += start * v_stride + head // GROUP * D
    row = (start * H + head) * D
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < length
    q_rows = rows.to(tl.int64) * q_stride
    out_rows = rows.to(tl.int64) * (H * D)
    k_rows = tl.arange(0, BLOCK_N).to(tl.int64) * k_stride
    v_rows = tl.arange(0, BLOCK_N).to(tl.int64) * v_stride
    q_main = load_head(q, q_rows, inside, 0, MAIN, D, True)
    do_main = load_head(dout + row, out_rows, inside, 0, MAIN, D, True)
    o = load_head(out + row, out_rows, inside, 0, MAIN, D, True)
    sums = tl.sum(o.to(tl.float32) * do_main.to(tl.float32), 1)
    q_tail, do_tail = q_main, do_main
    if TAIL:
        q_tail = load_head(q, q_rows, inside, MAIN, TAIL, D, True)
        do_tail = load_head(dout + row, out_rows, inside, MAIN, TAIL, D, True)
        o = load_head(out + row, out_rows, inside, MAIN, TAIL, D, True)
        sums += tl.sum(o.to(tl.float32) * do_tail.to(tl.float32), 1)
    statistics = head.to(tl.int64) * T + start + rows
    tl.store(delta + statistics, sums, mask=inside)
    peak = tl.load(lse + statistics, mask=inside, other=0.0) * 1.4426950408889634

    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, length) - 1
    seen = num_visible_keys(rows, start, length, key_ends, CAUSAL, EXTENDED)
    unmasked = num_visible_keys(first, start, length, key_ends, CAUSAL, EXTENDED) // BLOCK_N * BLOCK_N
    end = num_visible_keys(last, start, length, key_ends, CAUSAL, EXTENDED)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    base2 = scale * 1.4426950408889634
    acc, acc_tail = _dq_inner(
        acc, acc_tail, q_main, q_tail, do_main, do_tail, peak, sums, k, v, k_rows, v_rows, k_stride, v_stride,
        0, unmasked, seen, length, base2, D, MAIN, TAIL, BLOCK_N, False,
    )  # fmt: skip
    acc, acc_tail = _dq_inner(
        acc, acc_tail, q_main, q_tail, do_main, do_tail, peak, sums, k, v, k_rows, v_rows, k_stride, v_stride,
        unmasked, end, seen, length, base2, D, MAIN, TAIL, BLOCK_N, True,
    )  # fmt: skip
    store_head(dq + row, acc * scale, out_rows, inside, 0, MAIN, D)
    if TAIL:
        store_head(dq + row, acc_tail * scale, out_rows, inside, MAIN, TAIL, D)


@triton.jit
def _query_block(i, edges, last, MASKED: tl.constexpr):
    """The i-th block to visit: those on an edge come first, and what is masked beyond them is the last."""
    return tl.where(i < edges, i, last) if MASKED else i


@triton.jit
def _load_lse_and_delta(lse, delta, rows, length, MASKED: tl.constexpr):
    """lse and delta of these rows of a document."""
    if MASKED:  # a row past the end has no gradient, whatever its weights
        inside = rows < length
        return tl.load(lse + rows, mask=inside, other=0.0), tl.load(delta + rows, mask=inside, other=0.0)
    return tl.load(lse + rows), tl.load(delta + rows)


@triton.jit
def _dkdv_inner(
    dk, dk_tail, dv, dv_tail, k_main, k_tail, v_main, v_tail, q, dout, lse, delta, q_rows, out_rows, q_stride,
    out_stride, first, begin, end, edges, last, keys, start, length, key_ends, scale, unscale,
    CAUSAL: tl.constexpr, EXTENDED: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what blocks begin to end of queries give to the gradients of a tile of keys; blocks count from row first.

    MASKED: for blocks on an edge. From ``edges`` on, the one that is left is the last, cut off by the document's end.
    """
    if not MASKED:
        peak, sums = _load_lse_and_delta(lse, delta, first + begin * BLOCK_M + tl.arange(0, BLOCK_M), length, True)
    for i in range(begin, end):
        m = first + _query_block(i, edges, last, MASKED) * BLOCK_M
        rows = m + tl.arange(0, BLOCK_M)
        inside = rows < length
        qm = q + tl.cast(m, tl.int64) * q_stride
        dom = dout + tl.cast(m, tl.int64) * out_stride
        q_main = load_head(qm, q_rows, inside, 0, MAIN, D, MASKED)
        do_main = load_head(dom, out_rows, inside, 0, MAIN, D, MASKED)
        if MASKED:
            peak, sums = _load_lse_and_delta(lse, delta, rows, length, True)
        # The products start from what is subtracted from them: it then needs no registers of its own.
        s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) - (peak * unscale)[None, :]
        dp = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) - sums[None, :]
        s = tl.dot(k_main, tl.trans(q_main), s, input_precision="ieee")
        dp = tl.dot(v_main, tl.trans(do_main), dp, input_precision="ieee")
        if TAIL:
            q_tail = load_head(qm, q_rows, inside, MAIN, TAIL, D, MASKED)
            do_tail = load_head(dom, out_rows, inside, MAIN, TAIL, D, MASKED)
            s = tl.dot(k_tail, tl.trans(q_tail), s, input_precision="ieee")
            dp = tl.dot(v_tail, tl.trans(do_tail), dp, input_precision="ieee")
        if MASKED and CAUSAL:
            seen = num_visible_keys(rows, start, length, key_ends, CAUSAL, EXTENDED)
            s = tl.where(keys[:, None] < seen[None, :], s, float("-inf"))
        p = tl.exp2(s * scale)
        ds = (p * dp).to(k_main.dtype)
        p = p.to(k_main.dtype)
        dv = tl.dot(p, do_main, dv, input_precision="ieee")
        dk = tl.dot(ds, q_main, dk, input_precision="ieee")
        if TAIL:
            dv_tail = tl.dot(p, do_tail, dv_tail, input_precision="ieee")
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision="ieee")
        if not MASKED:  # the next block's, while the products run: Triton would load them when they are needed
            m = first + tl.minimum(i + 1, end - 1) * BLOCK_M
            peak, sums = _load_lse_and_delta(lse, delta, m + tl.arange(0, BLOCK_M), length, False)
    return dk, dk_tail, dv, dv_tail


@triton.jit
def _first_query_seeing(count, start, length, key_ends, EXTENDED: tl.constexpr):
    """The first row of a document that sees ``count`` of its keys, causal."""
    row = count - 1
    if EXTENDED:
        low = row * 0
        while low < row:
            middle = (low + row) // 2
            sees = num_visible_keys(middle, start, length, key_ends, True, EXTENDED) >= count
            low = tl.where(sees, low, middle + 1)
            row = tl.where(sees, middle, row)
    return row


@triton.jit(do_not_specialize=["T"])
def _dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_seqlens, tiles, key_ends, q_stride, k_stride, v_stride, T, H, G, scale,
    CAUSAL: tl.constexpr, EXTENDED: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values, over the queries of every head that reads them."""
    block, start, length = load_tile(tiles, cu_seqlens)
    if block < 0:
        return
    group = tl.program_id(1)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < length
    k_rows = keys.to(tl.int64) * k_stride
    v_rows = keys.to(tl.int64) * v_stride
    k += start * k_stride + group * D
    v += start * v_stride + group * D
    k_main = load_head(k, k_rows, inside, 0, MAIN, D, True)
    v_main = load_head(v, v_rows, inside, 0, MAIN, D, True)
    k_tail = load_head(k, k_rows, inside, MAIN, TAIL, D, True) if TAIL else k_main
    v_tail = load_head(v, v_rows, inside, MAIN, TAIL, D, True) if TAIL else v_main

    # Blocks of queries, counted from the first that sees a key of the tile: ``edges`` that may not see all of them,
    # ``full`` that do, and then perhaps one cut off by the document's end.
    first = block * 0
    edges = first
    if CAUSAL:
        n = block * BLOCK_N
        first = _first_query_seeing(n + 1, start, length, key_ends, EXTENDED)
        whole = _first_query_seeing(tl.minimum(n + BLOCK_N, length), start, length, key_ends, EXTENDED)
        edges = (whole - first + BLOCK_M - 1) // BLOCK_M
    total = (length - first + BLOCK_M - 1) // BLOCK_M
    full = tl.maximum((length - first) // BLOCK_M - edges, 0)

    dk_acc = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dk_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)
    dv_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)
    q_rows = tl.arange(0, BLOCK_M).to(tl.int64) * q_stride
    out_rows = tl.arange(0, BLOCK_M).to(tl.int64) * (H * D)
    base2 = scale * 1.4426950408889634
    for head in range(group * (H // G), (group + 1) * (H // G)):
        q_head = q + start * q_stride + head * D
        do_head = dout + start * (H * D) + head * D
        lse_head = lse + tl.cast(head, tl.int64) * T + start
        delta_head = delta + tl.cast(head, tl.int64) * T + start
        dk_acc, dk_tail, dv_acc, dv_tail = _dkdv_inner(
            dk_acc, dk_tail, dv_acc, dv_tail, k_main, k_tail, v_main, v_tail, q_head, do_head, lse_head, delta_head,
            q_rows, out_rows, q_stride, H * D, first, 0, total - full, edges, total - 1, keys, start, length,
            key_ends, base2, 1 / scale, CAUSAL, EXTENDED, D, MAIN, TAIL, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        dk_acc, dk_tail, dv_acc, dv_tail = _dkdv_inner(
            dk_acc, dk_tail, dv_acc, dv_tail, k_main, k_tail, v_main, v_tail, q_head, do_head, lse_head, delta_head,
            q_rows, out_rows, q_stride, H * D, first, edges, edges + full, edges, total - 1, keys, start, length,
            key_ends, base2, 1 / scale, CAUSAL, EXTENDED, D, MAIN, TAIL, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    # Found again: kept over the loops, the addresses would take the registers that they lack.
    block, start, length = load_tile(tiles, cu_seqlens)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < length
    row = (start * G + group) * D
    rows = keys.to(tl.int64) * (G * D)
    store_head(dk + row, dk_acc * scale, rows, inside, 0, MAIN, D)
    store_head(dv + row, dv_acc, rows, inside, 0, MAIN, D)
    if TAIL:
        store_head(dk + row, dk_tail * scale, rows, inside, MAIN, TAIL, D)
        store_head(dv + row, dv_tail, rows, inside, MAIN, TAIL, D)


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    key_ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, adjacent, from that of out; ``packed_attention`` says what the rest is."""
    T, H, D = q.shape
    G = k.shape[1]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    q, k, v, dout, out = (
        contiguous_heads(q),
        contiguous_heads(k),
        contiguous_heads(v),
        dout.contiguous(),
        out.contiguous(),
    )
    for_queries, for_keys = (space.pick(head_dim_case(D, q.dtype), q.device) for space in (DQ, DKDV))
    query_tiles = schedule_tiles(cu_seqlens, T, max_seqlen, for_queries["BLOCK_M"], causal)
    key_tiles = schedule_tiles(cu_seqlens, T, max_seqlen, for_keys["BLOCK_N"], causal, reverse=True)
    main, tail = split_head_dim(D)
    constants = {"CAUSAL": causal, "EXTENDED": key_ends is not None, "D": D, "MAIN": main, "TAIL": tail}
    strides = q.stride(0), k.stride(0), v.stride(0)
    scale = 1 / math.sqrt(D)
    if len(query_tiles):
        with torch.cuda.device_of(q):
            _dq_kernel[(len(query_tiles), H)](
                q, k, v, out, dout, lse, delta, dq, cu_seqlens, query_tiles, key_ends, *strides, T, H, H // G, scale,
                **constants, **for_queries,
            )  # fmt: skip
            _dkdv_kernel[(len(key_tiles), G)](
                q, k, v, dout, lse, delta, dk, dv, cu_seqlens, key_tiles, key_ends, *strides, T, H, G, scale,
                **constants, **for_keys,
            )  # fmt: skip
    return dq, dk, dv


backward = torch.library.custom_op("phi4rv_triton::packed_attention_backward", launch_backward, mutates_args=())


@backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    key_ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
