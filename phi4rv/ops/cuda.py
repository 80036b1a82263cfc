"""The CUDA kernels of ``csrc/`` as operations, where its library has been built."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4rv.ops import projector_gradient
from phi4rv.ops.low_precision import GROUP_SIZE, QuantizedWeight

# Set to 1, the kernels run on CPU tensors, emulated thread by thread (csrc/emulator/): for tests, very slowly.
EMULATE = "PHI4RV_EMULATE"
HEAD_DIMS = (64, 72, 80, 128)


def emulated() -> bool:
    """Whether PHI4RV_EMULATE asks for the emulated library."""
    return os.environ.get(EMULATE) == "1"


def library_path() -> Path:
    """The library that ``load`` loads: of csrc/build.py, or of csrc/build.py --emulated."""
    return Path(__file__).parents[1] / "lib" / ("phi4rv_emulated.so" if emulated() else "phi4rv_cuda.so")


def build_record() -> str:
    """What was built of csrc/, or why it was not, in one line: as csrc/build.py or the wheel's build left it."""
    record = library_path().with_name("csrc.txt")
    recorded = record.read_text(encoding="utf-8").strip() if record.exists() else ""
    if library_path().exists():
        return "built, emulated for a CPU" if emulated() else recorded or "built (for what, is not recorded)"
    if recorded.startswith("not built") and not emulated():
        return recorded
    return f"not built: `python csrc/build.py{' --emulated' * emulated()}` builds it where nvcc is found"


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels do not run on this device, or None."""
    if not library_path().exists():
        return f"csrc/ is {build_record()}"
    if emulated():
        return None if device.type == "cpu" else f"{EMULATE}=1 runs the CUDA kernels on a CPU"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "the CUDA kernels need a Hopper GPU (sm_90)"
    return None


@functools.cache
def load() -> None:
    """Registers the library's operators, ``phi4rv_cuda::…``, with their fakes and gradients.

    A caller that torch.compile traces must have been preceded by a call: tracing cannot load a library.
    """
    if torch.compiler.is_compiling():
        return
    torch.ops.load_library(library_path())
    torch.library.register_fake("phi4rv_cuda::packed_attention", _fake_attention)
    torch.library.register_fake("phi4rv_cuda::packed_attention_backward", _fake_attention_backward)
    torch.library.register_fake("phi4rv_cuda::decode_gemv", _fake_gemv)
    for decode in ("phi4rv_cuda::decode_attention", "phi4rv_cuda::paged_decode_attention"):
        torch.library.register_fake(decode, _fake_decode)
        torch.library.register_autograd(decode, _no_gradient)
    torch.library.register_autograd("phi4rv_cuda::packed_attention", _autograd_backward, setup_context=_setup_context)
    for name, fake in (("projector", _fake_projector), ("quantized_projector", _fake_quantized_projector)):
        torch.library.register_fake(f"phi4rv_cuda::{name}", fake)
    torch.library.register_fake("phi4rv_cuda::project_into", lambda row, *_: row.new_empty(row.shape))
    gradient = projector_gradient
    torch.library.register_autograd(
        "phi4rv_cuda::projector", gradient.projector_backward, setup_context=gradient.save_projector
    )
    torch.library.register_autograd(
        "phi4rv_cuda::project_into", gradient.project_into_backward, setup_context=gradient.save_project_into
    )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    key_ends: Tensor | None = None,
) -> Tensor:
    """As ``reference.packed_attention``: bfloat16 or float16, head dim 64, 72, 80 or 128, rows 16-byte aligned.

    ValueError with key_ends; RuntimeError naming any other argument that the kernel cannot take. The gradient is
    ``packed_attention_backward``'s.
    """
    if key_ends is not None:
        raise ValueError("packed_attention: the CUDA kernel has no key_ends; use the torch or the triton kernels")
    load()
    out: Tensor = torch.ops.phi4rv_cuda.packed_attention(q, k, v, cu_seqlens, max_seqlen, causal)[0]
    return out


def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of ``packed_attention``, contiguous; out (T, H, D) and lse (H, T) float32 are its operator's results.

    dout (T, H, D) of q's dtype is read in place if its heads are adjacent, else copied. The same input gives the same
    bits. dq is summed as integers of a unit that is 2⁻³⁰ of ‖doutᵢ‖ · maxⱼ ‖vⱼ‖ · maxⱼ |kⱼd| / sqrt(D) over the keys of
    the document: its roundings stay under bfloat16's own until values, or a channel's keys, that nobody attends to are
    2⁷ times the others in a document of 16384 rows, 2¹³ in one of 200. A row of dq is NaN where that or a score is not
    finite.
    RuntimeError that names any other argument.
    """
    load()
    H, D = q.shape[1:]
    adjacent = dout.stride()[1:] == (D, 1) and dout.stride(0) >= H * D
    if not adjacent or dout.stride(0) % 8 or dout.storage_offset() % 8:
        dout = dout.contiguous()
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.phi4rv_cuda.packed_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens, max_seqlen, causal
    )
    return grads


@dataclass(frozen=True)
class RepackedWeight:
    """A ``QuantizedWeight`` in the order that ``decode_gemv`` reads it in: what ``repack`` returns."""

    data: Tensor
    scales: Tensor | None


def repack(q: QuantizedWeight) -> RepackedWeight:
    """``q`` for ``decode_gemv``; once, when a model is loaded. The 8-bit formats share q's memory, the others copy it.

    int4 and int4_zero: data (N/8, G, 528 or 544) uint8, one group of eight rows after another: 64 bytes of codes a
    row, eight bfloat16 scales and, with zero points, eight int16. A word's codes 0, 2, 4, 6 are in its low half and
    1, 3, 5, 7 in its high half, so that one mask takes out two neighbours. ValueError if N is no multiple of 8.
    """
    if q.shape[0] % 8:
        raise ValueError(f"repack: the weight has {q.shape[0]} rows, must have a multiple of 8")
    if q.format in ("int8", "fp8"):
        data = q.data.view(torch.uint8) if q.format == "fp8" else q.data
        return RepackedWeight(data.contiguous(), q.scales.contiguous())
    words = q.data.unflatten(1, (-1, 4))
    nibbles = torch.cat([words & 15, words >> 4], -1)
    codes = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    pieces = [codes.flatten(1).unflatten(1, (-1, GROUP_SIZE // 2)), q.scales[..., None].view(torch.uint8)]
    if q.zeros is not None:
        pieces.append(q.zeros[..., None].short().view(torch.uint8))
    eights = [piece.unflatten(0, (-1, 8)).transpose(1, 2).flatten(2) for piece in pieces]
    return RepackedWeight(torch.cat(eights, -1), None)


def decode_gemv(
    x: Tensor,
    w: Tensor | RepackedWeight,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """As ``reference.decode_gemv``, where a quantised weight is ``repack``ed first.

    1 to 8 rows of bfloat16 or float16, K a multiple of 32, N of 8 (16 with swiglu); everything contiguous and at
    multiples of 16 bytes. w and norm are read before the kernel in front of this one has ended, so it may not be what
    writes them. A row's bits do not depend on the other rows. The codes of fp8's NaN, which ``quantize`` never
    gives, count as ±480. No gradient. RuntimeError that names any other argument, TypeError for a weight that is not
    repacked.
    """
    load()
    if isinstance(w, QuantizedWeight):
        raise TypeError("decode_gemv: w is a QuantizedWeight; give cuda.repack(w), made once")
    data, scales = (w.data, w.scales) if isinstance(w, RepackedWeight) else (w, None)
    y: Tensor = torch.ops.phi4rv_cuda.decode_gemv(x, data, scales, norm, eps, residual, swiglu)
    return y


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """As ``reference.decode_attention``: q bfloat16 or float16, head dim 64, 72 (not with float8), 80 or 128.

    k and v are of q's dtype, or float8_e4m3fn; they may be views whose channels are adjacent and whose heads and rows
    lie multiples of 16 bytes apart. starts, lengths: int32 or int64. No gradient. RuntimeError names a wrong argument.
    """
    load()
    q = q if q.stride(-1) == 1 else q.contiguous()
    out: Tensor = torch.ops.phi4rv_cuda.decode_attention(q, k, v, starts, lengths, k_scale, v_scale)
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
    """As ``reference.paged_decode_attention``, with the limits of ``decode_attention``; page_table int32 or int64."""
    load()
    q = q if q.stride(-1) == 1 else q.contiguous()
    out: Tensor = torch.ops.phi4rv_cuda.paged_decode_attention(
        q, k_pages, v_pages, page_table, lengths, k_scale, v_scale
    )
    return out


def _fake_decode(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _no_gradient(ctx: Any, dout: Tensor) -> None:
    raise RuntimeError("decode_attention has no autograd formula: it is for inference")


def projector(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """As ``reference.projector``, (P, Cv) -> (P, C): all bfloat16 or all float16, widths multiples of 8.

    x may be columns of a wider tensor, 16-byte aligned; the rest is contiguous. RuntimeError naming any argument that
    the kernel cannot take. The gradient is ``projector_gradient``'s, by Triton's kernels.
    """
    load()
    out: Tensor = torch.ops.phi4rv_cuda.projector(x, w0, b0, w1, b1)
    return out


def project_into(row: Tensor, x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, index: Tensor) -> Tensor:
    """As ``reference.project_into``; row (T, C) of x's dtype, index (P,) int64, the rest as in ``projector``.

    index has no repeats and lies within 0 <= index < T: that is not checked, for it would stop the device.
    """
    load()
    out: Tensor = torch.ops.phi4rv_cuda.project_into(row, x, w0, b0, w1, b1, index)
    return out


def quantized_projector(x: Tensor, w0: QuantizedWeight, b0: Tensor, w1: QuantizedWeight, b1: Tensor) -> Tensor:
    """As ``reference.quantized_projector``: x as in ``projector``, Cv and the inner width multiples of 16. No gradient.

    Sums in float32 of the tensor core's, which are of 128 terms (DeepSeek-V3, 2024). ValueError for weights that are
    not in the format fp8.
    """
    if w0.format != "fp8" or w1.format != "fp8":
        raise ValueError(f"quantized_projector: weights are {w0.format} and {w1.format}, must be fp8")
    load()
    operator = torch.ops.phi4rv_cuda.quantized_projector
    out: Tensor = operator(x, w0.data, w0.scales, b0, w1.data, w1.scales, b1)
    return out


def _fake_projector(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w1.shape[0])


def _fake_quantized_projector(
    x: Tensor, w0: Tensor, s0: Tensor, b0: Tensor, w1: Tensor, s1: Tensor, b1: Tensor
) -> Tensor:
    return x.new_empty(x.shape[0], w1.shape[0])


def _fake_gemv(
    x: Tensor,
    w: Tensor,
    scales: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    swiglu: bool,
) -> Tensor:
    columns = w.shape[0] * 8 if w.ndim == 3 else w.shape[0]
    return x.new_empty(x.shape[0], columns // 2 if swiglu else columns)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = packed_attention_backward(dout, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, ctx.causal)
    return *grads, None, None, None
