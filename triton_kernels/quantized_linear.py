"""Linear layer with a weight in 8 or 4 bits, for few rows: the weight is read once and dequantised in registers.

One row: memory-bound on the weight's bytes, multiplied and summed in float32 without the tensor cores, each thread
16 bytes of a row at a time. 2 to 64 rows: tensor-core products with the weight as the tall operand, from registers,
and x as the narrow one. Where the rows of the weight alone would leave multiprocessors idle, K is split too and a
second kernel adds the parts in a fixed order. More rows, and the gradient of x: dequantised piece by piece for the
library's product.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4rv.ops.low_precision import FORMATS, GROUP_SIZE, QuantizedWeight, dequantize, slice_weight
from triton_kernels.common.launch import check, check_float, flatten_to_2d, num_sms
from triton_kernels.common.tuning import SearchSpace
from triton_kernels.rms_norm import rms_norm
from triton_kernels.swiglu import swiglu as silu_times

ROW = SearchSpace(
    "quantized_linear.row",
    {
        "8-bit": [
            {"BLOCK_N": 8, "BLOCK_K": 1024, "STAGES": 3, "num_warps": 4},
            {"BLOCK_N": 4, "BLOCK_K": 1024, "STAGES": 3, "num_warps": 4},
            {"BLOCK_N": 8, "BLOCK_K": 1024, "STAGES": 1, "num_warps": 4},
            {"BLOCK_N": 16, "BLOCK_K": 512, "STAGES": 4, "num_warps": 4},
        ],
        "4-bit": [
            {"BLOCK_N": 8, "BLOCK_K": 1024, "STAGES": 3, "num_warps": 2},
            {"BLOCK_N": 16, "BLOCK_K": 1024, "STAGES": 3, "num_warps": 4},
            {"BLOCK_N": 8, "BLOCK_K": 1024, "STAGES": 1, "num_warps": 4},
            {"BLOCK_N": 8, "BLOCK_K": 1024, "STAGES": 3, "num_warps": 4},
        ],
    },
)
# A tile of four-bit codes is one group of K: its scale comes after the product.
TILE = SearchSpace(
    "quantized_linear.tile",
    {
        "8-bit": [
            {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
            {"BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
            {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4},
            {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        ],
        "4-bit": [
            {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
            {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 6},
            {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4},
        ],
    },
)
MAX_ROWS = 64
# Elements of a weight that are dequantised at once, in float32, for the library's product.
CHUNK_ELEMENTS = 1 << 24
REDUCE_BLOCK = 1024
# float32's exponent bits of 2²³: an integer below that, set in the significand, adds itself.
EXPONENT = 0x4B000000


@triton.jit
def _fp8_to_fp16(code):
    """float8_e4m3fn bytes (as int8) to float16 / 256, exactly: its bits moved to float16's places.

    Architecture and interpreter need not know the format. NaN's codes, which quantize gives no finite weight, read 480.
    """
    return ((code.to(tl.int16) << 7) & -16512).to(tl.float16, bitcast=True)  # -16512: sign and 7 bits, 0xBF80


@triton.jit
def _fp8_pair_to_fp32(words):
    """The same for the upper byte of each half of int32 words, as float32: lower half, upper half."""
    bits = (words >> 1) & -1082081408  # 0xBF80BF80, where the shift has kept only the upper half's sign
    bits = (bits & -32769) | (words & 32768)
    lower = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return lower.to(tl.float32), (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _extract_bits(words, exponent, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bits from FROM on of int32 words, less half their range, as float32.

    Set in the significand of 2²³, which is then subtracted: at full rate, unlike a conversion. ``exponent`` is that
    of 2²³, an argument so that setting it takes one instruction with the mask, which a second literal would not.
    """
    at: tl.constexpr = FROM if FROM + WIDTH <= 20 else FROM % (20 if WIDTH == 4 else 16)
    words = words if at == FROM else words >> (FROM - at)
    one: tl.constexpr = 1 << at
    half: tl.constexpr = 1 << (WIDTH - 1)
    value = ((words & (((1 << WIDTH) - 1) << at)) | exponent).to(tl.float32, bitcast=True)
    return value * (1.0 / one) - (8388608.0 / one + half)


@triton.jit
def _unpack_bytes(words, exponent, FP8: tl.constexpr):
    """int32 words (…, W) to the four values of their bytes, (…, W, 2, 2), the lowest first. fp8's are / 256."""
    if FP8:
        first, third = _fp8_pair_to_fp32(words << 8)
        second, fourth = _fp8_pair_to_fp32(words)
    else:
        words ^= -2139062144  # 0x80808080: signed codes to 0..255
        first, second = _extract_bits(words, exponent, 0, 8), _extract_bits(words, exponent, 8, 8)
        third, fourth = _extract_bits(words, exponent, 16, 8), _extract_bits(words, exponent, 24, 8)
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def _unpack_nibbles(words, exponent):
    """int32 words (…, W) to their eight four-bit codes, less 8, (…, W, 2, 2, 2), the lowest first."""
    even = tl.join(
        tl.join(_extract_bits(words, exponent, 0, 4), _extract_bits(words, exponent, 16, 4)),
        tl.join(_extract_bits(words, exponent, 8, 4), _extract_bits(words, exponent, 24, 4)),
    )
    odd = tl.join(
        tl.join(_extract_bits(words, exponent, 4, 4), _extract_bits(words, exponent, 20, 4)),
        tl.join(_extract_bits(words, exponent, 12, 4), _extract_bits(words, exponent, 28, 4)),
    )
    return tl.join(even, odd)


@triton.jit
def _epilogue(out, y, bias, m, n, inside, M, N, BIAS: tl.constexpr, SPLIT: tl.constexpr):
    """Stores a tile of results, or of a part of K, which the bias is not yet added to."""
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * M * N
    elif BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["exponent"])
def _gemv_kernel(
    x, data, scales, zeros, bias, out, N, K, data_stride, tiles, exponent,
    FP8: tl.constexpr, INT4: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of BLOCK_N rows of the weight, in int32 words, over ``tiles`` tiles of K. EVEN: tiles end with K."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.minimum(n, N - 1).to(tl.int64)
    start = tl.program_id(1) * tiles
    per_word: tl.constexpr = 8 if INT4 else 4
    run: tl.constexpr = 4 * per_word  # elements in 16 bytes, which are a thread's
    pieces: tl.constexpr = BLOCK_K // run
    groups: tl.constexpr = BLOCK_K // 128
    k_in = tl.arange(0, BLOCK_K)
    word_in = tl.arange(0, BLOCK_K // per_word)
    group_in = tl.arange(0, groups)
    acc = tl.zeros((BLOCK_N, pieces), tl.float32)
    for tile in tl.range(start, tl.minimum(start + tiles, tl.cdiv(K, BLOCK_K)), num_stages=STAGES):
        k = tile * BLOCK_K + k_in
        xs = tl.load(x + k, mask=None if EVEN else k < K, other=None if EVEN else 0.0)
        xs = tl.reshape(xs, (pieces, run)).to(tl.float32)
        word = tile * (BLOCK_K // per_word) + word_in
        known = None if EVEN else (word * per_word < K)[None, :]
        # Two dimensions, so that a warp's lanes lie along a row: of three, Triton would lay them across rows.
        words = tl.load(data + line[:, None] * data_stride + word[None, :], mask=known, other=None if EVEN else 0)
        words = tl.reshape(words, (BLOCK_N, pieces, 4))
        w = tl.reshape(
            _unpack_nibbles(words, exponent) if INT4 else _unpack_bytes(words, exponent, FP8), (BLOCK_N, pieces, run)
        )
        y = tl.sum(w * xs[None, :, :], 2)
        if INT4:
            group = tile * groups + group_in
            known = None if EVEN else (group * 128 < K)[None, :]
            at = line[:, None] * tl.cdiv(K, 128) + group[None, :]
            y = tl.reshape(y, (BLOCK_N, groups, 4))
            if ZEROS:
                z = tl.load(zeros + at, mask=known, other=None if EVEN else 0).to(tl.float32)
                y -= (z - 8.0)[:, :, None] * tl.reshape(tl.sum(xs, 1), (1, groups, 4))
            y *= tl.load(scales + at, mask=known, other=None if EVEN else 0.0).to(tl.float32)[:, :, None]
            y = tl.reshape(y, (BLOCK_N, pieces))
        acc += y
    y = tl.sum(acc, 1)
    if not INT4:
        y *= tl.load(scales + line) * (256.0 if FP8 else 1.0)
    _epilogue(out, y, bias, tl.zeros_like(n), n, n < N, 1, N, BIAS, SPLIT)


@triton.jit
def _gemm_kernel(
    x, data, scales, zeros, bias, out, M, N, K, x_stride, data_stride, tiles,
    FP8: tl.constexpr, INT4: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """yᵀ = W xᵀ of BLOCK_N rows of the weight and all M rows of x, over ``tiles`` tiles of K."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = tl.minimum(n, N - 1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    x_line = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * x_stride
    start = tl.program_id(1) * tiles
    k_in = tl.arange(0, BLOCK_K)
    byte_in = tl.arange(0, BLOCK_K // 2 if INT4 else BLOCK_K)
    short: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(start, tl.minimum(start + tiles, tl.cdiv(K, BLOCK_K))):
        k = tile * BLOCK_K + k_in
        xs = tl.load(x_line + k[None, :], mask=None if EVEN else (k < K)[None, :], other=None if EVEN else 0.0)
        byte = tile * (BLOCK_K // 2 if INT4 else BLOCK_K) + byte_in
        known = None if EVEN or INT4 else (byte < K)[None, :]  # the last group of four-bit codes is whole
        codes = tl.load(
            data + line[:, None] * data_stride + byte[None, :], mask=known, other=None if EVEN or INT4 else 0
        )
        if INT4:
            at = line * tl.cdiv(K, 128) + tile
            z = tl.load(zeros + at).to(tl.int8)[:, None] if ZEROS else 8
            w = tl.reshape(tl.join((codes & 15) - z, ((codes >> 4) & 15) - z), (BLOCK_N, BLOCK_K))
            product = tl.dot(w.to(short), tl.trans(xs), input_precision="ieee")
            acc += product * tl.load(scales + at).to(tl.float32)[:, None]
        else:
            w = _fp8_to_fp16(codes) if FP8 else codes
            acc = tl.dot(w.to(short), tl.trans(xs), acc, input_precision="ieee")
    if not INT4:
        acc *= (tl.load(scales + line) * (256.0 if FP8 else 1.0))[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    _epilogue(out, acc, bias, m[None, :], n[:, None], inside, M, N, BIAS, SPLIT)


@triton.jit
def _reduce_splits_kernel(parts, bias, out, N, elements, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """The parts' sum in order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    y = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        y += tl.load(parts + tl.cast(split, tl.int64) * elements + at, mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def launch_forward(
    x: Tensor, format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, N: int, K: int, bias: Tensor | None
) -> Tensor:
    """See ``quantized_linear``; data as bytes, N and K the weight's shape."""
    flat = _check(x, format, data, scales, zeros, N, K, bias)
    out = x.new_empty((*x.shape[:-1], N))
    if not out.numel():
        return out
    if len(flat) > MAX_ROWS:
        q = _quantized_weight(format, data, scales, zeros, N, K)
        wide = out.view(-1, N)
        for start, end in _chunks(N, K, 1):
            weight = dequantize(slice_weight(q, 0, start, end), x.dtype)
            wide[:, start:end] = torch.nn.functional.linear(flat, weight, None if bias is None else bias[start:end])
        return out
    _launch_product(flat, format, data, scales, zeros, out.view(-1, N), bias)
    return out


def _launch_product(
    x: Tensor, format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, bias: Tensor | None
) -> None:
    """The kernels, for 1 to 64 rows."""
    (M, K), N = x.shape, out.shape[1]
    int4 = format.startswith("int4")
    space, waves = (ROW, 8) if M == 1 else (TILE, 2)
    config = space.pick("4-bit" if int4 else "8-bit", x.device)
    tiles, splits = _split_k(triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(K, config["BLOCK_K"]), waves, x.device)
    target = out if splits == 1 else out.new_empty((splits, M, N), dtype=torch.float32)
    grid = (triton.cdiv(N, config["BLOCK_N"]), splits)
    options: dict[str, Any] = {
        "FP8": format == "fp8", "INT4": int4, "ZEROS": zeros is not None, "BIAS": bias is not None,
        "SPLIT": splits > 1, "EVEN": K % config["BLOCK_K"] == 0, **config,
    }  # fmt: skip
    others = scales, scales if zeros is None else zeros, scales if bias is None else bias, target
    with torch.cuda.device_of(x):
        if M == 1:
            words = _as_int32(data)
            _gemv_kernel[grid](x, words, *others, N, K, words.stride(0), tiles, EXPONENT, **options)
        else:
            codes = data.view(torch.int8)
            options["BLOCK_M"] = max(16, triton.next_power_of_2(M))
            _gemm_kernel[grid](x, codes, *others, M, N, K, x.stride(0), codes.stride(0), tiles, **options)
        if splits > 1:
            _reduce_splits_kernel[(triton.cdiv(M * N, REDUCE_BLOCK),)](
                target,
                scales if bias is None else bias,
                out,
                N,
                M * N,
                splits,
                BIAS=bias is not None,
                BLOCK=REDUCE_BLOCK,
            )


def _as_int32(data: Tensor) -> Tensor:
    """Rows of bytes as rows of int32; copied, with zeros behind them, where a row does not end with a word."""
    if data.shape[1] % 4:
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % 4))
    return data.view(torch.int32)


def _split_k(programs: int, tiles: int, waves: int, device: torch.device) -> tuple[int, int]:
    """Tiles of K a program, and parts of K: so many that about ``waves`` programs run on each multiprocessor."""
    wanted = max(1, min(tiles, waves * num_sms(device) // programs))
    each = triton.cdiv(tiles, wanted)
    return each, triton.cdiv(tiles, each)


def _chunks(length: int, other: int, multiple: int) -> list[tuple[int, int]]:
    """start, end of pieces of one dimension that have about PIECE elements with the ``other``."""
    step = max(multiple, CHUNK_ELEMENTS // max(other, 1) // multiple * multiple)
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _quantized_weight(
    format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, N: int, K: int
) -> QuantizedWeight:
    typed = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(format, torch.uint8)
    return QuantizedWeight(format, data.view(typed), scales, zeros, (N, K))


def launch_backward(
    dy: Tensor, format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, N: int, K: int
) -> Tensor:
    """dy · W, dequantised by pieces of K so that each sum over N is one product's."""
    flat = dy.reshape(-1, N)
    dx = dy.new_empty((*dy.shape[:-1], K))
    wide = dx.view(-1, K)
    q = _quantized_weight(format, data, scales, zeros, N, K)
    for start, end in _chunks(K, N, GROUP_SIZE):
        wide[:, start:end] = flat @ dequantize(slice_weight(q, 1, start, end), dy.dtype)
    return dx


def _check(
    x: Tensor, format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, N: int, K: int, bias: Tensor | None
) -> Tensor:
    """x as (rows, K)."""
    check(format in FORMATS, f"quantized_linear: format is {format!r}, must be one of {', '.join(FORMATS)}")
    check_float(x, "quantized_linear: x")
    check(x.ndim > 0 and x.shape[-1] == K, f"quantized_linear: x is {tuple(x.shape)}, must be (…, {K})")
    groups = triton.cdiv(K, GROUP_SIZE)
    int4 = format.startswith("int4")
    expected = {
        "data": (data, (N, groups * GROUP_SIZE // 2) if int4 else (N, K)),
        "scales": (scales, (N, groups) if int4 else (N,)),
        "zeros": (zeros, (N, groups)),
        "bias": (bias, (N,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None:
            right = tensor.shape == shape and tensor.is_contiguous()
            check(right, f"quantized_linear: {name} is {tuple(tensor.shape)}, must be {shape} and contiguous")
            check(tensor.device == x.device, f"quantized_linear: {name} is on {tensor.device}, x on {x.device}")
    check((zeros is None) == (format != "int4_zero"), f"quantized_linear: {format} with wrong zeros")
    return flatten_to_2d(x) if x.ndim > 1 else x[None]


forward = torch.library.custom_op("phi4rv_triton::quantized_linear", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::quantized_linear_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(
    x: Tensor, format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, N: int, K: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], N))


@backward.register_fake
def _(dy: Tensor, format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, N: int, K: int) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], K))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.format, data, scales, zeros, ctx.N, ctx.K, _ = inputs
    ctx.save_for_backward(data, scales, zeros)


def _autograd_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    dx = backward(dy, ctx.format, *ctx.saved_tensors, ctx.N, ctx.K) if wants_x else None
    dbias = dy.reshape(-1, ctx.N).sum(0) if wants_bias else None
    return dx, None, None, None, None, None, None, dbias


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (…, K) · weightᵀ (N, K) + bias (N,): float32 sums of products with the codes, each times its scale.

    x and bias float32, float16 or bfloat16. Made for 1 to 64 rows of x; more are right too, by pieces of the weight
    in x's dtype. x and bias have gradients, the weight has none. ValueError for shapes that do not fit.
    """
    data = weight.data.view(torch.uint8)
    return forward(x, weight.format, data, weight.scales, weight.zeros, *weight.shape, bias)


def decode_gemv(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """See ``reference.decode_gemv``: one kernel after another, and the library's product for a weight in full."""
    if norm is not None:
        x = rms_norm(x, norm, eps)[0]
    y = quantized_linear(x, w) if isinstance(w, QuantizedWeight) else torch.nn.functional.linear(x, w)
    if swiglu:
        y = silu_times(y)
    return y if residual is None else y + residual
