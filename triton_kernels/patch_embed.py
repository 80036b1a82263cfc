"""Patches to embeddings: product, bias and the position table resized to each image's grid (SigLIP2 NaFlex, Tschannen
et al. 2025), in one kernel over the packed patches.

A resized row is a weighted mean of the few rows of the table around it: the kernel reads them as it starts its tile of
the product, so that no resized table is ever written. Weights are integers until they are normalised: between index k
of an axis of ``ours`` samples and index j of one of ``theirs``, on a scale where the first sits at (2k + 1) · theirs
and the second at (2j + 1) · ours, the triangle is 2 max(ours, theirs) high and falls by one a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common.gemm import accumulate, grouped_tile
from triton_kernels.common.launch import check, check_float, flatten_to_2d
from triton_kernels.common.tuning import Config, SearchSpace


def _config(M: int, N: int, K: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K, "GROUP_M": 16, "num_warps": num_warps, "num_stages": num_stages}


FORWARD = SearchSpace(
    "patch_embed.forward",
    {
        # Small tiles, several to a multiprocessor: one multiplies while another reads its positions.
        "short": [_config(128, 64, 64, 4, 3), _config(128, 64, 64, 8, 3), _config(128, 128, 64, 8, 3)],
        "float32": [_config(64, 64, 32, 4, 2), _config(64, 64, 32, 8, 2)],
    },
)
TABLE = SearchSpace(
    "patch_embed.table",
    {
        "cell": [
            {"BLOCK_P": 32, "BLOCK_C": 128, "num_warps": 4},
            {"BLOCK_P": 64, "BLOCK_C": 64, "num_warps": 4},
            {"BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4},
        ]
    },
)


@triton.jit
def _filter_support(k, ours, theirs):
    """The first index of the other axis within the triangle around k, and the one after the last."""
    span = 2 * tl.maximum(ours, theirs)
    low = (2 * k + 1) * theirs - span - ours
    high = (2 * k + 1) * theirs + span - ours
    first = tl.where(low < 0, 0, tl.maximum(low, 0) // (2 * ours) + 1)
    return first, tl.minimum((high + 2 * ours - 1) // (2 * ours), theirs)


@triton.jit
def _filter_weight(k, j, ours, theirs):
    """The triangle's height at j, not normalised."""
    fall = tl.abs((2 * j + 1) * ours - (2 * k + 1) * theirs)
    return tl.maximum(2 * tl.maximum(ours, theirs) - fall, 0).to(tl.float32)


@triton.jit
def _locate_kernel(ends, grids, coords, inverse, P, images, steps, side, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """For each patch its row, column and its grid's rows and columns, and one over the sum of its weights."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + images
    for _ in range(steps):  # the first image that ends after p, by bisection
        middle = (low + high) // 2
        past = tl.load(ends + middle, mask=low < high, other=0) <= p
        high = tl.where(past, high, middle)
        low = tl.where(past & (low < high), middle + 1, low)
    known = (low < images) & (p < P)
    start = tl.load(ends + low - 1, mask=known & (low > 0), other=0)
    # A patch of no image: as of a grid like the table's, which is the least work, and its weights are then dropped.
    grid_rows = tl.load(grids + 2 * low, mask=known, other=side)
    grid_cols = tl.load(grids + 2 * low + 1, mask=known, other=side)
    row = tl.where(known, (p - start) // grid_cols, 0)
    col = tl.where(known, (p - start) % grid_cols, 0)
    k = tl.arange(0, SIDE)[None, :]
    down = tl.where(k < side, _filter_weight(row[:, None], k, grid_rows[:, None], side), 0.0)
    across = tl.where(k < side, _filter_weight(col[:, None], k, grid_cols[:, None], side), 0.0)
    total = tl.sum(down, 1) * tl.sum(across, 1)
    tl.store(coords + p, row, mask=p < P)
    tl.store(coords + P + p, col, mask=p < P)
    tl.store(coords + 2 * P + p, grid_rows, mask=p < P)
    tl.store(coords + 3 * P + p, grid_cols, mask=p < P)
    tl.store(inverse + p, tl.where(known, 1.0 / total, 0.0), mask=p < P)


@triton.jit
def _position_embedding(table, coords, inverse, m, n, P, C, side, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Channels n of the table as resized for patches m."""
    there = m < P
    row = tl.load(coords + m, mask=there, other=0)
    col = tl.load(coords + P + m, mask=there, other=0)
    grid_rows = tl.load(coords + 2 * P + m, mask=there, other=side)
    grid_cols = tl.load(coords + 3 * P + m, mask=there, other=side)
    scale = tl.load(inverse + m, mask=there, other=0.0)
    top, bottom = _filter_support(row, grid_rows, side)
    left, right = _filter_support(col, grid_cols, side)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.max(bottom - top, 0)):
        down = _filter_weight(row, top + i, grid_rows, side) * scale
        for j in range(tl.max(right - left, 0)):
            weight = down * _filter_weight(col, left + j, grid_cols, side)
            cell = ((top + i) * side + left + j).to(tl.int64)
            inside = (top + i < bottom) & (left + j < right)
            at = table + cell[:, None] * C + n[None, :]
            acc += weight[:, None] * tl.load(at, mask=inside[:, None] & (n < C)[None, :], other=0.0).to(tl.float32)
    return acc


@triton.jit
def _forward_kernel(
    patches, weight, bias, table, coords, inverse, out, stride, weight_stride, P, C, K, side,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = grouped_tile(tl.program_id(0), P, C, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _position_embedding(table, coords, inverse, m, n, P, C, side, BLOCK_M, BLOCK_N)
    acc += tl.load(bias + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
    acc = accumulate(acc, patches, weight, m, n, stride, weight_stride, 1, P, C, K, EVEN_N, EVEN_K, BLOCK_K)
    at = out + m.to(tl.int64)[:, None] * C + n[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < P)[:, None] & (n < C)[None, :])


@triton.jit
def _table_gradient_kernel(
    dy, grids, inverse, dtable, stride, P, images, C, side, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One cell of the table: the patches that read it, image by image, always in the same order."""
    # Cells first, channels last: programs that run together read the same channels of the same patches.
    cell = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i, j = cell // side, cell % side
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    start = cell.to(tl.int64) * 0
    for image in range(images):
        grid_rows, grid_cols = tl.load(grids + 2 * image), tl.load(grids + 2 * image + 1)
        top, bottom = _filter_support(i, side, grid_rows)
        left, right = _filter_support(j, side, grid_cols)
        width = right - left
        for first in range(0, (bottom - top) * width, BLOCK_P):
            q = first + tl.arange(0, BLOCK_P)
            row, col = top + q // width, left + q % width
            p = start + row * grid_cols + col
            there = (row < bottom) & (p < P)
            weight = _filter_weight(i, row, side, grid_rows) * _filter_weight(j, col, side, grid_cols)
            weight *= tl.load(inverse + p, mask=there, other=0.0)
            at = dy + p[:, None] * stride + n[None, :]
            acc += weight[:, None] * tl.load(at, mask=there[:, None] & (n < C)[None, :], other=0.0).to(tl.float32)
        start += grid_rows * grid_cols
    tl.store(dtable + cell * C + n, tl.sum(acc, 0).to(dtable.dtype.element_ty), mask=n < C)


def _locate_patches(grids: Tensor, P: int, side: int) -> tuple[Tensor, Tensor]:
    """What ``_locate_kernel`` writes: coords (4, P) int32 and inverse (P,) float32."""
    coords = grids.new_empty((4, P))
    inverse = grids.new_empty((P,), dtype=torch.float32)
    ends = grids.prod(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    images = len(grids)
    _locate_kernel[(triton.cdiv(P, 128),)](
        ends, grids, coords, inverse, P, images, images.bit_length(), side,
        SIDE=triton.next_power_of_2(side), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return coords, inverse


def launch_forward(patches: Tensor, weight: Tensor, bias: Tensor, table: Tensor, grids: Tensor) -> Tensor:
    """See ``patch_embed``."""
    _check(patches, weight, bias, table, grids)
    (P, K), C, side = patches.shape, len(weight), math.isqrt(len(table))
    out = weight.new_empty((P, C))
    if not P or not C:
        return out
    patches, weight = flatten_to_2d(patches), flatten_to_2d(weight)
    config = FORWARD.pick("float32" if weight.dtype == torch.float32 else "short", patches.device)
    tiles = triton.cdiv(P, config["BLOCK_M"]) * triton.cdiv(C, config["BLOCK_N"])
    with torch.cuda.device_of(patches):
        coords, inverse = _locate_patches(grids.contiguous(), P, side)
        _forward_kernel[(tiles,)](
            patches, weight, bias.contiguous(), table.contiguous(), coords, inverse, out,
            patches.stride(0), weight.stride(0), P, C, K, side,
            EVEN_N=C % config["BLOCK_N"] == 0, EVEN_K=K % config["BLOCK_K"] == 0, **config,
        )  # fmt: skip
    return out


def launch_backward(
    dy: Tensor, patches: Tensor, weight: Tensor, table: Tensor, grids: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """Those gradients of patches, weight, bias, table that are wanted, in this order.

    The plain products are torch.mm, cuBLAS's: a kernel of ours would do the same work no faster.
    """
    of_patches, of_weight, of_bias, of_table = wanted
    dy = flatten_to_2d(dy)
    dpatches = [torch.mm(dy, weight).to(patches.dtype)] if of_patches else []
    dweight = [torch.mm(dy.T, patches.to(dy.dtype))] if of_weight else []
    dbias = [dy.sum(0)] if of_bias else []
    return dpatches + dweight + dbias + ([_dtable(dy, table, grids)] if of_table else [])


def _dtable(dy: Tensor, table: Tensor, grids: Tensor) -> Tensor:
    N, C = table.shape
    side, P, images = math.isqrt(N), len(dy), len(grids)
    if not P or not images or not C:
        return table.new_zeros((N, C))
    dtable = table.new_empty((N, C))
    config = TABLE.pick("cell", dy.device)
    with torch.cuda.device_of(dy):
        _, inverse = _locate_patches(grids.contiguous(), P, side)
        _table_gradient_kernel[(N, triton.cdiv(C, config["BLOCK_C"]))](
            dy, grids.contiguous(), inverse, dtable, dy.stride(0), P, images, C, side, **config
        )
    return dtable


def _check(patches: Tensor, weight: Tensor, bias: Tensor, table: Tensor, grids: Tensor) -> None:
    for name, x in (("patches", patches), ("weight", weight)):
        check_float(x, f"patch_embed: {name}")
    same = bias.dtype == table.dtype == weight.dtype
    check(same, f"patch_embed: bias and table must be {weight.dtype}, as weight is")
    check(patches.ndim == 2, f"patch_embed: patches has {patches.ndim} dimensions, must have 2")
    fits = weight.ndim == 2 and weight.shape[1] == patches.shape[1]
    check(fits, f"patch_embed: weight is {tuple(weight.shape)}, must be (…, {patches.shape[1]})")
    C = len(weight)
    check(bias.shape == (C,), f"patch_embed: bias is {tuple(bias.shape)}, must be ({C},)")
    square = table.ndim == 2 and table.shape[1] == C and 0 < len(table) == math.isqrt(len(table)) ** 2
    check(square, f"patch_embed: table is {tuple(table.shape)}, must be (a square number, {C})")
    shaped = grids.ndim == 2 and grids.shape[1] == 2 and grids.dtype == torch.int32
    check(shaped, f"patch_embed: grids is {tuple(grids.shape)} {grids.dtype}, must be (images, 2) int32")


forward = torch.library.custom_op("phi4rv_triton::patch_embed", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::patch_embed_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(patches: Tensor, weight: Tensor, bias: Tensor, table: Tensor, grids: Tensor) -> Tensor:
    return weight.new_empty((len(patches), len(weight)))


@backward.register_fake
def _(dy: Tensor, patches: Tensor, weight: Tensor, table: Tensor, grids: Tensor, wanted: list[bool]) -> list[Tensor]:
    like = [(patches, patches.shape), (weight, weight.shape), (weight, weight.shape[:1]), (table, table.shape)]
    return [x.new_empty(shape) for (x, shape), of in zip(like, wanted, strict=True) if of]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    patches, weight, _, table, grids = inputs
    ctx.save_for_backward(patches, weight, table, grids)


def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:4]
    grads = iter(backward(dy, *ctx.saved_tensors, list(wanted)))
    return *(next(grads) if of else None for of in wanted), None


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, table: Tensor, grids: Tensor) -> Tensor:
    """patches (P, K) · weightᵀ (C, K) + bias (C,) + the position table (N, C) resized to each image's grid: (P, C).

    The table, a square grid of N rows, is resized bilinearly with antialiasing and half-pixel centres. grids (I, 2)
    int32: rows and columns of the images, in order; their products add up to P, which is not checked, for it would stop
    the device: patches past the last image get no position. weight, bias and table have one dtype, the result's;
    patches may have another. ValueError for anything else.
    """
    return forward(patches, weight, bias, table, grids)
