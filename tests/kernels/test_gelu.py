"""GELU, tanh and exact, against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_cuda_graph, check_parity, draw
from triton_kernels import gelu as kernels

Gelu = Callable[[Tensor], Tensor]
KINDS = [
    pytest.param(kernels.gelu_tanh, reference.gelu_tanh, id="tanh"),
    pytest.param(kernels.gelu_erf, reference.gelu_erf, id="erf"),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("ours", "definition"), KINDS)
@pytest.mark.parametrize("shape", [(), (1,), (0, 16), (7, 33), (2, 3, 40), (2047,), (2049,)])
def test_parity(place: Place, ours: Gelu, definition: Gelu, shape: tuple[int, ...]) -> None:
    check_parity(ours, definition, (draw(place, *shape),))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # NumPy, for the interpreter
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("ours", "definition"), KINDS)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 10.0, 1e4])
def test_extreme_values(place: Place, ours: Gelu, definition: Gelu, scale: float) -> None:
    check_parity(ours, definition, (draw(place, 600, scale=scale),))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy, for the interpreter
@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(("ours", "definition"), KINDS)
def test_ends(place: Place, ours: Gelu, definition: Gelu) -> None:
    """Where the exponential overflows or vanishes: 0 or x, of slope 0 or 1."""
    x = torch.tensor([-1e30, -1e4, -20.0, 20.0, 1e4, 1e10], device=place[0]).requires_grad_()
    y = ours(x)
    y.sum().backward()
    assert x.grad is not None
    above = (x > 0).float()
    assert torch.equal(y, x * above)
    assert torch.equal(x.grad[1:], above[1:])
    assert torch.equal(ours(torch.tensor([torch.inf], device=place[0])), torch.tensor([torch.inf], device=place[0]))


@pytest.mark.parametrize("place", PLACE)
def test_normal_keeps_the_digits_of_small_values(place: Place) -> None:
    """The fitted tail is as good where Φ is small: 1 + erf has no digit left at -6."""
    x = -torch.linspace(0, 6, 2000, dtype=torch.float64)
    exact = torch.special.erfc(-x * 0.5**0.5) / 2 * x
    ours = kernels.gelu_erf(x.float().to(place[0])).cpu().double()
    assert ((ours - exact).abs() <= 2e-3 * exact.abs()).all()
    assert (ours - exact).abs().max() <= 5e-8


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(("ours", "definition"), KINDS)
def test_elements_that_are_not_adjacent(place: Place, ours: Gelu, definition: Gelu) -> None:
    wide = draw(place, 9, 96).detach()
    for x in (wide[:, 16:80], wide.T, wide[::2]):
        check_parity(ours, definition, (x.requires_grad_(),))
        check_parity(lambda x: ours(x).T, lambda x: definition(x).T, (x,))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(("ours", "definition"), KINDS)
def test_operator(place: Place, ours: Gelu, definition: Gelu) -> None:
    """Schema, fake, autograd and compilation."""
    x = draw(place, 5, 64)
    torch.library.opcheck(kernels.forward, (x, ours is kernels.gelu_erf))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), ours(x))
    assert torch.equal(
        torch.autograd.grad(compiled(x).sum(), x)[0],
        torch.autograd.grad(ours(x).sum(), x)[0],
    )


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(("ours", "definition"), KINDS)
@pytest.mark.parametrize("space", [kernels.FORWARD, kernels.BACKWARD], ids=lambda space: space.name)
def test_every_configuration(place: Place, ours: Gelu, definition: Gelu, space: kernels.SearchSpace) -> None:
    for config in space.cases["tanh"] + space.cases["erf"]:
        with space.forced(config):
            check_parity(ours, definition, (draw(place, 5000),))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        kernels.gelu_tanh(torch.ones(2, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "definition"), KINDS)
def test_real_shape(dtype: torch.dtype, ours: Gelu, definition: Gelu) -> None:
    check_parity(ours, definition, (draw(("cuda", dtype), 3600, 4304),))


@pytest.mark.gpu
@pytest.mark.parametrize(("ours", "definition"), KINDS)
def test_more_than_2_31_elements(ours: Gelu, definition: Gelu) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    x[-4096:] = torch.randn(4096)
    x.requires_grad_()
    y = ours(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    tail = x[-4096:].detach().requires_grad_()
    assert torch.equal(y[-4096:], ours(tail))
    assert torch.equal(gradient[-4096:], torch.autograd.grad(ours(tail).sum(), tail)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("ours", "definition"), KINDS)
def test_graph_on_a_side_stream(ours: Gelu, definition: Gelu) -> None:
    """Captured once and replayed on new values; the same bits every time."""
    check_cuda_graph(ours, [draw(("cuda", torch.bfloat16), 300, 4304)])
