"""What the kernels that read a KV cache share: float8 numbers, and checks of arguments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from triton_kernels.common.launch import check, check_float

# The interpreter's own conversion turns the codes of NaN into 480.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def fp8_to_fp16(codes):
    """float8_e4m3fn, as bytes, in float16, which holds each of its values."""
    if cuda_capability_geq(8, 9) and not INTERPRETED:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    wide = codes.to(tl.uint16)
    low = wide & 0x7F
    # Moved to its place, an exponent of bias 7 counts as one of bias 15: 2^8 too small.
    values = (((wide & 0x80) << 8) | (low << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(low == 0x7F, float("nan"), values).to(tl.float16)


@triton.jit
def floor_to_power_of_two(largest):
    """The power of two that brings float32 magnitudes up to ``largest`` into float16's range; normal."""
    bits = largest.to(tl.uint32, bitcast=True) & 0x7F800000
    return tl.maximum(bits.to(tl.float32, bitcast=True), 1.1754944e-38)


@triton.jit
def _convert_kernel(codes, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, fp8_to_fp16(tl.load(codes + i)))


def check_cache(name: str, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """q (…, heads, head dim) against k and v (…, key heads, head dim), of q's dtype or float8_e4m3fn."""
    check_float(q, f"{name}: q")
    stored = k.dtype == v.dtype and k.dtype in (q.dtype, torch.float8_e4m3fn)
    check(stored, f"{name}: k is {k.dtype}, v is {v.dtype}, both must be {q.dtype} as q is, or torch.float8_e4m3fn")
    H, D = q.shape[-2:]
    G = k.shape[-2]
    check(v.shape == k.shape, f"{name}: v has shape {tuple(v.shape)}, must be that of k, {tuple(k.shape)}")
    check(k.shape[-1] == D, f"{name}: k has head dim {k.shape[-1]}, q has {D}")
    check(0 < D <= 256, f"{name}: head dim {D} must be 1 to 256")
    check(G > 0 and H % G == 0, f"{name}: {H} query heads must be a multiple of {G} key heads")
    # A copy would be of the whole cache, at every step.
    check(k.stride(-1) == 1 and v.stride(-1) == 1, f"{name}: the channels of k and v must be adjacent in memory")
    for title, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        fits = scale is None or (scale.dtype == torch.float32 and scale.shape in ((), (G,)))
        check(fits, f"{name}: {title} must be float32, a scalar or one for each of {G} key heads")


def check_int_tensor(name: str, title: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless x holds integers in this shape."""
    fits = x.dtype in (torch.int32, torch.int64) and x.shape == shape
    check(fits, f"{name}: {title} is {x.dtype} {tuple(x.shape)}, must be int32 or int64 {tuple(shape)}")


def fp8_as_bytes(x: Tensor) -> Tensor:
    """float8 as bytes: the kernel converts them where the hardware does not, and the interpreter cannot load it."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def scale_stride(scale: Tensor | None) -> int:
    """0 where one scale is every head's."""
    return scale.stride(0) if scale is not None and scale.ndim else 0
