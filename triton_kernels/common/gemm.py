"""A matrix product with an epilogue: bias, GELU and its derivative, rows scattered elsewhere.

Tiles are visited in groups of rows, so that the tiles in flight share their operands in the L2 cache. Operands come
by the tensor memory accelerator where the device has one and the layout allows it, by 16-byte loads elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_kernels.common.launch import num_sms
from triton_kernels.common.tuning import Config


@triton.jit
def grouped_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of the ``tile``-th tile in grouped order: GROUP_M rows of tiles, column by column, at a time."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % group % height, tile % group // height


@triton.jit
def accumulate(
    acc, a, b, m, n, a_stride, b_n, b_k, M, N, K,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a[m] · b[n]ᵀ by ordinary loads. Rows of a past M repeat the last: nothing is made of them."""
    k = tl.arange(0, BLOCK_K)
    a_at = a + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_stride + k[None, :]
    b_at = b + n.to(tl.int64)[None, :] * b_n + k[:, None].to(tl.int64) * b_k
    for start in tl.range(0, K, BLOCK_K):
        at = tl.load(a_at) if EVEN_K else tl.load(a_at, mask=k[None, :] < K - start, other=0.0)
        if EVEN_K and EVEN_N:
            bt = tl.load(b_at)
        else:
            bt = tl.load(b_at, mask=(k[:, None] < K - start) & (n[None, :] < N), other=0.0)
        acc = tl.dot(at.to(b.dtype.element_ty), bt, acc, input_precision="ieee")
        a_at += BLOCK_K
        b_at += BLOCK_K * b_k
    return acc


@triton.jit
def _accumulate_tma(acc, a, b, row, col, K, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same by descriptors, which give zeros outside the tensors; b is (K, N) if TRANSPOSED, else (N, K)."""
    for start in tl.range(0, K, BLOCK_K):
        at = a.load([row, start])
        if TRANSPOSED:
            acc = tl.dot(at, b.load([start, col]), acc, input_precision="ieee")
        else:
            acc = tl.dot(at, b.load([col, start]).T, acc, input_precision="ieee")
    return acc


@triton.jit
def _epilogue(
    acc, bias, slope, index, out, m, n, out_stride, M, N,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCATTER: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of columns n of rows m."""
    inside = (m < M)[:, None] if EVEN_N else (m < M)[:, None] & (n < N)[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    rows = m.to(tl.int64)
    at = rows[:, None] * N + n[None, :]
    if EPILOGUE == "times slope":
        acc *= tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == "gelu" or EPILOGUE == "gelu and slope":
        below = 0.5 + 0.5 * tl.erf(acc * 0.7071067811865476)
        if EPILOGUE == "gelu and slope":
            density = 0.3989422804014327 * tl.exp2(acc * acc * -0.7213475204444817)
            tl.store(slope + at, (below + acc * density).to(slope.dtype.element_ty), mask=inside)
        acc *= below
    if SCATTER:
        rows = tl.load(index + m, mask=m < M, other=0)
    tl.store(out + rows[:, None] * out_stride + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gemm_kernel(
    a, b, bias, slope, index, out, a_stride, b_n, b_k, out_stride, M, N, K,
    BIAS: tl.constexpr, EPILOGUE: tl.constexpr, SCATTER: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # One loop over tiles and their steps: the next tile's loads are under way while this one is written.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            acc = _accumulate_tma(acc, a, b, tile_m * BLOCK_M, tile_n * BLOCK_N, K, TRANSPOSED, BLOCK_K)
        else:
            acc = accumulate(acc, a, b, m, n, a_stride, b_n, b_k, M, N, K, EVEN_N, EVEN_K, BLOCK_K)
        # Half a tile at a time: finishing a whole one would spill the registers that hold the sums.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _epilogue(left, bias, slope, index, out, m, n, out_stride, M, N, BIAS, EPILOGUE, SCATTER, EVEN_N)
        n += BLOCK_N // 2
        _epilogue(right, bias, slope, index, out, m, n, out_stride, M, N, BIAS, EPILOGUE, SCATTER, EVEN_N)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    config: Config,
    bias: Tensor | None = None,
    epilogue: str = "linear",
    slope: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """out = epilogue(a bᵀ + bias), for a (M, K) with adjacent columns, b (N, K), out with adjacent columns.

    epilogue: "linear"; "gelu" (exact, with erf); "gelu and slope", which also writes GELU's derivative to slope
    (M, N); "times slope", which multiplies by it (out may then be slope). With index (M,) int64, row m goes to
    out[index[m]].
    """
    (M, K), N = a.shape, len(b)
    if not M or not N:
        return out
    if b.stride(0) != 1 and b.stride(1) != 1:
        b = b.contiguous()
    transposed = b.stride(0) == 1 and b.stride(1) != 1
    tma = bool(config.get("TMA")) and has_tma(a.device) and _supports_tma(a) and _supports_tma(b.T if transposed else b)
    BM, BN, BK = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    programs = min(tiles, num_sms(a.device)) if config["PERSISTENT"] else tiles
    left, right = _descriptors(a, b, transposed, (BM, BN, BK)) if tma else (a, b)
    with torch.cuda.device_of(a):
        _gemm_kernel[(programs,)](
            left, right, bias, slope, index, out, a.stride(0), b.stride(0), b.stride(1), out.stride(0), M, N, K,
            BIAS=bias is not None, EPILOGUE=epilogue, SCATTER=index is not None, TRANSPOSED=transposed,
            EVEN_N=N % BN == 0, EVEN_K=K % BK == 0, **{**config, "TMA": tma},
        )  # fmt: skip
    return out


def _descriptors(a: Tensor, b: Tensor, transposed: bool, block: tuple[int, int, int]) -> tuple[Any, Any]:
    BM, BN, BK = block
    right = (b.T, [BK, BN]) if transposed else (b, [BN, BK])
    return TensorDescriptor.from_tensor(a, [BM, BK]), TensorDescriptor.from_tensor(*right)


@functools.lru_cache
def has_tma(device: torch.device) -> bool:
    """Whether descriptors may be used: from Hopper on, and where kernels are interpreted or only compiled."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _supports_tma(x: Tensor) -> bool:
    """What the tensor memory accelerator asks of a matrix: adjacent columns, 16-byte aligned rows, no empty side."""
    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and x.stride(1) == 1 and x.stride(0) >= x.shape[1] > 0
