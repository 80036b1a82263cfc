"""decode_gemv against its definition: csrc/'s kernel, and Triton's in a row."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc import build
from phi4rv.ops import cuda, reference
from phi4rv.ops.low_precision import FORMATS, QuantizedWeight, dequantize, quantize
from tests.kernels.check import CUDA_PLACE, CUDA_PLACES, PLACES, Place, check_parity, draw
from triton_kernels import quantized_linear as triton_kernels

WEIGHTS = ("full", *FORMATS)
EPS = 1e-5
# (N, K): one unit; tails of 16 and 8 rows; columns that fill no group, no pair, no round of warps; many tiles a block;
# 8 rows that are too much for shared memory.
SHAPES = [(8, 32), (24, 4000), (48, 416), (256, 160), (40, 1376), (16, 8224)]
REAL = [(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920)]


@pytest.fixture(autouse=True)
def kernels(csrc: None) -> None:
    """Every test here wants them loaded."""


def weight(place: Place, form: str, N: int, K: int) -> Tensor | QuantizedWeight:
    """Rows of different sizes, so that a scale in the wrong place shows."""
    w = torch.randn(N, K) * torch.logspace(0, -1, N)[:, None] * K**-0.5
    return w.to(place[0], place[1]) if form == "full" else moved(quantize(w, form), place[0])


def moved(q: QuantizedWeight, device: str) -> QuantizedWeight:
    zeros = None if q.zeros is None else q.zeros.to(device)
    return replace(q, data=q.data.to(device), scales=q.scales.to(device), zeros=zeros)


def packed(w: Tensor | QuantizedWeight) -> Tensor | cuda.RepackedWeight:
    return w if isinstance(w, Tensor) else cuda.repack(w)


def both(kernel: Any, x: Tensor, w: Any, norm: Tensor | None = None, residual: Tensor | None = None, swiglu=False):
    """Parity; a weight in full is rounded with x, a quantised one is what it is."""
    given = packed(w) if kernel is cuda.decode_gemv else w
    full = isinstance(w, Tensor)
    check_parity(
        lambda x, n, r, v: kernel(x, v if full else given, n, EPS, r, swiglu),
        lambda x, n, r, v: reference.decode_gemv(x, v if full else w, n, EPS, r, swiglu),
        (x, norm, residual, w if full else None),
        gradients=False,
    )


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_parity(place: Place, form: str, rows: int, N: int, K: int) -> None:
    both(cuda.decode_gemv, draw(place, rows, K), weight(place, form, N, K))


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[2:])
@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("N", "K"), REAL)
def test_real_shapes(place: Place, form: str, rows: int, N: int, K: int) -> None:
    swiglu, norm = N == 35840, draw(place, K) if K == 5120 else None
    both(cuda.decode_gemv, draw(place, rows, K), weight(place, form, N, K), norm, None, swiglu)


@pytest.mark.parametrize(
    ("kernel", "place"),
    [pytest.param("cuda", *p.values, id=f"cuda-{p.id}", marks=p.marks) for p in CUDA_PLACES]
    + [pytest.param("triton", *p.values, id=f"triton-{p.id}", marks=p.marks) for p in PLACES],
)
@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 5])
def test_what_stands_around_the_product(kernel: str, place: Place, form: str, rows: int) -> None:
    run = cuda.decode_gemv if kernel == "cuda" else triton_kernels.decode_gemv
    N, K = 80, 416
    w = weight(place, form, N, K)
    combinations = list(itertools.product([False, True], repeat=3))
    for norm, residual, swiglu in combinations if kernel == "cuda" else combinations[::7]:
        columns = N // 2 if swiglu else N
        n, r = draw(place, K) if norm else None, draw(place, rows, columns) if residual else None
        both(run, draw(place, rows, K, scale=3.0), w, n, r, swiglu)


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_norm_of_many_columns(place: Place, rows: int) -> None:
    """More than a thread's two pieces, more rows than a batch of four."""
    x = draw(place, rows, 5408).detach() * torch.logspace(-2, 2, rows, device=place[0], dtype=place[1])[:, None]
    both(cuda.decode_gemv, x, weight(place, "full", 8, 5408), draw(place, 5408))


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    for form in WEIGHTS:
        w = weight(place, form, 32, 256)
        both(cuda.decode_gemv, draw(place, 3, 256, scale=scale), w)
        both(cuda.decode_gemv, draw(place, 3, 256, scale=scale), w, draw(place, 256), None, True)
        both(cuda.decode_gemv, torch.full((2, 256), scale, device=place[0], dtype=place[1]), w)  # nothing cancels in x
    gate_up = 30 * torch.randn(32, 256, device=place[0]).to(place[1])  # gates of hundreds, both signs
    both(cuda.decode_gemv, draw(place, 2, 256, scale=min(scale, 1.0)), gate_up, swiglu=True)


def finish(device: str) -> None:
    """Weights are read before the kernel in front has ended: it may not be what writes them."""
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("place", CUDA_PLACES)
def test_every_code(place: Place) -> None:
    """Rows of the identity read the weight out: every code of every format, the bits of dequantize."""
    device, dtype = place
    all_bytes = torch.arange(256, dtype=torch.uint8, device=device)
    scales = 0.37 + torch.arange(16, device=device)
    grouped = scales[:, None].bfloat16()
    zeros = torch.arange(16, dtype=torch.uint8, device=device)[:, None]
    codes = torch.stack([all_bytes.roll(7 * row)[:64] for row in range(16)])
    for q in (
        QuantizedWeight("int8", all_bytes.view(torch.int8).view(8, 32), scales[:8], None, (8, 32)),
        QuantizedWeight("fp8", all_bytes.view(torch.float8_e4m3fn).view(8, 32), scales[:8], None, (8, 32)),
        QuantizedWeight("int4", codes, grouped, None, (16, 128)),
        QuantizedWeight("int4_zero", codes, grouped, zeros, (16, 128)),
    ):
        eye = torch.eye(q.shape[1], dtype=dtype, device=device)
        given = cuda.repack(q)
        finish(device)
        read = torch.cat([cuda.decode_gemv(rows, given) for rows in eye.split(8)]).T
        expected = dequantize(q, dtype)
        known = expected.isfinite()  # quantize gives no finite weight a NaN code
        assert int((~known).sum()) == (2 if q.format == "fp8" else 0)
        assert torch.equal(read[known], expected[known])


@pytest.mark.parametrize("place", CUDA_PLACES)
def test_same_bits(place: Place) -> None:
    """Twice, and for a row whatever other rows there are."""
    for form in WEIGHTS:
        w, norm = packed(weight(place, form, 48, 1376)), draw(place, 1376).detach()
        x, r = draw(place, 8, 1376).detach(), draw(place, 8, 24).detach()
        y = cuda.decode_gemv(x, w, norm, EPS, r, True)
        assert torch.equal(y, cuda.decode_gemv(x, w, norm, EPS, r, True))
        for rows in (slice(0, 1), slice(3, 5), slice(1, 8)):
            assert torch.equal(y[rows], cuda.decode_gemv(x[rows], w, norm, EPS, r[rows], True))


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("form", WEIGHTS)
def test_memory_around_the_inputs(place: Place, form: str) -> None:
    """NaN before and behind each of them."""

    def inside(t: Tensor) -> Tensor:
        room = torch.full((t.numel() + 2 * 4096,), 255, dtype=torch.uint8, device=t.device).repeat(t.itemsize)
        room = room.view(t.dtype)[4096 : 4096 + t.numel()].view(t.shape)
        return room.copy_(t)

    x, norm, residual = draw(place, 3, 160), draw(place, 160), draw(place, 3, 12 * 8)
    w = packed(weight(place, form, 12 * 16, 160))
    expected = cuda.decode_gemv(x, w, norm, EPS, residual, True)
    if isinstance(w, Tensor):
        w = inside(w)
    else:
        w = cuda.RepackedWeight(inside(w.data), None if w.scales is None else inside(w.scales))
    y = cuda.decode_gemv(inside(x.detach()), w, inside(norm.detach()), EPS, inside(residual.detach()), True)
    assert torch.equal(y, expected) and y.isfinite().all()


def test_registers() -> None:
    """Two blocks of 320 threads, this kernel's and the next one's, share a multiprocessor's 65536 registers."""
    if build.build() is not None:
        pytest.skip("no nvcc")
    log = (build.ROOT / "build" / "csrc" / "decode_gemv.cu.o.log").read_text()
    used = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(used) == 20 and max(used) <= 96


def test_wrong_arguments_are_named() -> None:
    x, w = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16)
    int8, fp8, int4 = (cuda.repack(quantize(w, form)) for form in ("int8", "fp8", "int4"))
    wide = torch.zeros(8, 8192, dtype=torch.bfloat16)
    for arguments, message in [
        ((x.float(), w), "x must be bfloat16 or float16"),
        ((x[0], w), r"x must be \(rows, k\) and w \(n, k\)"),
        ((torch.zeros(9, 64, dtype=torch.bfloat16), w), "x has 9 rows, must have 1 to 8"),
        ((x[:0], w), "x has 0 rows, must have 1 to 8"),
        ((x[:, :40].contiguous(), w[:, :40].contiguous()), "k is 40, must be a multiple of 32"),
        ((x[:, :32], w[:, :32].contiguous()), r"x must be \(2, 32\), adjacent"),
        ((x, w[:12]), "n is 12, must be a multiple of 8"),
        ((x, w[:8], None, 0.0, None, True), "n is 8, must be a multiple of 16"),
        ((x, w.half()), "w must have the dtype of x"),
        ((x, w[:, :32].contiguous()), r"w must be \(16, 64\), adjacent"),
        ((x, w.T.contiguous().T), r"w must be \(16, 64\), adjacent"),
        ((x, w.flatten()[8:].new_zeros(16 * 64 + 1)[1:].view(16, 64)), "w must start at a multiple of 16 bytes"),
        ((x, int8.data), "scales are for an int8 or fp8 w, which needs them"),
        ((x, replace(int4, scales=fp8.scales)), "scales are for an int8 or fp8 w, which needs them"),
        ((x, replace(fp8, scales=fp8.scales[:8])), r"scales must be \(16\) float32"),
        ((x, replace(fp8, scales=fp8.scales.half())), r"scales must be \(16\) float32"),
        ((x, replace(int4, data=int4.data[..., :500])), r"w must be \(n / 8, 1, 528 or 544\) uint8, as cuda.repack"),
        ((wide, int4), r"w must be \(n / 8, 64, 528 or 544\) uint8, as cuda.repack"),
        ((x, w, x[0, :32]), r"norm must be \(64\)"),
        ((x, w, x[0].half()), r"norm must be \(64\), of the dtype"),
        ((wide, wide, wide[0]), r"norm of 8 rows of 8192: k \+ rows \(k \+ 8\) must be at most 65536"),
        ((x, w, None, 0.0, x), r"residual must be \(2, 16\)"),
        ((x, w, None, 0.0, x[:, :16].half().contiguous()), "residual must have the dtype of x"),
    ]:
        with pytest.raises(RuntimeError, match="decode_gemv: .*" + message):
            cuda.decode_gemv(*arguments)
    with pytest.raises(ValueError, match="the weight has 12 rows, must have a multiple of 8"):
        cuda.repack(quantize(w[:12], "int4"))
    with pytest.raises(TypeError, match="repack"):
        cuda.decode_gemv(x, quantize(w, "int4"))


@pytest.mark.gpu
def test_devices() -> None:
    x, w = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="w must be on the device of x"):
        cuda.decode_gemv(x.cuda(), w)
    with pytest.raises(RuntimeError, match=r"norm must be .* on the device of x"):
        cuda.decode_gemv(x.cuda(), w.cuda(), x[0])


def test_fakes() -> None:
    x, w = (torch.zeros(rows, 64, dtype=torch.bfloat16, device="meta") for rows in (3, 32))
    for form in WEIGHTS:
        given = w if form == "full" else cuda.repack(moved(quantize(torch.zeros(32, 64), form), "meta"))
        assert cuda.decode_gemv(x, given).shape == (3, 32)
        assert cuda.decode_gemv(x, given, swiglu=True).shape == (3, 16)


@pytest.mark.parametrize("place", CUDA_PLACE)
@pytest.mark.parametrize("form", WEIGHTS)
def test_operator(place: Place, form: str) -> None:
    """Schema, fake and compilation."""
    x, norm, residual = (draw(place, *shape).detach() for shape in [(3, 128), (128,), (3, 16)])
    w = packed(weight(place, form, 32, 128))
    data, scales = (w, None) if isinstance(w, Tensor) else (w.data, w.scales)
    arguments = (x, data, scales, norm, EPS, residual, True)
    torch.library.opcheck(torch.ops.phi4rv_cuda.decode_gemv.default, arguments)

    def run(x: Tensor) -> Tensor:
        return cuda.decode_gemv(x, w, norm, EPS, residual, True)

    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))


@pytest.mark.gpu
@pytest.mark.parametrize("form", WEIGHTS)
def test_graph_and_stream(form: str) -> None:
    """Kernels that start before the one in front has ended, captured on a side stream and replayed: the same bits."""
    place = ("cuda", torch.bfloat16)
    norm = draw(place, 5120).detach()
    gate_up, down = packed(weight(place, form, 35840, 5120)), packed(weight(place, form, 5120, 17920))

    def layers(x: Tensor) -> Tensor:
        for _ in range(8):
            x = cuda.decode_gemv(cuda.decode_gemv(x, gate_up, norm, EPS, None, True), down, None, 0.0, x)
        return x

    x = draw(place, 1, 5120).detach()
    expected = layers(x)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers(x)
        with torch.cuda.graph(graph, stream=stream):
            captured = layers(x)
        for _ in range(3):
            graph.replay()
    stream.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["full", "int8", "int4"])
def test_over_two_to_the_31_elements(form: str) -> None:
    N, K = (1 << 31) // 1024 + 8, 1024
    x = torch.ones(2, K, device="cuda", dtype=torch.bfloat16)
    if form == "full":
        w: Any = torch.ones(N, K, device="cuda", dtype=torch.bfloat16)
    elif form == "int8":
        w = cuda.RepackedWeight(torch.ones(N, K, device="cuda", dtype=torch.int8), torch.ones(N, device="cuda"))
    else:  # past 2^31 bytes
        N *= 2
        one = QuantizedWeight(
            "int4", torch.full((8, K // 2), 0x99, dtype=torch.uint8), torch.ones(8, 8).bfloat16(), None, (8, K)
        )
        w = cuda.RepackedWeight(cuda.repack(one).data.cuda().repeat(N // 8, 1, 1), None)
    finish("cuda")
    assert bool((cuda.decode_gemv(x, w) == K).all())
