"""What the packed attention kernels share: the tile scheduler, which keys a row sees, how a head of any width is fits,
and the online softmax.

A tile is a block of rows of one document. Each head runs its tiles longest first: a long document among short ones
then starts at once instead of last, and the short ones fill the end (Graham's longest processing time rule).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _blocks(cu_seqlens, lengths, documents, N, ROWS: tl.constexpr):
    """How many blocks documents have, and how many more blocks the first of them visits in the cache before it."""
    real = documents < N
    starts = tl.load(cu_seqlens + documents, mask=real, other=0)
    rows = tl.load(cu_seqlens + documents + 1, mask=real, other=0) - starts
    before = rows * 0
    if lengths is not None:
        before = tl.maximum(tl.load(lengths + documents, mask=real, other=0).to(tl.int32) - rows, 0) // ROWS
    return (rows + ROWS - 1) // ROWS, before


@triton.jit(do_not_specialize=["N", "slots"])
def _schedule_kernel(
    cu_seqlens, lengths, tiles, N, slots,
    CAUSAL: tl.constexpr, REVERSED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Places the tiles of one cost. Causal, a document has one of each cost up to its number of blocks; else as many
    as blocks, all of that cost."""
    cost = tl.program_id(0) + 1
    next_slot = 0
    for first in range(0, N, CHUNK):
        blocks, before = _blocks(cu_seqlens, lengths, first + tl.arange(0, CHUNK), N, ROWS)
        costlier = tl.where(blocks > cost, blocks, 0)
        if CAUSAL:
            costlier = tl.minimum(tl.maximum(before + blocks - cost, 0), blocks)
        next_slot += tl.sum(costlier, 0)
    for first in range(0, N, CHUNK):
        documents = first + tl.arange(0, CHUNK)
        blocks, before = _blocks(cu_seqlens, lengths, documents, N, ROWS)
        own = cost - before
        here = (own > 0) & (blocks >= own) if CAUSAL else blocks == cost
        each = 1 if CAUSAL else cost
        count = here.to(tl.int32) * each
        first_slot = next_slot + tl.cumsum(count, 0) - count
        for i in range(0, each):
            block = i
            if CAUSAL:
                block = blocks - cost if REVERSED else own - 1
            fits = here & (first_slot + i < slots)
            tl.store(tiles + 2 * (first_slot + i), documents, mask=fits)
            tl.store(tiles + 2 * (first_slot + i) + 1, block, mask=fits)
        next_slot += tl.sum(count, 0)
    if cost == 1:  # the cheapest come last; at most N slots are left over
        for first in range(0, N, CHUNK):
            rest = next_slot + first + tl.arange(0, CHUNK)
            tl.store(tiles + 2 * rest, -1, mask=rest < slots)


def schedule_tiles(
    cu_seqlens: Tensor,
    T: int,
    max_seqlen: int,
    rows: int,
    causal: bool,
    reverse: bool = False,
    lengths: Tensor | None = None,
    max_length: int = 0,
) -> Tensor:
    """The tiles of ``rows`` rows as (slots, 2) int32: document and block, costliest first; document -1: no tile.

    The number of slots depends on the shapes alone and nothing is read back, so that a CUDA graph can hold the launch.
    The cost is the number of blocks that a tile visits: with ``causal`` those up to its own, or, with ``reverse``,
    those from its own on (tiles of keys, which visit queries). ``lengths`` (N,), causal only: a document's rows are
    the last of this many, at most ``max_length``, all of which its tiles visit.
    """
    N = len(cu_seqlens) - 1
    most = triton.cdiv(min(max_seqlen, T), rows)
    slots = min(T // rows + N, N * most)
    tiles = cu_seqlens.new_empty((slots, 2), dtype=torch.int32)
    if slots:
        costs = max(most, triton.cdiv(max_length, rows))
        with torch.cuda.device_of(cu_seqlens):
            _schedule_kernel[(costs,)](
                cu_seqlens, lengths, tiles, N, slots, causal, causal and reverse, rows, CHUNK=256, num_warps=4
            )
    return tiles


def split_head_dim(D: int) -> tuple[int, int]:
    """A head dim as two powers of two, at least 16 each: 72 is 64 + 16. One and 0 where two save nothing."""
    whole = max(16, triton.next_power_of_2(D))
    main = max(16, whole // 2)
    tail = max(16, triton.next_power_of_2(D - main)) if main < D else 0
    return (main, tail) if main + tail < whole else (whole, 0)


def head_dim_case(D: int, dtype: torch.dtype) -> str:
    """The case of a head dim in the search spaces. float32 takes twice the memory and no tensor cores."""
    if dtype == torch.float32:
        return "float32"
    return str(D) if D in (64, 72, 128) else "other"


def contiguous_heads(x: Tensor) -> Tensor:
    """x (T, heads, D) with its heads side by side, as in a row of queries, keys and values; copied only if not."""
    D = x.shape[2]
    return x if x.stride(2) == 1 and x.stride(1) == D else x.contiguous()


@triton.jit
def load_tile(tiles, cu_seqlens):
    """This program's tile: block (-1: nothing to do), first row of its document in the packed row, its length."""
    slot = tl.program_id(0)
    document = tl.load(tiles + 2 * slot)
    block = tl.load(tiles + 2 * slot + 1, mask=document >= 0, other=-1)
    start = tl.load(cu_seqlens + document, mask=document >= 0, other=0)
    length = tl.load(cu_seqlens + document + 1, mask=document >= 0, other=0) - start
    return block, start.to(tl.int64), length


@triton.jit
def num_visible_keys(rows, start, length, key_ends, CAUSAL: tl.constexpr, EXTENDED: tl.constexpr):
    """How many keys of their document these rows see; does not decrease with the row."""
    seen = rows * 0 + length
    if CAUSAL:
        seen = tl.minimum(rows + 1, seen)
    if EXTENDED:
        ends = tl.load(key_ends + start + rows, mask=rows < length, other=0) - start.to(tl.int32)
        seen = tl.minimum(tl.maximum(ends, seen), length)
    return seen


@triton.jit
def online_softmax_step(s, row_sum, row_max, scale, dtype: tl.constexpr):
    """Online softmax over the scores s of one block of keys: their weights in dtype, the factor that rescales what was
    accumulated so far, the new row_sum and row_max. scale: of each row, scores to exponents of 2, positive."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    if dtype == tl.bfloat16:
        p = tl.exp2(s * scale[:, None] - (new_max * scale)[:, None])
    else:
        # In one fused operation scores of 1e9 round to exponents up to 64, and 2^64 does not fit float16.
        p = tl.exp2((s - new_max[:, None]) * scale[:, None])
    rescale = tl.exp2((row_max - new_max) * scale)
    return p.to(dtype), rescale, row_sum * rescale + tl.sum(p, 1), new_max


@triton.jit
def load_head(x, rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Channels FIRST to FIRST + WIDTH of a head at x, of rows at these offsets; 0 past D and, if MASKED, outside."""
    channels = FIRST + tl.arange(0, WIDTH)
    pointers = x + rows[:, None] + channels[None, :]
    if FIRST + WIDTH <= D:
        if MASKED:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        return tl.load(pointers)
    if MASKED:
        return tl.load(pointers, mask=inside[:, None] & (channels < D)[None, :], other=0.0)
    return tl.load(pointers, mask=(channels < D)[None, :], other=0.0)


@triton.jit
def store_head(x, value, rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The counterpart of ``load_head``, in the dtype of x."""
    channels = FIRST + tl.arange(0, WIDTH)
    mask = inside[:, None] & (channels < D)[None, :]
    tl.store(x + rows[:, None] + channels[None, :], value.to(x.dtype.element_ty), mask=mask)
