"""projector, project_into and scatter_rows against their definitions."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phi4rv import reference
from tests.kernels.check import PLACE, PLACES, Place, draw, parity
from triton_kernels import projector as kernels
from triton_kernels.projector import project_into, projector, scatter_rows

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


def alone(place: Place, P: int, sizes: tuple[int, int, int]) -> None:
    parity(projector, reference.projector, arguments(place, P, sizes))


def into(place: Place, P: int, sizes: tuple[int, int, int], extra: int = 9) -> None:
    index, row = places_of(place, P, P + extra), draw(place, P + extra, sizes[-1])
    args = (row, *arguments(place, P, sizes))
    parity(lambda *a: project_into(*a, index), lambda *a: reference.project_into(*a, index), args)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("P", [0, 1, 15, 16, 17, 127, 128, 129])
def test_lengths(place: Place, P: int) -> None:
    into(place, P, (48, 64, 64))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sizes", [(48, 64, 64), (100, 36, 36), (64, 272, 7), (1, 1, 1), (3, 300, 24)])
def test_widths(place: Place, sizes: tuple[int, int, int]) -> None:
    alone(place, 19, sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[2:])
@pytest.mark.parametrize("P", [1, 256, 3600, 28800])
def test_real_sizes(place: Place, P: int) -> None:
    alone(place, P, REAL)
    into(place, P, REAL, extra=1000)


@pytest.mark.parametrize("place", PLACE)
def test_every_row_replaced_and_none(place: Place) -> None:
    into(place, 33, (16, 32, 48), extra=0)
    into(place, 0, (16, 32, 48))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    """Where GELU is zero, half its argument and the argument itself."""
    parity(projector, reference.projector, arguments(place, 9, (48, 64, 64), scale), slack=2.0)


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_are_not_adjacent(place: Place) -> None:
    """Columns of wider tensors, and transposed ones."""
    x, w0, b0, w1, b1 = (a.detach() for a in arguments(place, 17, (64, 64, 64)))
    index = places_of(place, 17, 30)
    x = torch.cat([x, x], 1)[:, 32:96]
    row = draw(place, 64, 30).detach().T
    args = [a.requires_grad_() for a in (row, x, w0.T, torch.stack([b0, b0], 1)[:, 0], w1.T, b1)]
    parity(lambda *a: project_into(*a, index), lambda *a: reference.project_into(*a, index), args)
    parity(lambda *a: scatter_rows(*a, index), lambda *a: reference.scatter_rows(*a, index), (row, args[1]))
    every_second = places_of(place, 60, 60).reshape(30, 2)[:, 0][:17]
    wide = draw(place, 60, 64)
    parity(
        lambda *a: project_into(*a, every_second),
        lambda *a: reference.project_into(*a, every_second),
        (wide, *args[1:]),
    )


@pytest.mark.parametrize("place", PLACE)
def test_row_stride_over_two_to_the_31st(place: Place) -> None:
    device, dtype = place
    x, *weights = (a.detach() for a in arguments(place, 3, (48, 64, 64)))
    length = 2**31 + 64
    if device == "cuda":
        far = torch.empty(length, dtype=dtype, device=device)
    else:  # torch.empty would be filled here: pages that nothing touches cost nothing
        far = torch.frombuffer(mmap.mmap(-1, length * dtype.itemsize), dtype=dtype)
    far = far.as_strided((3, 48), (2**30, 1)).copy_(x)
    assert torch.equal(projector(far, *weights), projector(x, *weights))
    row, index = draw(place, 5, 48).detach(), places_of(place, 3, 5)
    assert torch.equal(scatter_rows(row, far, index), scatter_rows(row, x, index))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(0, 0, 5), (4, 0, 5), (1, 1, 1), (70, 70, 100), (300, 37, 5)])
def test_scatter_rows(place: Place, shape: tuple[int, int, int]) -> None:
    T, P, C = shape
    index = places_of(place, P, T)
    row, values = draw(place, T, C), draw(place, P, C)
    parity(lambda *a: scatter_rows(*a, index), lambda *a: reference.scatter_rows(*a, index), (row, values))


@pytest.mark.parametrize("place", PLACE)
def test_row_of_another_dtype(place: Place) -> None:
    x, *weights = arguments(place, 5, (48, 64, 64))
    row, index = draw((place[0], torch.float16), 9, 64), places_of(place, 5, 9)
    parity(lambda *a: project_into(*a, index), lambda *a: reference.project_into(*a, index), (row, x, *weights))
    parity(lambda *a: scatter_rows(*a, index), lambda *a: reference.scatter_rows(*a, index), (row, draw(place, 5, 64)))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_wanted(place: Place, wanted: int) -> None:
    """What is frozen costs nothing and changes nothing."""
    index = places_of(place, 5, 9)
    args = [a.detach() for a in (draw(place, 9, 64), *arguments(place, 5, (48, 64, 64)))]
    args[wanted].requires_grad_()
    parity(lambda *a: project_into(*a, index), lambda *a: reference.project_into(*a, index), args)


def test_the_activation_is_not_kept() -> None:
    args, kept = arguments(("cpu", torch.float32), 40, (16, 300, 24)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        projector(*args)
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
            into(place, 70 if exact else 130, (72, 72 if exact else 264, 72))


@pytest.mark.parametrize("place", PLACE)
def test_every_configuration_of_the_copy(place: Place) -> None:
    for config in kernels.PLACE.cases["row"]:
        with kernels.PLACE.forced(config):
            index = places_of(place, 5, 9)
            parity(
                lambda *a, i=index: scatter_rows(*a, i),
                lambda *a, i=index: reference.scatter_rows(*a, i),
                (draw(place, 9, 64), draw(place, 5, 64)),
            )


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[2:])
def test_same_bits_every_time(place: Place) -> None:
    args, index = arguments(place, 3600, REAL), places_of(place, 3600, 5000)
    row = draw(place, 5000, REAL[-1])

    def run() -> list[Tensor]:
        out = project_into(row, *args, index)
        return [out, *torch.autograd.grad(out, [row, *args], torch.ones_like(out))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
def test_graph_capture_and_side_stream() -> None:
    place = ("cuda", torch.bfloat16)
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
