"""Attention of a few new tokens against a cache: split-KV, the splits combined exactly (Flash-Decoding, Dao et
al. 2023). Inference only: there is no gradient.

Memory-bound: every row of the cache is read once. The query heads that share a key head, times the new tokens, are the
rows of one tile, so grouped queries read their keys together. How many parts the keys are split into depends on shapes
alone, where each part begins on the device's own lengths: nothing waits for the host, and a CUDA graph can be replayed
while documents grow.
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
from triton_kernels.common.launch import check, num_sms
from triton_kernels.common.tuning import SearchSpace, make_configs

# RESIDENT: blocks a multiprocessor that the keys are split for; the launch function's own, not the kernel's.
_CONFIG = ("BLOCK_N", "num_warps", "num_stages", "RESIDENT")
# By head dim, rounded up, and bits of a cached number.
SPLIT = SearchSpace(
    "decode_attention.part",
    {
        "64 of 8": make_configs(_CONFIG, (128, 4, 4, 2), (128, 4, 3, 3), (256, 8, 3, 2), (64, 4, 4, 4)),
        "64 of 16": make_configs(_CONFIG, (128, 4, 3, 2), (64, 4, 4, 3), (64, 4, 3, 4), (128, 8, 3, 2)),
        "64 of 32": make_configs(_CONFIG, (64, 8, 3, 2)),
        "128 of 8": make_configs(_CONFIG, (64, 4, 4, 3), (128, 4, 3, 2), (64, 4, 3, 3), (128, 8, 4, 1)),
        "128 of 16": make_configs(_CONFIG, (64, 4, 4, 2), (64, 4, 3, 3), (32, 4, 4, 3), (128, 8, 3, 1), (64, 4, 2, 3)),
        "128 of 32": make_configs(_CONFIG, (16, 8, 3, 2)),
        "256 of 8": make_configs(_CONFIG, (64, 8, 3, 2)),
        "256 of 16": make_configs(_CONFIG, (32, 4, 3, 2), (64, 8, 3, 1)),
        "256 of 32": make_configs(_CONFIG, (16, 8, 3, 2)),
    },
)
COMBINE = SearchSpace(
    "decode_attention.merge", {"row": [{"BLOCK_D": b, "num_warps": w} for b, w in ((64, 4), (32, 4), (128, 8))]}
)
MAX_SPLITS = 128
MAX_ROWS = 32  # of a tile; more rows than that run as more programs
# Keys a part begins at a multiple of: fine enough that all parts are alike, and a short document has few.
GRAIN = tl.constexpr(16)


# What varies from batch to batch is not compiled in.
@triton.jit(do_not_specialize=["pages_document", "PARTS"])
def _split_kernel(
    q, k, v, pages, starts, lengths, k_scale, v_scale, out, lse, scale,
    q_document, q_token, q_head, k_page, k_row, k_head, v_page, v_row, v_head, pages_document,
    k_scale_head, v_scale_head, M, G, PARTS,
    SHARED: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, FP8: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Key heads lie beside each other in memory: they run beside each other too.
    program = tl.program_id(0)
    tile = program % TILES
    g = program // TILES % G
    part = program // (TILES * G) % PARTS
    b = (program // (TILES * G) // PARTS).to(tl.int64)

    length = tl.load(lengths + b).to(tl.int32)
    grains = tl.cdiv(length, GRAIN).to(tl.int64)
    first = (grains * part // PARTS * GRAIN).to(tl.int32)
    end = tl.minimum((grains * (part + 1) // PARTS * GRAIN).to(tl.int32), length)

    cols = tl.arange(0, BLOCK_D)
    wanted = cols[None, :] < D
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = (rows // SHARED).to(tl.int64)
    head = (g * SHARED + rows % SHARED).to(tl.int64)
    real = token < M
    row = b * q_document + token * q_token + head * q_head
    x = tl.load(q + row[:, None] + cols[None, :], mask=real[:, None] & wanted, other=0.0)
    seen = tl.minimum(end, length - M + 1 + token.to(tl.int32))

    factor = tl.zeros((BLOCK_M,), tl.float32) + scale
    if FP8 and x.dtype != tl.float32:
        # Products in float16, where a code costs one instruction less than in bfloat16: a power of two brings each
        # row into its range.
        wide = x.to(tl.float32)
        unit = floor_to_power_of_two(tl.max(tl.abs(wide), 1))
        x = (wide / unit[:, None]).to(tl.float16)
        factor *= unit
    if k_scale is not None:
        factor *= tl.load(k_scale + g * k_scale_head)

    # A head's stride may be an odd multiple of 8: without this hint loads would be 2 bytes wide.
    k += tl.multiple_of(g.to(tl.int64) * k_head, ALIGN)
    v += tl.multiple_of(g.to(tl.int64) * v_head, ALIGN)
    if PAGE == 0:
        begin = tl.load(starts + b).to(tl.int64)
        k += tl.multiple_of(begin * k_row, ALIGN)
        v += tl.multiple_of(begin * v_row, ALIGN)
    else:
        pages += b * pages_document
        # One block ahead: a load that waits for another load would leave the pipeline shallow.
        keys = first + tl.arange(0, BLOCK_N)
        page = tl.load(pages + keys.to(tl.uint32) // PAGE, mask=keys < end, other=0)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(first, end, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        inside = keys < end
        if PAGE == 0:
            k_rows = keys.to(tl.int64) * k_row
            v_rows = keys.to(tl.int64) * v_row
        else:
            within = (keys.to(tl.uint32) % PAGE).to(tl.int64)
            k_rows = page.to(tl.int64) * k_page + within * k_row
            v_rows = page.to(tl.int64) * v_page + within * v_row
            ahead = keys + BLOCK_N
            page = tl.load(pages + ahead.to(tl.uint32) // PAGE, mask=ahead < end, other=0)
        k_rows = tl.multiple_of(k_rows, ALIGN)
        v_rows = tl.multiple_of(v_rows, ALIGN)
        mask = inside[:, None] if WHOLE else inside[:, None] & wanted
        kt = tl.load(k + k_rows[:, None] + cols[None, :], mask=mask, other=0.0)
        if FP8:
            kt = fp8_to_fp16(kt).to(x.dtype)
        s = tl.dot(x, tl.trans(kt), input_precision="ieee") * factor[:, None]
        s = tl.where(keys[None, :] < seen[:, None], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - safe_max[:, None])
        rescale = tl.exp2(row_max - safe_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        vt = tl.load(v + v_rows[:, None] + cols[None, :], mask=mask, other=0.0)
        if FP8:
            vt = fp8_to_fp16(vt).to(x.dtype)
        acc = acc * rescale[:, None] + tl.dot(p.to(vt.dtype), vt, input_precision="ieee")
        row_max = new_max

    some = row_sum > 0
    acc /= tl.where(some, row_sum, 1.0)[:, None]
    if v_scale is not None:
        acc *= tl.load(v_scale + g * v_scale_head)
    row = ((b * M + token) * (G * SHARED) + head) * PARTS + part
    place = out + row[:, None] * D + cols[None, :]
    if lse is None:
        tl.store(place, acc.to(out.dtype.element_ty), mask=real[:, None] & wanted)
    else:
        tl.store(place, acc, mask=(real & some)[:, None] & wanted)
        tl.store(lse + row, tl.where(some, row_max + tl.log2(row_sum), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["PARTS"])
def _combine_kernel(parts, lse, out, PARTS, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split_lse = tl.load(lse + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    max_lse = tl.max(split_lse, 0)
    weight = tl.exp2(split_lse - tl.where(max_lse == float("-inf"), 0.0, max_lse))
    # What an empty part did not write is not read.
    mask = (weight > 0)[:, None] & (cols < D)[None, :]
    x = tl.load(parts + (row * PARTS + part)[:, None] * D + cols[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    merged = tl.sum(x * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + cols, merged.to(out.dtype.element_ty), mask=cols < D)


def num_splits_heuristic(programs: int, keys: int, block: int, slots: int) -> int:
    """Into how many parts to split at most ``keys`` keys, so that ``programs`` times as many fill whole waves.

    The fewest within 5 % of the best share of ``slots`` kept busy.
    """
    most = max(1, min(MAX_SPLITS, triton.cdiv(keys, block)))
    busy = [programs * n / (slots * triton.cdiv(programs * n, slots)) for n in range(1, most + 1)]
    return 1 + next(i for i, share in enumerate(busy) if share >= 0.95 * max(busy))


def launch(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> Tensor:
    """See ``decode_attention``."""
    check(k.ndim == 3, f"decode_attention: k has shape {tuple(k.shape)}, must be (rows, key heads, head dim)")
    _check("decode_attention", q, k, v, lengths, k_scale, v_scale)
    check_int_tensor("decode_attention", "starts", starts, lengths.shape)
    k, v = fp8_as_bytes(k), fp8_as_bytes(v)
    return _launch(q, k[None], v[None], None, starts, lengths, k_scale, v_scale, keys=len(k))


def launch_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """See ``paged_decode_attention``."""
    name = "paged_decode_attention"
    wanted = "(pages, page size, key heads, head dim)"
    check(k_pages.ndim == 4, f"{name}: k has shape {tuple(k_pages.shape)}, must be {wanted}")
    _check(name, q, k_pages, v_pages, lengths, k_scale, v_scale)
    check(page_table.ndim == 2, f"{name}: page_table has shape {tuple(page_table.shape)}, must be (documents, pages)")
    check_int_tensor(name, "page_table", page_table, (len(q), page_table.shape[1]))
    keys = page_table.shape[1] * k_pages.shape[1]
    pages = page_table if page_table.stride(1) == 1 else page_table.contiguous()
    return _launch(q, fp8_as_bytes(k_pages), fp8_as_bytes(v_pages), pages, lengths, lengths, k_scale, v_scale, keys)


def _check(
    name: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    check(q.ndim == 4, f"{name}: q has shape {tuple(q.shape)}, must be (documents, tokens, heads, head dim)")
    check_cache(name, q, k, v, k_scale, v_scale)
    check_int_tensor(name, "lengths", lengths, q.shape[:1])


def _launch(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None, starts: Tensor, lengths: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, keys: int,
) -> Tensor:  # fmt: skip
    """k and v as pages, (pages, rows, key heads, head dim); a contiguous cache is the one page without a table."""
    B, M, H, D = q.shape
    G = k.shape[2]
    q = q if q.stride(3) == 1 else q.contiguous()
    out = q.new_empty(q.shape)
    rows = B * M * H
    if not rows:
        return out
    width = triton.next_power_of_2(D)
    config = dict(SPLIT.pick(f"{max(width, 64)} of {8 * k.itemsize}", q.device))
    slots = config.pop("RESIDENT") * num_sms(q.device)
    block_m = min(MAX_ROWS, max(16, triton.next_power_of_2(M * H // G)))
    tiles = triton.cdiv(M * H // G, block_m)
    parts = num_splits_heuristic(B * G * tiles, keys, config["BLOCK_N"], slots)
    partial = out if parts == 1 else q.new_empty((rows, parts, D), dtype=torch.float32)
    lse = None if parts == 1 else q.new_empty((rows, parts), dtype=torch.float32)
    with torch.cuda.device_of(q):
        _split_kernel[(B * G * tiles * parts,)](
            q, k, v, pages, starts.contiguous(), lengths.contiguous(), k_scale, v_scale, partial, lse,
            math.log2(math.e) / math.sqrt(D), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            0 if pages is None else pages.stride(0), scale_stride(k_scale), scale_stride(v_scale), M, G, parts,
            SHARED=H // G, PAGE=0 if pages is None else k.shape[1], D=D, FP8=k.dtype == torch.uint8,
            ALIGN=math.gcd(16, *k.stride()[:3], *v.stride()[:3]), WHOLE=max(width, 16) == D, TILES=tiles,
            BLOCK_M=block_m, BLOCK_D=max(width, 16), **config,
        )  # fmt: skip
        if lse is not None:
            merge = COMBINE.pick("row", q.device)
            _combine_kernel[(rows, triton.cdiv(D, merge["BLOCK_D"]))](
                partial, lse, out, parts, D=D, BLOCK_P=triton.next_power_of_2(parts), **merge
            )
    return out


decode = torch.library.custom_op("phi4rv_triton::decode_attention", launch, mutates_args=())
paged_decode = torch.library.custom_op("phi4rv_triton::paged_decode_attention", launch_paged, mutates_args=())


@decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> Tensor:
    return q.new_empty(q.shape)


@paged_decode.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    return q.new_empty(q.shape)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """New tokens against what is cached, without gradient.

    q (B, M, H, D): the last M tokens of each of B documents, made for M up to 8. k, v (N, G, D) with H a multiple of
    G: the cache, where document b holds rows starts[b] : starts[b] + lengths[b], its M new ones included; starts,
    lengths (B,) int32 or int64. Token m of document b sees its first lengths[b] - M + m + 1 rows. A length is at
    least M, or 0 for a slot without a document, whose result is zeros. D is at most 256.
    k and v are of q's dtype, or float8_e4m3fn; k_scale, v_scale float32, () or (G,), multiply what is stored.
    Returns (B, M, H, D). ValueError for anything else, and where the channels of k and v are not adjacent.
    """
    return decode(q, k, v, starts, lengths, k_scale, v_scale)


def paged_decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """``decode_attention`` with the cache in pages (PagedAttention, Kwon et al. 2023).

    k_pages, v_pages (pages, page size, G, D); page_table (B, most pages) int32 or int64: row i of document b is
    k_pages[page_table[b, i // size], i % size]. Entries past a document's length are not read.
    """
    return paged_decode(q, k_pages, v_pages, page_table, lengths, k_scale, v_scale)
