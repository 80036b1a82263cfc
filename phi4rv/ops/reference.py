"""Every operation in plain PyTorch: the definition that all kernels are held to, and what runs on a CPU.

Shapes: T tokens or P patches in one packed row, H query heads, G key/value heads, D head dim, C channels.
Each function takes any float dtype and returns the input's; sums that need it are in float32, or in float64 of
float64. Gradients are autograd's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phi4rv.ops.low_precision import (
    Moment8,
    QuantizedWeight,
    dequantize,
    fake_quantize_float8,
    quantize,
    random_bits,
    stochastic_round,
)

NO_LABEL = -100


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    key_ends: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v inside each document of a packed row.

    q (T, H, D), k and v (T, G, D) with H a multiple of G: query head h reads key head h // (H // G).
    cu_seqlens (N+1,) int32: document n is rows cu_seqlens[n]:cu_seqlens[n+1]; max_seqlen bounds their lengths
    (kernels need it, this definition does not). Causal: a row sees itself and what precedes it in its document.
    key_ends (T,) int32, causal only: row t sees the keys of its document before max(t + 1, key_ends[t]), counted in
    the packed row; inside a document they may not decrease. Rows of an image that hold the image's end see all of it.
    Returns (T, H, D).
    """
    if key_ends is not None and not causal:
        raise ValueError("packed_attention: key_ends are for causal attention only")
    outs = [q[:0]]  # a row without documents is a row too
    start = 0
    for qd, kd, vd in zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)), strict=True):
        ends = None if key_ends is None else key_ends[start : start + len(qd)] - start
        outs.append(attention(qd, kd, vd, causal, ends))
        start += len(qd)
    return torch.cat(outs)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, ends: Tensor | None = None) -> Tensor:
    """One document: q (M, H, D) are the last M of the N rows of k and v (N, G, D). Returns (M, H, D).

    ends (M,): causal, yet row m sees at least the first ends[m] keys.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if groups > 1:  # PyTorch's own grouped path has no fused kernel on the CPU
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    rows, keys = q.shape[1], k.shape[1]
    mask = None
    if causal and (1 < rows < keys or ends is not None):
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
    if mask is not None and ends is not None:
        mask |= torch.arange(keys, device=q.device) < ends[:, None]
    # The leading 1 is not a batch: without four dimensions PyTorch leaves its fused kernel for the plain one.
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=causal and rows == keys and rows > 1 and mask is None
    )
    return out[0].transpose(0, 1)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """New tokens against what is cached.

    q (B, M, H, D): the last M tokens of each of B documents. k, v (N, G, D): the cache, where document b holds rows
    starts[b] : starts[b] + lengths[b], its M new ones included; starts, lengths (B,). Token m of document b sees its
    first lengths[b] - M + m + 1 rows. A length is at least M, or 0 for a slot without a document, whose result is
    zeros. k and v are of q's dtype, or float8_e4m3fn; k_scale, v_scale float32, () or (G,), multiply what is stored.
    Returns (B, M, H, D).
    """
    out = torch.zeros_like(q)
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        rows = slice(start, start + length)
        out[b] = _cached_attention(q[b], k[rows], v[rows], k_scale, v_scale)
    return out


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

    k_pages, v_pages (pages, size, G, D); page_table (B, most pages) int32: row i of document b is
    k_pages[page_table[b, i // size], i % size]. Entries past a document's length may be anything.
    """
    out = torch.zeros_like(q)
    size = k_pages.shape[1]
    for b, length in enumerate(lengths.tolist()):
        pages = page_table[b, : math.ceil(length / size)].long()
        k, v = (x[pages].flatten(0, 1)[:length] for x in (k_pages, v_pages))
        out[b] = _cached_attention(q[b], k, v, k_scale, v_scale)
    return out


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
    """Packed runs of new tokens against a paged cache that holds them already: a prompt's next chunk.

    q (T, H, D): document b's new tokens are rows cu_seqlens[b] : cu_seqlens[b+1], the last of its lengths[b] rows, and
    each sees itself and what precedes it. cu_seqlens (B+1,) int32; max_seqlen bounds the runs. The rest as in
    ``paged_decode_attention``. A run may be empty. Returns (T, H, D).
    """
    outs = [q[:0]]
    size = k_pages.shape[1]
    for b, (qd, length) in enumerate(zip(q.split(cu_seqlens.diff().tolist()), lengths.tolist(), strict=True)):
        pages = page_table[b, : math.ceil(length / size)].long()
        k, v = (x[pages].flatten(0, 1)[:length] for x in (k_pages, v_pages))
        outs.append(_cached_attention(qd, k, v, k_scale, v_scale))
    return torch.cat(outs)


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> Tensor:
    """One document's new tokens against its rows as the cache holds them; zeros if it has none."""
    if not len(k):
        return torch.zeros_like(q)
    return attention(q, _dequantize_cache(k, k_scale, q.dtype), _dequantize_cache(v, v_scale, q.dtype), causal=True)


def _dequantize_cache(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows (N, G, D) of a cache in ``dtype``, by one scale or one for each head."""
    return stored.to(dtype) if scale is None else (_upcast(stored) * scale.reshape(-1, 1)).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s = x + residual; s / sqrt(mean(s²) + eps) · weight, over the last dimension. Returns (normed, s)."""
    summed = x if residual is None else x + residual
    s = _upcast(summed)
    normed = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), summed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias, over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, D/2) float32, of position · theta^(-2i/D) (RoFormer, Su et al. 2021)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """Rotates the first ``rotated`` heads of the fused row qkv (T, heads, D) by cos, sin (T, D/2); the rest passes.

    Channel i is paired with i + D/2 (half-split, as in GPT-NeoX and Phi-3).
    """
    a, b = _upcast(qkv[:, :rotated]).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)
    return torch.cat([turned, qkv[:, rotated:]], dim=1)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of the fused row (T, 2C) -> (T, C) (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, as in SigLIP2."""
    return F.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """The exact GELU, x · Φ(x), as in LLaVA's projector."""
    return F.gelu(x)


def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, table: Tensor, grids: Tensor) -> Tensor:
    """patches (P, 768) · weightᵀ (C, 768) + bias (C,) + the position table (N, C) resized to each image's grid.

    The table is a square grid of N rows; it is resized in float32, bilinear, antialiased, half-pixel centres
    (SigLIP2 NaFlex, Tschannen et al. 2025). grids (I, 2): rows and columns of the images, in order. Returns (P, C).
    """
    sizes = [tuple(grid) for grid in grids.tolist()]
    resized = {size: _resize_table(_upcast(table), *size) for size in dict.fromkeys(sizes)}
    embedded = F.linear(patches.to(weight.dtype), weight, bias)
    if not sizes:
        return embedded
    return embedded + torch.cat([resized[size] for size in sizes]).to(embedded.dtype)


def _resize_table(table: Tensor, rows: int, cols: int) -> Tensor:
    """The rows of a square grid, (N, C), as those of rows × cols, (rows · cols, C)."""
    # Not F.interpolate: on a CPU, PyTorch 2.13's is wrong where the result has one column.
    side = math.isqrt(len(table))
    down, across = (_triangle_filter(side, size, table.device).to(table.dtype) for size in (rows, cols))
    return (across @ (down @ table.view(side, -1)).view(rows, side, -1)).flatten(0, 1)


def _triangle_filter(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old) weights: a triangle around each new sample's centre, wider where samples would be skipped."""
    scale = old / new
    wanted, given = (torch.arange(n, dtype=torch.float64, device=device) + 0.5 for n in (new, old))
    weights = (1 - (given - wanted[:, None] * scale).abs() / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def projector(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """gelu(x w0ᵀ + b0) w1ᵀ + b1 with the exact (erf) GELU: (P, Cv) -> (P, C) (LLaVA's mlp2x_gelu)."""
    return F.linear(F.gelu(F.linear(x, w0, b0)), w1, b1)


def scatter_rows(row: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """``row`` (T, C) with row[index[p]] replaced by values[p], (P, C); index (P,) without repeats."""
    return row.index_copy(0, index, values.to(row.dtype))


def project_into(row: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, index: Tensor) -> Tensor:
    """``row`` (T, C) with row[index[p]] replaced by the projection of x[p], (P, Cv); index (P,) without repeats."""
    return scatter_rows(row, projector(x, w0, b0, w1, b1), index)


def quantized_projector(x: Tensor, w0: QuantizedWeight, b0: Tensor, w1: QuantizedWeight, b1: Tensor) -> Tensor:
    """``projector`` with weights in fp8, and the rows of x and of the activation rounded to fp8 as weights are."""
    h = F.gelu(quantized_linear(fake_quantize_float8(x), w0, b0))
    return quantized_linear(fake_quantize_float8(h), w1, b1)


def quantize_rows(x: Tensor, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (…, C), its columns multiplied by ``by`` (C,) float32, as values in float8_e4m3fn (…, C) and scales (…).

    scale = largest magnitude of the row / 448, and scale · value is the row rounded to nearest, in float32. A row with
    a NaN or an infinity in it multiplies to NaN. No gradient.
    """
    wide = x.detach().float() if by is None else x.detach().float() * by
    wide = wide.where(~wide.isnan(), math.inf)
    q = quantize(wide.flatten(0, -2) if x.ndim > 2 else torch.atleast_2d(wide), "fp8")
    return q.data.view(x.shape), q.scales.view(x.shape[:-1])


@torch.compiler.disable  # PyTorch 2.13 cannot trace the autograd function below in a graph for any length
def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, K) · weightᵀ (N, K) -> (T, N) with both rounded to fp8 by ``quantize_rows``; no bias.

    x's gradient is the incoming one, its columns multiplied by the weight's scales and its rows then rounded alike,
    times the rounded weight; the weight's gradient is the exact product (torchao's recipe rowwise_with_gw_hp; scales
    for small groups of values and not for whole tensors: DeepSeek-V3, 2024, section 3.3).
    """
    return _Fp8Linear.apply(x, weight)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        (a, a_scales), (b, b_scales) = quantize_rows(x), quantize_rows(weight)
        wide = _upcast(x).dtype
        return (F.linear(a.to(wide), b.to(wide)) * a_scales[:, None] * b_scales).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        b, b_scales = quantize_rows(weight)
        a, a_scales = quantize_rows(grad, b_scales)
        wide = _upcast(x).dtype
        return (a.to(wide) @ b.to(wide) * a_scales[:, None]).to(x.dtype), grad.t() @ x


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, filter_below: float = 0.0, marked: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Sum of -log softmax(hidden · weightᵀ)[target] over the labelled rows, and their count.

    hidden (T, C), weight (V, C), targets (T,) int64 with NO_LABEL where there is none. Unlabelled rows are never
    multiplied. Returns (sum float32 scalar, count int64 scalar): the caller divides by the global batch's count.
    ``filter_below``: logits whose probability is under it, the target's excepted, get no gradient, which makes it
    inexact (Cut Your Losses, Wijmans et al. 2024). ``marked`` (T,) bool: the sum over the rows that it marks comes
    third, without gradient.
    """
    labelled = (targets != NO_LABEL).nonzero().squeeze(1)
    logits = _upcast(F.linear(hidden[labelled], weight))
    if filter_below > 0 and logits.requires_grad:
        small = logits.detach().softmax(-1) < filter_below
        dropped = small.scatter(1, targets[labelled, None], False)
        logits.register_hook(lambda grad: grad.masked_fill(dropped, 0.0))
    total, count = F.cross_entropy(logits, targets[labelled], reduction="sum"), labelled.new_tensor(len(labelled))
    if marked is None:
        return total, count
    part = marked[labelled]
    return total, count, F.cross_entropy(logits.detach()[part], targets[labelled[part]], reduction="sum")


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
    """One decoupled-weight-decay Adam step in place, computed in float32 (Loshchilov & Hutter 2019, algorithm 2).

    param, grad and copy are contiguous and of one shape; grad, of any float dtype, is multiplied by ``clip`` (a
    number, or a float32 scalar on the device) first. param is float32, or bfloat16, which is then rounded
    stochastically. The moments are float32, bfloat16 (rounded to nearest) or 8-bit. ``copy``: a shorter float tensor
    that gets the new param, rounded to nearest. ``seed`` draws the roundings of this tensor, with step and index;
    required for a bfloat16 param and for 8-bit moments.
    """
    beta1, beta2 = betas
    bits = None
    if param.dtype == torch.bfloat16 or isinstance(exp_avg, Moment8) or isinstance(exp_avg_sq, Moment8):
        if seed is None:
            raise ValueError("adamw: a bfloat16 param and 8-bit moments are rounded stochastically and need a seed")
        bits = random_bits(seed, step, param.numel(), param.device)
    p, g = _upcast(param).flatten(), _upcast(grad).flatten() * clip
    first, second = _moment(exp_avg, signed=True), _moment(exp_avg_sq, signed=False)
    first = first.lerp(g, 1 - beta1)
    second = second.lerp(g * g, 1 - beta2)
    denominator = (second / (1 - beta2**step)).sqrt_().add_(eps)
    p = (p * (1 - lr * weight_decay)).addcdiv_(first, denominator, value=-lr / (1 - beta1**step))
    _store(param, p, bits, signed=None)
    _store(exp_avg, first, bits, signed=True)
    _store(exp_avg_sq, second, bits, signed=False)
    if copy is not None:
        copy.copy_(param)


def _moment(moment: Tensor | Moment8, signed: bool) -> Tensor:
    return moment.decode(signed) if isinstance(moment, Moment8) else _upcast(moment).flatten()


def _store(target: Tensor | Moment8, x: Tensor, bits: Tensor | None, signed: bool | None) -> None:
    """Writes flat ``x``. signed: which moment; None for the parameter, whose bfloat16 is rounded stochastically."""
    if isinstance(target, Moment8):
        assert bits is not None and signed is not None
        target.encode_(x, bits, signed)
    elif signed is None and bits is not None and target.dtype == torch.bfloat16:
        target.copy_(stochastic_round(x, bits).view(target.shape))
    else:
        target.copy_(x.view(target.shape))


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (…, K) · weightᵀ (N, K) + bias (N,), the weight dequantised to x's dtype. The weight gets no gradient."""
    return F.linear(x, dequantize(weight, x.dtype), bias)


def decode_gemv(
    x: Tensor,
    w: Tensor | QuantizedWeight,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """f(norm(x) wᵀ) + residual for 1 to 8 rows: one of a decoder layer's products with what stands around it.

    x (M, K), w (N, K). norm (K,): x is RMS-normalised with this weight and eps first. swiglu: f is silu(gate) · up
    of a row's halves, else nothing. Returns (M, N) or (M, N/2), as residual is.
    """
    if norm is not None:
        x = rms_norm(x, norm, eps)[0]
    y = quantized_linear(x, w) if isinstance(w, QuantizedWeight) else F.linear(x, w)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual
