"""projector, project_into and scatter_rows against their definitions."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from phi4rv.ops import cuda, reference
from phi4rv.ops.low_precision import QuantizedWeight, dequantize, quantize
from tests.kernels.check import CUDA_PLACE, CUDA_PLACES, PLACE, PLACES, Place, check_cuda_graph, check_parity, draw
from triton_kernels import projector as kernels
from triton_kernels.projector import project_into, projector, scatter_rows


class On(NamedTuple):
    """An implementation and where it runs."""

    kernels: Any  # a module with projector and project_into
    place: Place

    @property
    def gradients(self) -> bool:
        """Triton's kernels take those, which on a CPU cannot multiply bfloat16."""
        return self.place != ("cpu", torch.bfloat16)


def on(kernels: Any, places: list[Any]) -> list[Any]:
    name = kernels.__name__.split(".")[-1] if kernels is cuda else "triton"
    return [pytest.param(On(kernels, *p.values), id=f"{name}-{p.id}", marks=p.marks) for p in places]


@pytest.fixture
def run(request: pytest.FixtureRequest) -> On:
    if request.param.kernels is cuda:
        request.getfixturevalue("csrc")
    return request.param


EVERYWHERE = pytest.mark.parametrize("run", on(kernels, PLACES) + on(cuda, CUDA_PLACES), indirect=True)
ONCE = pytest.mark.parametrize("run", on(kernels, PLACE) + on(cuda, CUDA_PLACE), indirect=True)
# A GPU, and where gradients can be had without one.
ONCE_WITH_GRADIENTS = pytest.mark.parametrize("run", on(kernels, PLACE) + on(cuda, CUDA_PLACES[1:3]), indirect=True)
ON_GPU = pytest.mark.parametrize("run", on(kernels, PLACES[2:]) + on(cuda, CUDA_PLACES[2:]), indirect=True)
REAL = (1152, 5120, 5120)
EPILOGUES = ["gelu", "linear", "gelu and slope", "times slope"]


def arguments(place: Place, P: int, sizes: tuple[int, int, int], scale: float = 1.0) -> tuple[Tensor, ...]:
    """x, w0, b0, w1, b1 of widths sizes = (Cv, H, C)."""
    Cv, H, C = sizes
    x, w0, b0 = draw(place, P, Cv, scale=scale), draw(place, H, Cv, scale=Cv**-0.5), draw(place, H)
    return x, w0, b0, draw(place, C, H, scale=H**-0.5), draw(place, C)


def places_of(place: Place, P: int, T: int) -> Tensor:
    """P of T rows, in no order."""
    return torch.randperm(T)[:P].to(place[0])


def alone(run: On, P: int, sizes: tuple[int, int, int], scale: float = 1.0, slack: float = 1.0) -> None:
    args = arguments(run.place, P, sizes, scale)
    check_parity(run.kernels.projector, reference.projector, args, run.gradients, slack)


def into(run: On, P: int, sizes: tuple[int, int, int], extra: int = 9) -> None:
    index, row = places_of(run.place, P, P + extra), draw(run.place, P + extra, sizes[-1])
    both_into(run, index, (row, *arguments(run.place, P, sizes)))


def both_into(run: On, index: Tensor, args: tuple[Tensor, ...] | list[Tensor]) -> None:
    check_parity(
        lambda *a: run.kernels.project_into(*a, index),
        lambda *a: reference.project_into(*a, index),
        args,
        run.gradients,
    )


@EVERYWHERE
@pytest.mark.parametrize("P", [0, 1, 15, 16, 17, 127, 128, 129])
def test_lengths(run: On, P: int) -> None:
    into(run, P, (48, 64, 64))


@EVERYWHERE
@pytest.mark.parametrize("sizes", [(48, 64, 64), (8, 8, 8), (136, 264, 24)])
def test_widths(run: On, sizes: tuple[int, int, int]) -> None:
    alone(run, 19, sizes)


@pytest.mark.parametrize("run", on(kernels, PLACES), indirect=True)
@pytest.mark.parametrize("sizes", [(100, 36, 36), (64, 272, 7), (1, 1, 1), (3, 300, 24)])
def test_any_width(run: On, sizes: tuple[int, int, int]) -> None:
    alone(run, 19, sizes)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("P", [1, 256, 3600, 28800])
def test_real_sizes(run: On, P: int) -> None:
    alone(run, P, REAL)
    into(run, P, REAL, extra=1000)


@ONCE
def test_every_row_replaced_and_none(run: On) -> None:
    into(run, 33, (16, 32, 48), extra=0)
    into(run, 0, (16, 32, 48))


@EVERYWHERE
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(run: On, scale: float) -> None:
    """Where GELU is zero, half its argument and the argument itself."""
    alone(run, 9, (48, 64, 64), scale, slack=2.0)


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_are_not_adjacent(place: Place) -> None:
    """Columns of wider tensors, and transposed ones."""
    x, w0, b0, w1, b1 = (a.detach() for a in arguments(place, 17, (64, 64, 64)))
    index = places_of(place, 17, 30)
    x = torch.cat([x, x], 1)[:, 32:96]
    row = draw(place, 64, 30).detach().T
    args = [a.requires_grad_() for a in (row, x, w0.T, torch.stack([b0, b0], 1)[:, 0], w1.T, b1)]
    check_parity(lambda *a: project_into(*a, index), lambda *a: reference.project_into(*a, index), args)
    check_parity(lambda *a: scatter_rows(*a, index), lambda *a: reference.scatter_rows(*a, index), (row, args[1]))
    every_second = places_of(place, 60, 60).reshape(30, 2)[:, 0][:17]
    wide = draw(place, 60, 64)
    check_parity(
        lambda *a: project_into(*a, every_second),
        lambda *a: reference.project_into(*a, every_second),
        (wide, *args[1:]),
    )


@ONCE
def test_row_stride_over_two_to_the_31st(run: On) -> None:
    place, project = run.place, run.kernels.projector
    device, dtype = place
    x, *weights = (a.detach() for a in arguments(place, 3, (48, 64, 64)))
    length = 2**31 + 64
    if device == "cuda":
        far = torch.empty(length, dtype=dtype, device=device)
    else:  # torch.empty would be filled here: pages that nothing touches cost nothing
        far = torch.frombuffer(mmap.mmap(-1, length * dtype.itemsize), dtype=dtype)
    far = far.as_strided((3, 48), (2**30, 1)).copy_(x)
    assert torch.equal(project(far, *weights), project(x, *weights))
    if run.kernels is kernels:
        row, index = draw(place, 5, 48).detach(), places_of(place, 3, 5)
        assert torch.equal(scatter_rows(row, far, index), scatter_rows(row, x, index))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(0, 0, 5), (4, 0, 5), (1, 1, 1), (70, 70, 100), (300, 37, 5)])
def test_scatter_rows(place: Place, shape: tuple[int, int, int]) -> None:
    T, P, C = shape
    index = places_of(place, P, T)
    row, values = draw(place, T, C), draw(place, P, C)
    check_parity(lambda *a: scatter_rows(*a, index), lambda *a: reference.scatter_rows(*a, index), (row, values))


@pytest.mark.parametrize("place", PLACE)
def test_row_of_another_dtype(place: Place) -> None:
    x, *weights = arguments(place, 5, (48, 64, 64))
    row, index = draw((place[0], torch.float16), 9, 64), places_of(place, 5, 9)
    check_parity(lambda *a: project_into(*a, index), lambda *a: reference.project_into(*a, index), (row, x, *weights))
    check_parity(
        lambda *a: scatter_rows(*a, index), lambda *a: reference.scatter_rows(*a, index), (row, draw(place, 5, 64))
    )


@ONCE_WITH_GRADIENTS
@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_wanted(run: On, wanted: int) -> None:
    """What is frozen costs nothing and changes nothing."""
    args = [a.detach() for a in (draw(run.place, 9, 64), *arguments(run.place, 5, (48, 64, 64)))]
    args[wanted].requires_grad_()
    both_into(run, places_of(run.place, 5, 9), args)


@ONCE
def test_the_activation_is_not_kept(run: On) -> None:
    args, kept = arguments(run.place, 40, (16, 304, 24)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run.kernels.projector(*args)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in args[:4]}


@pytest.mark.parametrize("place", PLACE)
def test_operators(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    args, index = arguments(place, 5, (48, 64, 64)), places_of(place, 5, 9)
    row = draw(place, 9, 64)
    torch.library.opcheck(kernels.forward, args)
    torch.library.opcheck(kernels.into, (row, *args, index))
    torch.library.opcheck(kernels.scatter, (row, draw(place, 5, 64), index))
    compiles(projector, args)
    compiles(project_into, (row, *args, index))
    compiles(scatter_rows, (row, draw(place, 5, 64), index))


def compiles(operation: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Without a graph break, and to the same result and gradients."""
    outs = [torch.compile(operation, backend="aot_eager", fullgraph=True)(*inputs), operation(*inputs)]
    wanted = [x for x in inputs if x.requires_grad]
    grads = [torch.autograd.grad(out, wanted, torch.ones_like(out)) for out in outs]
    for ours, theirs in zip(*([out, *grad] for out, grad in zip(outs, grads, strict=True)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
def test_every_configuration(place: Place) -> None:
    """With more than one tile each way, and an edge."""
    cases = kernels.GEMM.cases
    exact = place[1] == torch.float32
    for config in cases["float32"] if exact else {str(c): c for case in EPILOGUES for c in cases[case]}.values():
        with kernels.GEMM.forced(config):
            into(On(kernels, place), 70 if exact else 130, (72, 72 if exact else 264, 72))


@pytest.mark.parametrize("place", PLACE)
def test_every_configuration_of_the_copy(place: Place) -> None:
    for config in kernels.SCATTER.cases["row"]:
        with kernels.SCATTER.forced(config):
            index = places_of(place, 5, 9)
            check_parity(
                lambda *a, i=index: scatter_rows(*a, i),
                lambda *a, i=index: reference.scatter_rows(*a, i),
                (draw(place, 9, 64), draw(place, 5, 64)),
            )


@pytest.mark.gpu
@ON_GPU
def test_same_bits_every_time(run: On) -> None:
    place = run.place
    args, index = arguments(place, 3600, REAL), places_of(place, 3600, 5000)
    row = draw(place, 5000, REAL[-1])

    def step() -> list[Tensor]:
        out = run.kernels.project_into(row, *args, index)
        return [out, *torch.autograd.grad(out, [row, *args], torch.ones_like(out))]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("run", on(kernels, PLACE[1:]) + on(cuda, CUDA_PLACE[1:]), indirect=True)
def test_graph_capture_and_side_stream(run: On) -> None:
    place, project_into = run.place, run.kernels.project_into
    args, index = [a.detach() for a in arguments(place, 300, REAL)], places_of(place, 300, 400)
    row = draw(place, 400, REAL[-1]).detach()
    expected = project_into(row, *args, index)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(project_into(row, *args, index), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = project_into(row, *args, index)
    other = draw(place, 300, REAL[0]).detach()
    args[0].copy_(other)
    index.copy_(index.flip(0))
    graph.replay()
    assert torch.equal(out, project_into(row, other, *args[1:], index))


def test_wrong_arguments_are_named() -> None:
    x, w0, b0, w1, b1 = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), torch.ones(5, 4), torch.ones(5)
    row, index = torch.ones(6, 5), torch.arange(2)
    for wrong, message in [
        ((x.double(), w0, b0, w1, b1), r"x is torch.float64"),
        ((x[0], w0, b0, w1, b1), "x has 1 dim"),
        ((x, w0.half(), b0, w1, b1), "must be torch.float32"),
        ((x, w0.T, b0, w1, b1), "w0 is"),
        ((x, w0, b1, w1, b1), "b0 is"),
        ((x, w0, b0, w1.T, b1), "w1 is"),
        ((x, w0, b0, w1, b0), "b1 is"),
    ]:
        with pytest.raises(ValueError, match=message):
            projector(*wrong)
    for wrong, message in [
        ((row.T, index), "row is"),
        ((row.double(), index), "row is torch.float64"),
        ((row, index[:1]), "index is"),
        ((row, index.int()), "index is torch.int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            project_into(wrong[0], x, w0, b0, w1, b1, wrong[1])
        with pytest.raises(ValueError, match=message):
            scatter_rows(wrong[0], torch.ones(2, 5), wrong[1])


# ---- what only the CUDA kernels have


def cuda_places(places: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("place", places)


@cuda_places(CUDA_PLACES)
@pytest.mark.parametrize(
    ("P", "sizes"),
    [
        (255, (64, 256, 256)),  # one pair of tiles, its last row missing
        (256, (128, 264, 8)),  # whole rows, columns of a second tile
        (257, (72, 512, 520)),  # a second pair that holds one row
        (700, (320, 776, 264)),  # more tiles than blocks, with more steps than the ring has stages
        (64, (1096, 256, 256)),  # more steps than a finished tile has pieces
    ],
)
def test_cuda_tiles(csrc: None, place: Place, P: int, sizes: tuple[int, int, int]) -> None:
    args = [a.detach() for a in arguments(place, P, sizes)]
    row, index = draw(place, P + 100, sizes[-1]).detach(), places_of(place, P, P + 100)
    check_parity(cuda.projector, reference.projector, args)
    check_parity(lambda *a: cuda.project_into(*a, index), lambda *a: reference.project_into(*a, index), (row, *args))


@cuda_places(CUDA_PLACES)
def test_cuda_gelu(csrc: None, place: Place) -> None:
    """Each value, in the tail too, to the rounding of its dtype: through identity weights."""
    x = torch.linspace(-13, 13, 64 * 200, dtype=place[1], device=place[0]).view(200, 64)
    x[0, :4] = torch.tensor([torch.nan, 0, 60000, -60000])
    identity, zero = torch.eye(64, dtype=place[1], device=place[0]), torch.zeros(64, dtype=place[1], device=place[0])
    wide = x.double()
    exact = torch.where(wide < 0, wide * torch.special.erfc(-wide / 2**0.5) / 2, torch.nn.functional.gelu(wide))
    out = cuda.projector(x.nan_to_num(), identity, zero, identity, zero)
    unit = torch.finfo(place[1])
    torch.testing.assert_close(
        out.double(), exact.nan_to_num(), rtol=0.51 * unit.eps, atol=unit.smallest_normal * unit.eps
    )
    assert cuda.projector(x, identity, zero, identity, zero)[0].isnan().all()


@cuda_places(CUDA_PLACE)
def test_cuda_views(csrc: None, place: Place) -> None:
    """Columns of a wider x; every second row; what lies beside them is NaN."""
    x, *rest = (a.detach() for a in arguments(place, 17, (64, 72, 64)))
    around = torch.full((34, 192), torch.nan, dtype=x.dtype, device=x.device)
    around[::2, 64:128] = x
    row = torch.full((60, 64), torch.nan, dtype=x.dtype, device=x.device)
    row[::2] = torch.randn_like(row[::2])
    index = places_of(place, 17, 30)
    expected = cuda.project_into(row[::2].contiguous(), x, *rest, index)
    assert not expected.isnan().any()
    assert torch.equal(cuda.project_into(row[::2], around[::2, 64:128], *rest, index), expected)


@cuda_places(CUDA_PLACE)
def test_cuda_same_bits(csrc: None, place: Place) -> None:
    """Though copies and products come earlier or later each time."""
    args = [a.detach() for a in arguments(place, 300, (80, 272, 264))]
    weights = fp8(*args[1:])
    for operation, given in ((cuda.projector, args), (cuda.quantized_projector, (args[0], *weights))):
        first, *others = (operation(*given) for _ in range(3))
        assert all(torch.equal(first, other) for other in others)


def fp8(w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> tuple[QuantizedWeight, Tensor, QuantizedWeight, Tensor]:
    """The weights' rows of different sizes, so that a scale in the wrong place shows."""
    sized = (w * torch.logspace(0, -2, len(w), device=w.device)[:, None] for w in (w0.detach(), w1.detach()))
    q0, q1 = (quantize(w, "fp8") for w in sized)
    return q0, b0.detach(), q1, b1.detach()


# Triton's kernel is composed of others, each with its own tests.
@pytest.mark.parametrize("run", on(kernels, PLACES[1:2]) + on(cuda, CUDA_PLACES), indirect=True)
@pytest.mark.parametrize(
    ("P", "sizes"),
    [
        (0, (16, 16, 8)),
        (1, (16, 16, 8)),
        (17, (64, 80, 24)),
        (129, (400, 128, 136)),
        (300, (128, 400, 264)),
        (40, (1168, 144, 128)),
    ],
)
def test_quantized(run: On, P: int, sizes: tuple[int, int, int]) -> None:
    x, *weights = arguments(run.place, P, sizes)
    both_quantized(run, x.detach() * torch.logspace(0, -3, P, device=x.device)[:, None].to(x.dtype), fp8(*weights))


def both_quantized(run: On, x: Tensor, weights: tuple[Any, ...]) -> None:
    """b0 and b1 are the inputs that the definition runs in float64 with x."""
    w0, b0, w1, b1 = weights
    check_parity(
        lambda x, b0, b1: run.kernels.quantized_projector(x, w0, b0, w1, b1),
        lambda x, b0, b1: reference.quantized_projector(x, w0, b0, w1, b1),
        (x, b0, b1),
        gradients=False,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("run", on(cuda, CUDA_PLACES[2:]), indirect=True)
@pytest.mark.parametrize("P", [1, 3600, 28800])
def test_quantized_real_sizes(run: On, P: int) -> None:
    """Sums of 5120 terms: too few bits of the tensor core's would show."""
    x, *weights = arguments(run.place, P, REAL)
    both_quantized(run, x.detach(), fp8(*weights))


@pytest.mark.gpu
@pytest.mark.parametrize("run", on(cuda, CUDA_PLACES[2:]), indirect=True)
def test_quantized_graph(run: On) -> None:
    """Captured once and replayed on new values; the same bits every time."""
    x, *weights = arguments(run.place, 300, REAL)
    w0, b0, w1, b1 = fp8(*weights)
    check_cuda_graph(lambda x: run.kernels.quantized_projector(x, w0, b0, w1, b1), [x.detach()])


@cuda_places(CUDA_PLACES)
def test_quantized_rows(csrc: None, place: Place) -> None:
    """Through identity weights, where GELU changes nothing: another rounding of one value would be off by 6 %."""
    device, dtype = place
    octaves = 12 if dtype == torch.float16 else 18  # down to e4m3's subnormals
    x = (8 * 2 ** (octaves * torch.rand(300, 64, device=device))).to(dtype)
    x[3], x[:, 5] = 0, 0
    identity = quantize(torch.eye(64, device=device), "fp8")
    zero = torch.zeros(64, dtype=dtype, device=device)
    expected = dequantize(quantize(x, "fp8"), torch.float32)
    out = cuda.quantized_projector(x, identity, zero, identity, zero)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=0)


@cuda_places(CUDA_PLACE)
def test_cuda_operators(csrc: None, place: Place) -> None:
    args, index = [a.detach() for a in arguments(place, 5, (48, 64, 64))], places_of(place, 5, 9)
    row = draw(place, 9, 64).detach()
    operators = torch.ops.phi4rv_cuda
    torch.library.opcheck(operators.projector, args)
    torch.library.opcheck(operators.project_into, (row, *args, index))
    x, w0, b0, w1, b1 = args[0], *fp8(*args[1:])
    given = (x, w0.data, w0.scales, b0, w1.data, w1.scales, b1)
    # Its other checks multiply their inputs, which PyTorch cannot in float8.
    torch.library.opcheck(operators.quantized_projector, given, test_utils="test_faketensor")
    for operation, given in ((cuda.projector, args), (cuda.project_into, [row, *args, index])):
        compiled = torch.compile(operation, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*given), operation(*given))


def test_cuda_fakes(csrc: None) -> None:
    x, w0, w1 = (torch.zeros(s, dtype=torch.bfloat16, device="meta") for s in ((3, 16), (32, 16), (8, 32)))
    b0, b1, row = w0[:, 0], w1[:, 0], torch.zeros(7, 8, dtype=torch.bfloat16, device="meta")
    assert cuda.projector(x, w0, b0, w1, b1).shape == (3, 8)
    assert cuda.project_into(row, x, w0, b0, w1, b1, torch.zeros(3, device="meta")).shape == (7, 8)
    assert cuda.quantized_projector(x, *fp8(w0, b0, w1, b1)).shape == (3, 8)


def test_cuda_wrong_arguments_are_named(csrc: None) -> None:
    x, w0, b0, w1, b1 = (torch.ones(s, dtype=torch.bfloat16) for s in ((2, 16), (32, 16), 32, (24, 32), 24))
    row, index = torch.ones(6, 24, dtype=torch.bfloat16), torch.arange(2)
    for wrong, message in [
        ((x.float(), w0, b0, w1, b1), "projector: x must be bfloat16 or float16"),
        ((x[0], w0, b0, w1, b1), "projector: x has 1 dimensions, must have 2"),
        ((x.T.contiguous().T, w0, b0, w1, b1), "x: columns must be adjacent, rows must start at multiples of 8"),
        ((x[:1].expand(2, 16), w0, b0, w1, b1), "and not overlap"),
        ((torch.ones(40, dtype=torch.bfloat16)[4:36].view(2, 16), w0, b0, w1, b1), "x must start at a multiple of 16"),
        ((x[:, :8], w0, b0, w1, b1), r"w0 must be \(…, 8\)"),
        ((x[:, :4], w0[:, :4].contiguous(), b0, w1, b1), "w0 has 4 columns, must have a positive multiple of 8"),
        ((x, w0[:, ::2].repeat(1, 2).T.contiguous().T, b0, w1, b1), "w0: elements must be adjacent"),
        ((x, w0.half(), b0, w1, b1), "w0 must have the dtype of x"),
        ((x, w0[:28], b0, w1, b1), "w0 has 28 rows, must have a positive multiple of 8"),
        ((x, w0, b1, w1, b1), r"b0 must be \(32\)"),
        ((x, w0, b0, w0, b1), r"w1 must be \(…, 32\)"),
        ((x, w0, b0, w1, b1.float()), "b1 must have the dtype of x"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cuda.projector(*wrong)
    for row_, index_, message in [
        (row.half(), index, "project_into: row must have the dtype of x"),
        (row[:, :16], index, r"row must be \(…, 24\)"),
        (row, index[:1], r"index must be \(2\) int64"),
        (row, index.int(), r"index must be \(2\) int64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cuda.project_into(row_, x, w0, b0, w1, b1, index_)
    q0, q1 = quantize(w0, "fp8"), quantize(w1, "fp8")
    with pytest.raises(ValueError, match="weights are int8 and fp8, must be fp8"):
        cuda.quantized_projector(x, quantize(w0, "int8"), b0, q1, b1)
    with pytest.raises(RuntimeError, match="the scales of w0 must have"):
        cuda.quantized_projector(x, replace(q0, scales=q0.scales.bfloat16()), b0, q1, b1)
    with pytest.raises(RuntimeError, match="w1 has 24 columns, must have a positive multiple of 16"):
        cuda.quantized_projector(x, quantize(w0[:24], "fp8"), b0[:24], quantize(w1[:, :24], "fp8"), b1)
