"""layer_norm against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_cuda_graph, check_parity, draw
from triton_kernels import layer_norm as kernels
from triton_kernels.layer_norm import layer_norm

EPS = 1e-6


def both(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_parity(
        lambda x, w, b: layer_norm(x, w, b, EPS), lambda x, w, b: reference.layer_norm(x, w, b, EPS), (x, weight, bias)
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "shape", [(1, 1), (16,), (1, 1152), (3, 16), (17, 100), (33, 257), (2, 2100), (2, 3, 40), (0, 16)]
)
def test_parity(place: Place, shape: tuple[int, ...]) -> None:
    both(draw(place, *shape), draw(place, shape[-1]), draw(place, shape[-1]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    """All equal, tiny (where eps decides) and large: 1e4² does not fit float16."""
    both(draw(place, 5, 64, scale=scale), draw(place, 64), draw(place, 64))


@pytest.mark.parametrize("place", PLACES)
def test_far_from_zero(place: Place) -> None:
    """The mean squared is a million times the variance: E[x²] - E[x]² would lose it."""
    x = (torch.randn(5, 64) + 1000).to(*place).requires_grad_()
    both(x, draw(place, 64), draw(place, 64))


@pytest.mark.parametrize("place", PLACE)
def test_elements_that_are_not_adjacent(place: Place) -> None:
    wide = draw(place, 9, 96).detach()
    for x in (wide[:, 16:80], wide[:8].T, wide[::2], wide[:8].view(2, 4, 96).transpose(0, 1)):
        x, C = x.requires_grad_(), x.shape[-1]
        weight, bias = draw(place, 2 * C).detach()[::2].requires_grad_(), draw(place, C)
        check_parity(
            lambda *x: layer_norm(*x, EPS).mT, lambda *x: reference.layer_norm(*x, EPS).mT, (x, weight, bias)
        )  # fmt: skip


@pytest.mark.parametrize("place", PLACE)
def test_rows_more_than_2_31_elements_apart(place: Place) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # only what is written to takes memory
    stride = 2**30 + 16
    x = torch.empty(2 * stride + 64, device=place[0], dtype=torch.float16).as_strided((3, 64), (stride, 1))
    x.copy_(torch.randn(3, 64))
    both(x.requires_grad_(), draw((place[0], torch.float16), 64), draw((place[0], torch.float16), 64))


@pytest.mark.parametrize("place", PLACE)
def test_operator(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    x, w, b = draw(place, 5, 64), draw(place, 64), draw(place, 64)
    torch.library.opcheck(kernels.forward, (x, w, b, EPS))
    compiled = torch.compile(lambda x, w, b: layer_norm(x, w, b, EPS), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w, b), layer_norm(x, w, b, EPS))
    ours = torch.autograd.grad(layer_norm(x, w, b, EPS).square().sum(), (x, w, b))
    theirs = torch.autograd.grad(compiled(x, w, b).square().sum(), (x, w, b))
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("space", [kernels.FORWARD, kernels.BACKWARD, kernels.REDUCE], ids=lambda space: space.name)
def test_every_configuration(place: Place, space: kernels.SearchSpace) -> None:
    for case, configs in space.cases.items():
        shape = (2, 2100) if case == "wide" else (11, 48)
        for config in configs:
            with space.forced(config):
                both(draw(place, *shape), draw(place, shape[1]), draw(place, shape[1]))


def test_wrong_arguments_are_named() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="weight is"):
        layer_norm(x, torch.ones(5), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="bias is"):
        layer_norm(x, torch.ones(4), torch.ones(1, 4), EPS)
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        layer_norm(x.double(), torch.ones(4), torch.ones(4), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 3600, 28801])
def test_real_shape(dtype: torch.dtype, T: int) -> None:
    place = ("cuda", dtype)
    both(draw(place, T, 1152), draw(place, 1152), draw(place, 1152))


@pytest.mark.gpu
def test_graph_on_a_side_stream() -> None:
    """Captured once and replayed on new values; the same bits every time."""
    place = ("cuda", torch.bfloat16)
    inputs = [draw(place, 3600, 1152), draw(place, 1152), draw(place, 1152)]
    check_cuda_graph(lambda x, weight, bias: layer_norm(x, weight, bias, EPS), inputs)
