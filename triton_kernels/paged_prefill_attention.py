"""Attention of packed runs of new tokens against a paged cache that holds them already: the next chunk of a prompt
(FlashAttention-2, Dao 2023, over the pages of Kwon et al. 2023). Inference only: there is no gradient.

Query heads that share a key head lie side by side in a tile: its 128 rows are 32 tokens of 4 heads, not 128 tokens of
one. Keys are then fetched once for all of them, a short run fills more of its tile, and fewer scores above the
diagonal are computed. A block of keys inside one page has one entry of the page table and one address; where pages
are smaller each key has its own. 4·D operations a score.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.cache import (
    check_cache,
    check_int_tensor,
    floor_to_power_of_two,
    fp8_as_bytes,
    fp8_to_fp16,
    scale_stride,
)
from triton_kernels.common.launch import check
from triton_kernels.common.schedule import (
    contiguous_heads,
    head_dim_case,
    load_head,
    load_tile,
    online_softmax_step,
    schedule_tiles,
    split_head_dim,
    store_head,
)
from triton_kernels.common.tuning import SearchSpace, make_configs

_CONFIG = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")

# By head dim; "of 8": a cache in float8.
FORWARD = SearchSpace(
    "paged_prefill_attention.forward",
    {
        "64": make_configs(_CONFIG, (128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "64 of 8": make_configs(_CONFIG, (128, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        "72": make_configs(_CONFIG, (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "72 of 8": make_configs(_CONFIG, (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "128": make_configs(_CONFIG, (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 8, 4), (64, 64, 4, 2)),
        "128 of 8": make_configs(_CONFIG, (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)),
        "other": make_configs(_CONFIG, (64, 64, 4, 2)),
        "other of 8": make_configs(_CONFIG, (64, 64, 4, 2)),
        "float32": make_configs(_CONFIG, (32, 32, 4, 2)),
        "float32 of 8": make_configs(_CONFIG, (32, 32, 4, 2)),
    },
)


@triton.jit
def _load_page_ids(pages, n, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of the block of keys from n on or, if it may lie in several, of each key; past ``end`` none is read."""
    if PAGE % BLOCK_N == 0:
        page = tl.load(pages + n // PAGE, mask=n < end, other=0)
    else:
        keys = n + tl.arange(0, BLOCK_N)
        page = tl.load(pages + keys.to(tl.uint32) // PAGE, mask=keys < end, other=0)
    return page.to(tl.int64)


@triton.jit
def _block_address(x, page, n, page_stride, row_stride, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr):
    """Where the block of keys from n on begins, and its rows from there."""
    rows = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        x += tl.multiple_of(page * page_stride + tl.cast(n % PAGE, tl.int64) * row_stride, ALIGN)
        offsets = rows.to(tl.int64) * row_stride
    else:
        offsets = page * page_stride + ((n + rows).to(tl.uint32) % PAGE).to(tl.int64) * row_stride
    return x, tl.multiple_of(offsets, ALIGN)


@triton.jit
def _load_cache(
    x, rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """``load_head`` of a cache, in DTYPE."""
    value = load_head(x, rows, inside, FIRST, WIDTH, D, MASKED)
    return fp8_to_fp16(value).to(DTYPE) if value.dtype == tl.uint8 else value


@triton.jit
def _attention_inner(
    acc, acc_tail, row_sum, row_max, q_main, q_tail, k, v, pages, k_page, k_row, v_page, v_row, first, end, seen,
    scale_log2, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys from first to end to a tile's state."""
    # One block ahead: a load that waits for another load would leave the pipeline shallow.
    page = _load_page_ids(pages, first, end, PAGE, BLOCK_N)
    for n in range(first, end, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        inside = keys < end
        kn, k_rows = _block_address(k, page, n, k_page, k_row, PAGE, BLOCK_N, ALIGN)
        vn, v_rows = _block_address(v, page, n, v_page, v_row, PAGE, BLOCK_N, ALIGN)
        page = _load_page_ids(pages, n + BLOCK_N, end, PAGE, BLOCK_N)
        s = tl.dot(
            q_main, tl.trans(_load_cache(kn, k_rows, inside, 0, MAIN, D, MASKED, q_main.dtype)), input_precision="ieee"
        )
        if TAIL:
            k_tail = _load_cache(kn, k_rows, inside, MAIN, TAIL, D, MASKED, q_main.dtype)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision="ieee")
        if MASKED:
            s = tl.where(keys[None, :] < seen[:, None], s, float("-inf"))
        p, rescale, row_sum, row_max = online_softmax_step(s, row_sum, row_max, scale_log2, q_main.dtype)
        v_main = _load_cache(vn, v_rows, inside, 0, MAIN, D, MASKED, q_main.dtype)
        acc = tl.dot(p, v_main, acc * rescale[:, None], input_precision="ieee")
        if TAIL:
            v_tail = _load_cache(vn, v_rows, inside, MAIN, TAIL, D, MASKED, q_main.dtype)
            acc_tail = tl.dot(p, v_tail, acc_tail * rescale[:, None], input_precision="ieee")
    return acc, acc_tail, row_sum, row_max


@triton.jit(do_not_specialize=["pages_document"])
def _forward_kernel(
    q, k, v, pages, lengths, cu_seqlens, tiles, k_scale, v_scale, out, scale,
    q_token, k_page, k_row, k_head, v_page, v_row, v_head, pages_document, k_scale_head, v_scale_head, H, SHARED,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, start, run = load_tile(tiles, cu_seqlens)
    if block < 0:
        return
    document = tl.load(tiles + 2 * tl.program_id(0)).to(tl.int64)
    before = tl.load(lengths + document).to(tl.int32) - run
    pages += document * pages_document
    g = tl.program_id(1) * PACKED // SHARED
    k += tl.multiple_of(g.to(tl.int64) * k_head, ALIGN)
    v += tl.multiple_of(g.to(tl.int64) * v_head, ALIGN)

    TOKENS: tl.constexpr = BLOCK_M // PACKED
    rows = tl.arange(0, BLOCK_M)
    token = block * TOKENS + rows // PACKED
    head = tl.program_id(1) * PACKED + rows % PACKED
    inside = token < run
    # D is a constant here so that the compiler sees addresses of 16 bytes.
    q_rows = token.to(tl.int64) * q_token + head * D
    q += start * q_token
    q_main = load_head(q, q_rows, inside, 0, MAIN, D, True)
    q_tail = load_head(q, q_rows, inside, MAIN, TAIL, D, True) if TAIL else q_main

    scale_log2 = tl.zeros((BLOCK_M,), tl.float32) + scale
    if k.dtype.element_ty == tl.uint8 and q_main.dtype != tl.float32:
        # As in decode_attention: products in float16, each row brought into its range by a power of two.
        wide, wide_tail = q_main.to(tl.float32), q_tail.to(tl.float32)
        unit = floor_to_power_of_two(tl.maximum(tl.max(tl.abs(wide), 1), tl.max(tl.abs(wide_tail), 1)))
        q_main = (wide / unit[:, None]).to(tl.float16)
        q_tail = (wide_tail / unit[:, None]).to(tl.float16)
        scale_log2 *= unit
    if k_scale is not None:
        by = tl.load(k_scale + g * k_scale_head)
        # The largest score of a row must stay the largest, and what is hidden, at -inf, must stay there.
        q_main = tl.where(by < 0, -q_main, q_main)
        q_tail = tl.where(by < 0, -q_tail, q_tail)
        scale_log2 *= tl.abs(by)
    scale_log2 = tl.maximum(scale_log2, 1.1754944e-38)

    first = before + block * TOKENS + 1  # keys that the tile's first token sees
    end = tl.maximum(tl.minimum(first + TOKENS - 1, before + run), 0)
    unmasked = tl.maximum(first, 0) // BLOCK_N * BLOCK_N
    seen = before + token + 1
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, acc_tail, row_sum, row_max = _attention_inner(
        acc, acc_tail, row_sum, row_max, q_main, q_tail, k, v, pages, k_page, k_row, v_page, v_row,
        0, unmasked, seen, scale_log2, D, MAIN, TAIL, PAGE, ALIGN, BLOCK_N, False,
    )  # fmt: skip
    acc, acc_tail, row_sum, row_max = _attention_inner(
        acc, acc_tail, row_sum, row_max, q_main, q_tail, k, v, pages, k_page, k_row, v_page, v_row,
        unmasked, end, seen, scale_log2, D, MAIN, TAIL, PAGE, ALIGN, BLOCK_N, True,
    )  # fmt: skip

    share = 1 / tl.where(row_sum == 0, 1.0, row_sum)  # of a document without keys it is 0
    if v_scale is not None:
        share *= tl.load(v_scale + g * v_scale_head)
    out += start * H * D
    out_rows = token.to(tl.int64) * (H * D) + head * D
    store_head(out, acc * share[:, None], out_rows, inside, 0, MAIN, D)
    if TAIL:
        store_head(out, acc_tail * share[:, None], out_rows, inside, MAIN, TAIL, D)


def launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """See ``paged_prefill_attention``."""
    name = "paged_prefill_attention"
    shape = tuple(k_pages.shape)
    check(q.ndim == 3, f"{name}: q has shape {tuple(q.shape)}, must be (tokens, heads, head dim)")
    check(k_pages.ndim == 4, f"{name}: k has shape {shape}, must be (pages, page size, key heads, head dim)")
    check_cache(name, q, k_pages, v_pages, k_scale, v_scale)
    size = k_pages.shape[1]
    check(size > 0, f"{name}: k has shape {shape}: a page must hold a row")
    check(page_table.ndim == 2, f"{name}: page_table has shape {tuple(page_table.shape)}, must be (documents, pages)")
    B = len(page_table)
    check_int_tensor(name, "page_table", page_table, (B, page_table.shape[1]))
    check_int_tensor(name, "lengths", lengths, (B,))
    offsets = cu_seqlens.dtype == torch.int32 and cu_seqlens.shape == (B + 1,)
    check(offsets, f"{name}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, must be int32 ({B + 1},)")

    T, H, D = q.shape
    q, k, v = contiguous_heads(q), fp8_as_bytes(k_pages), fp8_as_bytes(v_pages)
    pages = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    lengths, cu_seqlens = lengths.contiguous(), cu_seqlens.contiguous()
    out = q.new_empty((T, H, D))
    fp8 = k.dtype == torch.uint8
    config = FORWARD.pick(head_dim_case(D, q.dtype) + (" of 8" if fp8 else ""), q.device)
    shared = H // k.shape[2]
    packed = math.gcd(shared, config["BLOCK_M"])
    main, tail = split_head_dim(D)
    tiles = schedule_tiles(
        cu_seqlens, T, max_seqlen, config["BLOCK_M"] // packed, True, lengths=lengths, max_length=pages.shape[1] * size
    )
    if len(tiles) and H:
        with torch.cuda.device_of(q):
            _forward_kernel[(len(tiles), H // packed)](
                q, k, v, pages, lengths, cu_seqlens, tiles, k_scale, v_scale, out, math.log2(math.e) / math.sqrt(D),
                q.stride(0), *k.stride()[:3], *v.stride()[:3], pages.stride(0), scale_stride(k_scale),
                scale_stride(v_scale), H, shared, D=D, MAIN=main, TAIL=tail, PAGE=size,
                ALIGN=math.gcd(16, *k.stride()[:3], *v.stride()[:3]), PACKED=packed, **config,
            )  # fmt: skip
    return out


operator = torch.library.custom_op("phi4rv_triton::paged_prefill_attention", launch, mutates_args=())


@operator.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)


def paged_prefill_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Packed runs of new tokens against a paged cache that holds them already, without gradient.

    q (T, H, D), D ≤ 256: document b's new tokens are rows cu_seqlens[b] : cu_seqlens[b+1], the last of its lengths[b]
    rows, and each sees itself and what precedes it. cu_seqlens (B+1,) int32: together the runs are all T rows, any of
    them may be empty, and max_seqlen bounds them. lengths (B,) int32 or int64: at least the run, or 0 for a slot
    without a document, whose rows are zeros. k_pages, v_pages (pages, page size, G, D), H a multiple of G, any page
    size; page_table (B, most pages) int32 or int64: row i of document b is k_pages[page_table[b, i // size], i % size].
    Entries past a document's length are not read. k and v are of q's dtype, or float8_e4m3fn; k_scale, v_scale
    float32, () or (G,), multiply what is stored. Returns (T, H, D). ValueError for anything else that shapes and
    dtypes tell, and where the channels of k and v are not adjacent.
    """
    return operator(q, k_pages, v_pages, page_table, lengths, cu_seqlens, max_seqlen, k_scale, v_scale)
