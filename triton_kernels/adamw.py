"""AdamW in one pass over a flat shard: clipping, moments, decay, rounding (Loshchilov & Hutter 2019).

Memory-bound. Bytes an element: float32 all through 28 (reads four values, writes three), 30 with a 2-byte copy and
28 with a 2-byte gradient too; bfloat16 param and gradient with float32 moments 22, with bfloat16 moments 14, with
8-bit moments 10 and their scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4rv.ops.low_precision import MOMENT_BLOCK as SHARED_SCALE
from phi4rv.ops.low_precision import Moment8, random_key
from triton_kernels.common.launch import check, check_float
from triton_kernels.common.tuning import SearchSpace

# By what fills 16 bytes: four float32 a thread, eight bfloat16 (of 8-bit moments eight too: a row of 256 is a warp's).
STEP = SearchSpace(
    "adamw.step",
    {
        "float32": [
            {"BLOCK": 1024, "num_warps": 8},
            {"BLOCK": 512, "num_warps": 4},
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 2048, "num_warps": 8},
        ],
        "bfloat16": [
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 2048, "num_warps": 8},
            {"BLOCK": 512, "num_warps": 2},
            {"BLOCK": 512, "num_warps": 4},
        ],
        "8-bit": [
            {"BLOCK": 1024, "num_warps": 4},
            {"BLOCK": 2048, "num_warps": 8},
            {"BLOCK": 512, "num_warps": 2},
            {"BLOCK": 2048, "num_warps": 4},
        ],
    },
)
SHORT = (torch.float16, torch.bfloat16)


@triton.jit
def _hash32(x):
    """phi4rv.ops.low_precision.hash32, of uint32."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _round(x, dtype: tl.constexpr, bits, STOCHASTIC: tl.constexpr):
    """float32 x in ``dtype``, to nearest, or bfloat16 stochastically by the low 16 of ``bits``.

    bfloat16 by its bits: Triton's interpreter truncates.
    """
    if dtype == tl.bfloat16:
        raw = x.to(tl.uint32, bitcast=True)
        raw += (bits & 0xFFFF) if STOCHASTIC else 0x7FFF + ((raw >> 16) & 1)
        raw = tl.where(x == x, raw, 0x7FC00000)
        return (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _floor(t):
    """A whole number, t or under it by less than 1, without the slow conversions."""
    return (t - 0.5) + 12582912.0 - 12582912.0


@triton.jit
def _to_uint8(x):
    """A float in 0..255 that is whole, as uint8: the last bits of its sum with 1.5 · 2²³."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def _uniform(bits):
    """23 random bits to [0, 1): the significand of a number in [1, 2)."""
    return (bits | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _encode_first(x, inverse, bits):
    """phi4rv.ops.low_precision.Moment8.encode_, signed."""
    value = tl.abs(x) * (inverse * 16129.0)
    low = _floor(tl.sqrt(value))
    code = tl.where(_uniform(bits & 0x7FFFFF) * (2 * low + 1) < value - low * low, low + 1, low)
    code = tl.minimum(code, 127.0)
    return _to_uint8(128 + tl.where(x < 0, -code, code))


@triton.jit
def _encode_second(root, inverse, bits):
    """phi4rv.ops.low_precision.Moment8.encode_, unsigned, of the moment's square root."""
    root *= tl.sqrt(inverse) * 65025.0
    low = _floor(tl.sqrt(root))
    square = low * low
    odd = 2 * low + 1  # (low + 1)⁴ - low⁴ = odd · (2 low² + odd)
    up = _uniform(bits >> 9) * (odd * (2 * square + odd)) < (root - square) * (root + square)
    return _to_uint8(tl.minimum(tl.maximum(tl.where(up, low + 1, low), 1.0), 255.0))


@triton.jit
def _store_scales(x, scales, block, covered):
    """Stores each row's largest magnitude as its scale; the inverses, a column."""
    largest = tl.max(tl.abs(x), 1)
    tl.store(scales + block, largest, mask=covered)
    return tl.where(largest >= 1.2e-38, 1.0 / tl.maximum(largest, 1.2e-38), 0.0)[:, None]


@triton.jit
def _update(
    param, grad, first, second, first_scales, second_scales, copy, clip, key, start, n,
    decay, weight1, weight2, rate, correction, eps,
    FIRST8: tl.constexpr, SECOND8: tl.constexpr, COPY: tl.constexpr, RANDOM: tl.constexpr,
    TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = start // 256 + tl.arange(0, BLOCK // 256)
    offsets = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = offsets < n if TAIL else None
    covered = block * 256 < n if TAIL else None
    p = tl.load(param + offsets, mask=inside).to(tl.float32)
    g = tl.load(grad + offsets, mask=inside).to(tl.float32) * clip
    m = tl.load(first + offsets, mask=inside).to(tl.float32)
    v = tl.load(second + offsets, mask=inside).to(tl.float32)
    if FIRST8:
        m -= 128.0
        m = m * tl.abs(m) * (tl.load(first_scales + block, mask=covered) * (1.0 / 16129.0))[:, None]
    if SECOND8:
        v *= v
        v = v * v * (tl.load(second_scales + block, mask=covered) * (1.0 / 4228250625.0))[:, None]
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    if TAIL:  # the last row's scale is of its elements alone
        m = tl.where(inside, m, 0.0)
        v = tl.where(inside, v, 0.0)
    root = tl.sqrt(v)
    r = tl.rsqrt(root * correction + eps)  # m · r · r costs a third of a division
    p = p * decay - rate * m * r * r
    bits = key
    if RANDOM:
        high = (start >> 32).to(tl.uint32)  # of the index: the same in the whole block
        bits = _hash32(_hash32(key.to(tl.uint32) ^ high) ^ (offsets & 0xFFFFFFFF).to(tl.uint32))
    tl.store(param + offsets, _round(p, param.dtype.element_ty, bits, True), mask=inside)
    if COPY:
        tl.store(copy + offsets, _round(p, copy.dtype.element_ty, bits, False), mask=inside)
    if FIRST8:
        m8 = _encode_first(m, _store_scales(m, first_scales, block, covered), bits)
        tl.store(first + offsets, m8, mask=inside)
    else:
        tl.store(first + offsets, _round(m, first.dtype.element_ty, bits, False), mask=inside)
    if SECOND8:
        v8 = _encode_second(root, _store_scales(v, second_scales, block, covered), bits)
        tl.store(second + offsets, v8, mask=inside)
    else:
        tl.store(second + offsets, _round(v, second.dtype.element_ty, bits, False), mask=inside)


@triton.jit(do_not_specialize=["key"])
def _adamw_kernel(
    param, grad, first, second, first_scales, second_scales, copy, clip, key, n,
    decay, weight1, weight2, rate, correction, eps,
    FIRST8: tl.constexpr, SECOND8: tl.constexpr, COPY: tl.constexpr, RANDOM: tl.constexpr, CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if CLIP:
        clip = tl.load(clip)
    if start + BLOCK <= n:
        _update(
            param, grad, first, second, first_scales, second_scales, copy, clip, key, start, n,
            decay, weight1, weight2, rate, correction, eps, FIRST8, SECOND8, COPY, RANDOM, False, BLOCK,
        )  # fmt: skip
    else:
        _update(
            param, grad, first, second, first_scales, second_scales, copy, clip, key, start, n,
            decay, weight1, weight2, rate, correction, eps, FIRST8, SECOND8, COPY, RANDOM, True, BLOCK,
        )  # fmt: skip


def launch(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    first_scales: Tensor | None,
    second_scales: Tensor | None,
    copy: Tensor | None,
    clip: Tensor | None,
    clip_value: float,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    """See ``adamw``; 8-bit moments are codes and scales; clip_value counts where clip is None."""
    _check(param, grad, copy, clip)
    _check_moment("exp_avg", first, first_scales, param)
    _check_moment("exp_avg_sq", second, second_scales, param)
    eight = first_scales is not None or second_scales is not None
    random = eight or param.dtype == torch.bfloat16
    check(
        not random or seed is not None,
        "adamw: a bfloat16 param and 8-bit moments are rounded stochastically and need a seed",
    )
    n = param.numel()
    if not n:
        return
    key = random_key(seed or 0, step)
    config = STEP.pick("8-bit" if eight else str(param.dtype).removeprefix("torch."), param.device)
    with torch.cuda.device_of(param):
        _adamw_kernel[(triton.cdiv(n, config["BLOCK"]),)](
            param, grad, first, second,
            param if first_scales is None else first_scales, param if second_scales is None else second_scales,
            param if copy is None else copy, clip_value if clip is None else clip,
            key - (1 << 32) if key >> 31 else key,  # signed: the same type whatever its value
            n, 1 - lr * weight_decay, 1 - beta1, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps,
            FIRST8=first_scales is not None, SECOND8=second_scales is not None, COPY=copy is not None,
            RANDOM=random, CLIP=clip is not None, **config,
        )  # fmt: skip


def _check(param: Tensor, grad: Tensor, copy: Tensor | None, clip: Tensor | None) -> None:
    check(param.dtype in (torch.float32, torch.bfloat16), f"adamw: param is {param.dtype}, must be float32 or bfloat16")
    check_float(grad, "adamw: grad")
    for name, x in (("param", param), ("grad", grad), ("copy", copy)):
        if x is not None:
            same = x.shape == param.shape
            check(same, f"adamw: {name} is {tuple(x.shape)}, must have param's shape, {tuple(param.shape)}")
            check(x.is_contiguous(), f"adamw: {name} must be contiguous")
    if copy is not None:
        check(param.dtype == torch.float32, "adamw: a copy is taken of a float32 param, not of a bfloat16 one")
        check(copy.dtype in SHORT, f"adamw: copy is {copy.dtype}, must be float16 or bfloat16")
    if clip is not None:
        scalar = clip.numel() == 1 and clip.dtype == torch.float32 and clip.device == param.device
        check(scalar, f"adamw: clip must be one float32 number on {param.device}")


def _check_moment(name: str, moment: Tensor, scales: Tensor | None, param: Tensor) -> None:
    check(moment.numel() == param.numel(), f"adamw: {name} has {moment.numel()} elements, param {param.numel()}")
    check(moment.is_contiguous(), f"adamw: {name} must be contiguous")
    if scales is None:
        right = moment.dtype in (torch.float32, torch.bfloat16)
        check(right, f"adamw: {name} is {moment.dtype}, must be float32, bfloat16 or a Moment8")
        return
    check(moment.dtype == torch.uint8, f"adamw: {name}'s codes are {moment.dtype}, must be uint8")
    right = scales.dtype == torch.float32 and scales.shape == (triton.cdiv(moment.numel(), SHARED_SCALE),)
    check(right and scales.is_contiguous(), f"adamw: {name} needs one float32 scale for every {SHARED_SCALE} codes")


update = torch.library.custom_op(
    "phi4rv_triton::adamw",
    launch,
    mutates_args=("param", "first", "second", "first_scales", "second_scales", "copy"),
)


@update.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    first_scales: Tensor | None,
    second_scales: Tensor | None,
    copy: Tensor | None,
    clip: Tensor | None,
    clip_value: float,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
) -> None:
    return None


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor | Moment8,
    exp_avg_sq: Tensor | Moment8,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: Tensor | float = 1.0,
    copy: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """One decoupled-weight-decay Adam step in place, computed in float32: see ``phi4rv.ops.reference.adamw``.

    param float32 or bfloat16; grad float32, float16 or bfloat16; copy float16 or bfloat16, of a float32 param only;
    all contiguous and of one shape. Moments float32, bfloat16 or Moment8, each by itself. The random bits are the
    reference's, so that results are equal wherever the float32 values are. A captured CUDA graph keeps the numbers
    step, lr and seed that it was captured with. ValueError for anything else.
    """
    first, first_scales = exp_avg if isinstance(exp_avg, Moment8) else (exp_avg, None)
    second, second_scales = exp_avg_sq if isinstance(exp_avg_sq, Moment8) else (exp_avg_sq, None)
    tensor, number = (clip, 1.0) if isinstance(clip, Tensor) else (None, float(clip))
    update(
        param, grad, first, second, first_scales, second_scales, copy, tensor, number,
        step, lr, *betas, eps, weight_decay, seed,
    )  # fmt: skip
