"""quantized_linear and its formats against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from phi4rv.ops.low_precision import FORMATS, QuantizedWeight, dequantize, quantize, slice_weight
from tests.kernels.check import PLACE, PLACES, Place, check_cuda_graph, check_parity
from triton_kernels import quantized_linear as kernels
from triton_kernels.quantized_linear import quantized_linear

REAL = [(1, 5120, 5120), (8, 7680, 5120), (64, 5120, 17920), (17, 1024, 5120)]


def draw(place: Place, *shape: int, scale: float = 1.0) -> Tensor:
    device, dtype = place
    return (scale * torch.randn(shape)).to(device, dtype).requires_grad_()


def weight(place: Place, format: str, N: int, K: int) -> QuantizedWeight:
    """Rows of different sizes, so that a scale in the wrong place shows."""
    q = quantize(torch.randn(N, K) * torch.logspace(0, -2, N)[:, None], format)
    zeros = None if q.zeros is None else q.zeros.to(place[0])
    return replace(q, data=q.data.to(place[0]), scales=q.scales.to(place[0]), zeros=zeros)


def both(x: Tensor, q: QuantizedWeight, bias: Tensor | None, gradients: bool = True) -> None:
    check_parity(
        lambda x, b: quantized_linear(x, q, b),
        lambda x, b: reference.quantized_linear(x, q, b),
        (x, bias),
        gradients,
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 33, 128), (1, 9, 384), (1, 1, 1100), (2, 33, 256), (7, 70, 384), (16, 64, 128), (17, 5, 200), (64, 33, 256)],
)
def test_parity(place: Place, format: str, M: int, N: int, K: int) -> None:
    both(draw(place, M, K), weight(place, format, N, K), draw(place, N) if N % 2 else None)


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[2:])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("M", "N", "K"), REAL)
def test_real_shapes(place: Place, format: str, M: int, N: int, K: int) -> None:
    both(draw(place, M, K), weight(place, format, N, K), None, gradients=False)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 128), (2, 3, 128), (128,), (70, 130)])
def test_other_shapes_of_x(place: Place, format: str, shape: tuple[int, ...]) -> None:
    """No row, batches, one vector, and more rows than the kernels take."""
    both(draw(place, *shape), weight(place, format, 10, shape[-1]), draw(place, 10))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
@pytest.mark.parametrize("M", [1, 3])
def test_extreme_values(place: Place, scale: float, M: int) -> None:
    small = 1e-3 if scale == 1e4 and place[1] == torch.float16 else 1.0  # so that the result fits float16
    for format in FORMATS:
        q = weight(place, format, 6, 256)
        both(draw(place, M, 256, scale=scale), replace(q, scales=q.scales * small), None)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("M", [1, 5])
def test_rows_that_are_not_adjacent(place: Place, M: int) -> None:
    for format in FORMATS:
        q = weight(place, format, 6, 128)
        wide, across = draw(place, M, 300).detach(), draw(place, 128, M).detach()
        both(wide[:, 64:192].requires_grad_(), q, None)
        both(across.T.requires_grad_(), q, None)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("M", [1, 16])
def test_every_code(place: Place, M: int) -> None:
    """Rows of the identity read the weight out: every code of every format, the bits of dequantize."""
    device, dtype = place
    all_bytes = torch.arange(256, dtype=torch.uint8, device=device)
    by_row = 0.37 + torch.arange(16, device=device)
    grouped = by_row[:4, None].bfloat16()
    zeros = torch.tensor([[0], [3], [8], [15]], dtype=torch.uint8, device=device)
    for q in (
        QuantizedWeight("int8", all_bytes.view(torch.int8).view(16, 16), by_row, None, (16, 16)),
        QuantizedWeight("fp8", all_bytes.view(torch.float8_e4m3fn).view(16, 16), by_row, None, (16, 16)),
        QuantizedWeight("int4", all_bytes.view(4, 64), grouped, None, (4, 128)),
        QuantizedWeight("int4_zero", all_bytes.view(4, 64), grouped, zeros, (4, 128)),
    ):
        K = q.shape[1]
        step = 5 if K == 128 and M == 1 else 1  # still every place in a word
        eye = torch.eye(K, dtype=dtype, device=device)[::step]
        read = torch.cat([quantized_linear(rows, q) for rows in eye.split(M)]).T
        expected = dequantize(q, dtype)[:, ::step]
        known = expected.isfinite()  # quantize gives no finite weight a NaN code
        assert int((~known).sum()) == (2 if q.format == "fp8" else 0)
        assert torch.equal(read[known], expected[known])


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("M", [1, 4])
def test_every_configuration(place: Place, M: int) -> None:
    space = kernels.ROW if M == 1 else kernels.TILE
    for format in FORMATS:
        for config in space.cases["4-bit" if format.startswith("int4") else "8-bit"]:
            with space.forced(config):
                both(draw(place, M, 1280), weight(place, format, 20, 1280), draw(place, 20), gradients=False)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("M", [1, 16])
def test_split_and_whole(place: Place, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of K that do not divide it evenly, against one part."""
    K = 3000 if M == 1 else 700
    for format in FORMATS:
        x, q, bias = draw(place, M, K).detach(), weight(place, format, 7, K), draw(place, 7).detach()
        outs = []
        for programs in (0, 1, 5):
            monkeypatch.setattr(kernels, "num_sms", lambda device, n=programs: n)
            outs.append(quantized_linear(x, q, bias))
            assert torch.equal(outs[-1], quantized_linear(x, q, bias))
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0])


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("format", FORMATS)
def test_operator(place: Place, format: str) -> None:
    """Schema, fake, autograd and compilation."""
    x, q, bias = draw(place, 3, 128), weight(place, format, 6, 128), draw(place, 6)
    torch.library.opcheck(kernels.forward, (x, format, q.data.view(torch.uint8), q.scales, q.zeros, 6, 128, bias))
    compiled = torch.compile(lambda x, b: quantized_linear(x, q, b), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, bias), quantized_linear(x, q, bias))


@pytest.mark.parametrize("pieces", [1000, 1 << 20])
def test_gradient_in_pieces(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", pieces)
    for format in FORMATS:
        place = ("cpu", torch.float32)
        both(draw(place, 70, 300), weight(place, format, 13, 300), draw(place, 13))


@pytest.mark.parametrize("format", FORMATS)
def test_errors_of_quantisation(format: str) -> None:
    """What quantize's docstring states, on normal weights with rows of zeros, tiny values and an outlier."""
    torch.manual_seed(0)
    w = torch.randn(64, 500)
    w[3] = 0
    w[5] *= 1e-30
    w[7, 11] = 1000.0
    w[9] += 5  # one-sided, which zero points need 0 in their range for
    error = (dequantize(quantize(w, format), torch.float32) - w).abs()
    assert error[3].max() == 0
    if format in ("int8", "fp8"):
        largest = w.abs().amax(1, keepdim=True)
        allowed = largest / 254 if format == "int8" else torch.maximum(w.abs() / 16, largest / 448 / 2**10)
    else:
        groups = torch.nn.functional.pad(w, (0, 12)).unflatten(1, (-1, 128))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        size = groups.abs().amax(2) / 13.8 if format == "int4" else (high - low) / 29.5
        allowed = size.repeat_interleave(128, 1)[:, :500]
    assert (error <= allowed * (1 + 1e-5)).all()


def test_formats() -> None:
    w = torch.randn(4, 300)
    shapes = {"int8": (4, 300), "fp8": (4, 300), "int4": (4, 192), "int4_zero": (4, 192)}
    for format in FORMATS:
        q = quantize(w.bfloat16(), format)
        assert q.data.shape == shapes[format] and q.shape == (4, 300)
        whole = dequantize(q, torch.bfloat16)
        assert whole.shape == (4, 300) and whole.dtype == torch.bfloat16
        assert torch.equal(dequantize(slice_weight(q, 0, 1, 3), torch.bfloat16), whole[1:3])
        assert torch.equal(dequantize(slice_weight(q, 1, 128, 290), torch.bfloat16), whole[:, 128:290])
        again = quantize(dequantize(q, torch.float32), format)
        assert torch.equal(again.data.view(torch.uint8), q.data.view(torch.uint8)) or format == "int4_zero"
    q = quantize(torch.arange(128.0)[None] / 127 * 14 - 7, "int4")
    codes = torch.stack([q.data & 15, q.data >> 4], -1).flatten()
    assert codes.tolist() == sorted(codes.tolist()) and (int(codes[0]), int(codes[-1])) == (1, 15)


def test_wrong_arguments_are_named() -> None:
    q = quantize(torch.randn(6, 128), "int4_zero")
    x = torch.randn(2, 128)
    with pytest.raises(ValueError, match=r"x is \(2, 127\), must be \(…, 128\)"):
        quantized_linear(x[:, 1:], q)
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        quantized_linear(x.double(), q)
    with pytest.raises(ValueError, match="bias is"):
        quantized_linear(x, q, torch.ones(5))
    with pytest.raises(ValueError, match="scales is"):
        quantized_linear(x, replace(q, scales=q.scales[:5]))
    with pytest.raises(ValueError, match="int4_zero with wrong zeros"):
        quantized_linear(x, replace(q, zeros=None))
    with pytest.raises(ValueError, match="format is 'int3'"):
        quantized_linear(x, replace(q, format="int3"))
    with pytest.raises(ValueError, match="format is 'int3', must be one of int8, fp8, int4, int4_zero"):
        quantize(torch.ones(2, 2), "int3")
    with pytest.raises(ValueError, match=r"weight is torch.int64"):
        quantize(torch.ones(2, 2, dtype=torch.int64), "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 16])
def test_graph_and_stream(format: str, M: int) -> None:
    """Captured on a side stream, replayed: the bits of an ordinary call, which are the same every time."""
    place = ("cuda", torch.bfloat16)
    x, q = draw(place, M, 5120).detach(), weight(place, format, 1000, 5120)
    assert torch.equal(quantized_linear(x, q), quantized_linear(x, q))
    check_cuda_graph(lambda x: quantized_linear(x, q), [x])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2])
def test_over_two_to_the_31_elements(M: int) -> None:
    N, K = (1 << 31) // 1024 + 5, 1024
    q = QuantizedWeight(
        "int8", torch.ones(N, K, dtype=torch.int8, device="cuda"), torch.ones(N, device="cuda"), None, (N, K)
    )
    out = quantized_linear(torch.ones(M, K, device="cuda", dtype=torch.bfloat16), q)
    assert bool((out == K).all())
