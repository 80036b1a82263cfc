"""swiglu against its definition."""

from __future__ import annotations

import pytest
import torch

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_cuda_graph, check_parity, draw
from triton_kernels import swiglu as kernels
from triton_kernels.swiglu import swiglu


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1, 2), (6,), (3, 16), (17, 102), (2, 4098), (2, 3, 40), (0, 16), (4, 0)])
def test_parity(place: Place, shape: tuple[int, ...]) -> None:
    check_parity(swiglu, reference.swiglu, (draw(place, *shape),))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # NumPy, for the interpreter
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 10.0, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    """The gate is large, and of both signs; products still fit float16."""
    x = torch.cat([scale * torch.randn(9, 50).clamp(-1.5, 1.5), torch.randn(9, 50).clamp(-1, 1)], 1).to(*place)
    check_parity(swiglu, reference.swiglu, (x.requires_grad_(),))


@pytest.mark.parametrize("place", PLACE)
def test_elements_that_are_not_adjacent(place: Place) -> None:
    wide = draw(place, 9, 96).detach()
    for x in (wide[:, 16:80], wide[:8].T, wide[::2], wide[:8].view(2, 4, 96).transpose(0, 1)):
        check_parity(swiglu, reference.swiglu, (x.requires_grad_(),))
        check_parity(lambda x: swiglu(x).mT, lambda x: reference.swiglu(x).mT, (x,))


@pytest.mark.parametrize("place", PLACE)
def test_rows_more_than_2_31_elements_apart(place: Place) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # only what is written to takes memory
    stride = 2**30 + 16
    x = torch.empty(2 * stride + 64, device=place[0], dtype=torch.float16).as_strided((3, 64), (stride, 1))
    x.copy_(torch.randn(3, 64))
    check_parity(swiglu, reference.swiglu, (x.requires_grad_(),))


@pytest.mark.parametrize("place", PLACE)
def test_operator(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    x = draw(place, 5, 64)
    torch.library.opcheck(kernels.forward, (x,))
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), swiglu(x))
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(swiglu(x).sum(), x)[0])


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("space", [kernels.FORWARD, kernels.BACKWARD], ids=lambda space: space.name)
def test_every_configuration(place: Place, space: kernels.SearchSpace) -> None:
    for config in space.cases["row"]:
        with space.forced(config):
            check_parity(swiglu, reference.swiglu, (draw(place, 3, 2600),))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"gate_up is torch.float64"):
        swiglu(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="even last dimension"):
        swiglu(torch.ones(2, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_shape(dtype: torch.dtype) -> None:
    check_parity(swiglu, reference.swiglu, (draw(("cuda", dtype), 2048, 2 * 17920),))


@pytest.mark.gpu
def test_graph_on_a_side_stream() -> None:
    """Captured once and replayed on new values; the same bits every time."""
    check_cuda_graph(swiglu, [draw(("cuda", torch.bfloat16), 300, 2 * 17920)])
