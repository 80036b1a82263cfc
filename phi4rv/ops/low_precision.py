"""Numbers kept in fewer bits: stochastic rounding, the optimiser's 8-bit moments, and quantised weights.

The definitions that kernels repeat bit by bit; plain PyTorch, any device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

UINT32_MASK = 0xFFFFFFFF
# Elements of 8-bit moments that share a scale.
MOMENT_BLOCK = 256
# Elements along K that share a scale (and a zero point) in the int4 formats.
GROUP_SIZE = 128
FORMATS = ("int8", "fp8", "int4", "int4_zero")
FP8_MAX = 448.0
# Scales below have no inverse: about the smallest normal float32.
MIN_SCALE = 1.2e-38

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def hash32(x: IntOrTensor) -> IntOrTensor:
    """The finaliser of MurmurHash3 (Appleby): 32 bits to 32 bits, one to one. int, or int64 tensor."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & UINT32_MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & UINT32_MASK
    return x ^ (x >> 16)


def random_key(seed: int, step: int) -> int:
    """What ``random_bits`` of one optimiser step start from: 32 bits."""
    return hash32(hash32(seed & UINT32_MASK) ^ (step & UINT32_MASK))


def random_bits(seed: int, step: int, elements: int, device: torch.device) -> Tensor:
    """32 random bits of each element, (elements,) int64: a hash of (seed, step, index), the same on every device.

    Tensors that are updated in the same step need seeds of their own, or their roundings are correlated.
    """
    index = torch.arange(elements, device=device)
    return hash32(hash32(random_key(seed, step) ^ (index >> 32)) ^ (index & UINT32_MASK))


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with odds that make the mean exact, by the low 16 of ``bits``.

    NaN stays NaN; a value beyond the largest bfloat16 may become infinite.
    """
    raw = x.contiguous().view(torch.int32).to(torch.int64)
    rounded = ((raw + (bits & 0xFFFF)) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), torch.nan, rounded)


class Moment8(NamedTuple):
    """A moment of n elements in 8 bits each, with a float32 scale, the largest magnitude, of every 256.

    codes (n,) uint8, scales (ceil(n / 256),) float32. First moment: sign(c) · (c/127)² · scale with c = code - 128.
    Second moment: (code/255)⁴ · scale, so that its square root is quadratic too. Near zero these reach 6e-5 (first)
    and 2.4e-10 (second) of the scale. A second moment never gets code 0, for it is divided by.

    Codes are rounded stochastically, without bias in the value: rounded to nearest, a moving average whose step is
    less than half a code stands still (after 200 steps of a small network at beta2 = 0.999 the loss was up to 3 %
    off, stochastically under 0.5 %). Root mean square error of one rounding, of the moment's own root mean square:
    first moment 1.0 % (normal) and 1.3 % (heavy-tailed, Student's t of 3 degrees of freedom), square root of the
    second 0.5 % and 0.6 % (their squares). Block-wise scales: Dettmers et al. 2022.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def zeros(cls, elements: int, device: torch.device | str | None = None) -> Moment8:
        """The state before the first step."""
        codes = torch.zeros(elements, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(-(-elements // MOMENT_BLOCK), device=device))

    def decode(self, signed: bool) -> Tensor:
        """(n,) float32; ``signed`` for the first moment."""
        scales = self.scales.repeat_interleave(MOMENT_BLOCK)[: len(self.codes)]
        if signed:
            c = self.codes.float() - 128
            return c * c.abs() * (1 / 127**2) * scales
        return (self.codes.float() * (1 / 255)).square().square() * scales

    def encode_(self, x: Tensor, bits: Tensor, signed: bool) -> None:
        """Stores x (n,) float32, in place. Rounds by the low 23 of ``bits`` (signed), else by the high 23."""
        padding = self.scales.numel() * MOMENT_BLOCK - x.numel()
        scales = F.pad(x.abs(), (0, padding)).view(-1, MOMENT_BLOCK).amax(1)
        self.scales.copy_(scales)
        share = x.abs() * _inverse(scales).repeat_interleave(MOMENT_BLOCK)[: x.numel()]
        draw = ((bits & 0x7FFFFF) if signed else bits >> 9).float() * 2**-23
        if signed:
            value = share * 127**2
            low = value.sqrt().floor()
            code = low + (draw * (2 * low + 1) < value - low * low)
            code = 128 + torch.where(x < 0, -code, code).clamp(-127, 127)
        else:
            root = share.sqrt() * 255**2
            low = root.sqrt().floor()
            square, odd = low * low, 2 * low + 1  # (low + 1)⁴ - low⁴ = odd · (2 low² + odd)
            up = draw * (odd * (2 * square + odd)) < (root - square) * (root + square)
            code = (low + up).clamp(1, 255)
        self.codes.copy_(code)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) in ``format``, ready for ``quantized_linear``; made by ``quantize``.

    - ``int8``: data (N, K) int8 in -127..127, scales (N,) float32: w = scale · code.
    - ``fp8``: data (N, K) float8_e4m3fn, scales (N,) float32: w = scale · value.
    - ``int4``: data (N, 64 · G) uint8 for G = ceil(K / 128) groups, byte j of a row holding codes 2j (low four bits)
      and 2j + 1, scales (N, G) bfloat16: w = scale · (code - 8), code in 1..15.
    - ``int4_zero``: the same with zeros (N, G) uint8: w = scale · (code - zero), code and zero in 0..15.

    Where K is no multiple of 128 the last group is filled up with codes of value 0.
    """

    format: str
    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, int]


def quantize(weight: Tensor, format: str, clip_ratio: Tensor | None = None) -> QuantizedWeight:
    """A float weight (N, K) rounded to nearest in ``format``, one of FORMATS. ValueError for another.

    clip_ratio: factor of each scale, by row (N,) in int8 and fp8, by group (N, G) in int4; values then out of range are
    clipped. For a weight on the meta device only the shapes.

    Largest errors, of the row's (int8, fp8) or group's (int4) largest magnitude a, or its extent e from the smallest
    to the largest value, 0 included: int8 a/254; fp8 a/28, and 1/16 of each value down to a/28672; int4 a/13.8;
    int4_zero e/29.5.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, must be one of {', '.join(FORMATS)}")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}, must be a float matrix (N, K)")
    shape = (weight.shape[0], weight.shape[1])
    if weight.is_meta:
        return _quantize_meta(shape, format)
    w = weight.detach().float()
    factors = 1.0 if clip_ratio is None else clip_ratio
    if format in ("int8", "fp8"):
        limit = 127 if format == "int8" else FP8_MAX
        scales = w.abs().amax(1) * factors / limit if w.numel() else w.new_zeros(len(w))
        units = (w * _inverse(scales)[:, None]).clamp(-limit, limit)
        data = units.round().to(torch.int8) if format == "int8" else units.to(torch.float8_e4m3fn)
        return QuantizedWeight(format, data, scales, None, shape)
    groups = F.pad(w, (0, -shape[1] % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE))
    if format == "int4":
        scales = (groups.abs().amax(2) * factors / 7).bfloat16()
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups.amin(2).clamp(max=0) * factors, groups.amax(2).clamp(min=0) * factors
        scales = ((high - low) / 15).bfloat16()
        zeros = (-low * _inverse(scales)).round().clamp(0, 15)
    codes = (groups * _inverse(scales)[..., None]).round() + zeros[..., None]
    codes = codes.clamp(1 if format == "int4" else 0, 15).to(torch.uint8).flatten(1)
    data = codes[:, 0::2] | codes[:, 1::2] << 4
    return QuantizedWeight(format, data, scales, zeros.to(torch.uint8) if format == "int4_zero" else None, shape)


def _quantize_meta(shape: tuple[int, int], format: str) -> QuantizedWeight:
    """On the meta device, where computing it takes 10 ms a weight."""
    n, groups = shape[0], -(-shape[1] // GROUP_SIZE)
    if format in ("int8", "fp8"):
        data = torch.empty(shape, dtype=torch.int8 if format == "int8" else torch.float8_e4m3fn, device="meta")
        return QuantizedWeight(format, data, torch.empty(n, device="meta"), None, shape)
    data = torch.empty(n, groups * GROUP_SIZE // 2, dtype=torch.uint8, device="meta")
    scales = torch.empty(n, groups, dtype=torch.bfloat16, device="meta")
    zeros = torch.empty(n, groups, dtype=torch.uint8, device="meta") if format == "int4_zero" else None
    return QuantizedWeight(format, data, scales, zeros, shape)


def slice_weight(q: QuantizedWeight, dim: int, start: int, end: int) -> QuantizedWeight:
    """Rows (dim 0) or columns (dim 1) start:end, as views. Columns begin at a multiple of GROUP."""
    if dim == 0:
        zeros = None if q.zeros is None else q.zeros[start:end]
        rows = slice(start, end)
        return replace(q, data=q.data[rows], scales=q.scales[rows], zeros=zeros, shape=(end - start, q.shape[1]))
    shape = (q.shape[0], end - start)
    if q.format in ("int8", "fp8"):
        return replace(q, data=q.data[:, start:end], shape=shape)
    groups = slice(start // GROUP_SIZE, -(-end // GROUP_SIZE))
    data = q.data[:, groups.start * GROUP_SIZE // 2 : groups.stop * GROUP_SIZE // 2]
    zeros = None if q.zeros is None else q.zeros[:, groups]
    return replace(q, data=data, scales=q.scales[:, groups], zeros=zeros, shape=shape)


def dequantize(q: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight (N, K), computed in float32 (float64 if that is asked for) and rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    data, scales = q.data, q.scales.to(wide)
    if q.format in ("int8", "fp8"):
        return (data.to(wide) * scales[:, None]).to(dtype)
    codes = torch.stack([data & 15, data >> 4], -1).flatten(1).unflatten(1, (-1, GROUP_SIZE)).to(wide)
    zeros = 8.0 if q.zeros is None else q.zeros.to(wide)[..., None]
    return ((codes - zeros) * scales[..., None]).to(dtype).flatten(1)[:, : q.shape[1]]


def fake_quantize_float8(x: Tensor) -> Tensor:
    """Each row quantised to e4m3, with its largest magnitude / 448 as scale, and back. No gradient."""
    return dequantize(quantize(x, "fp8"), x.dtype)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scales in float32; 0 where that would be infinite or nearly so."""
    wide = scales.float()
    return torch.where(wide >= MIN_SCALE, 1 / wide, 0.0)
