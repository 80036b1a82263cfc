"""rms_norm against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_cuda_graph, check_parity, draw
from triton_kernels import rms_norm as kernels
from triton_kernels.rms_norm import rms_norm

EPS = 1e-5


def both(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    check_parity(
        lambda x, w, r: rms_norm(x, w, EPS, r), lambda x, w, r: reference.rms_norm(x, w, EPS, r), (x, weight, residual)
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5120), (3, 16), (17, 100), (129, 257), (2, 3, 40), (0, 16)])
def test_parity(place: Place, residual: bool, shape: tuple[int, ...]) -> None:
    both(draw(place, *shape), draw(place, shape[-1]), draw(place, *shape) if residual else None)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    """All equal, tiny (where eps decides) and large: 1e4² does not fit float16."""
    both(draw(place, 5, 64, scale=scale), draw(place, 64), None)


@pytest.mark.parametrize("place", PLACE)
def test_rows_that_are_not_adjacent(place: Place) -> None:
    wide, other = draw(place, 9, 96), draw(place, 64, 9)
    both(wide[:, 16:80].detach().requires_grad_(), draw(place, 64), other.T.detach().requires_grad_())


@pytest.mark.parametrize("place", PLACE)
def test_one_output_unused(place: Place) -> None:
    x, w, r = draw(place, 5, 64), draw(place, 64), draw(place, 5, 64)
    for output in (0, 1):
        check_parity(
            lambda x, w, r, i=output: rms_norm(x, w, EPS, r)[i],
            lambda x, w, r, i=output: reference.rms_norm(x, w, EPS, r)[i],
            (x, w, r),
        )


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("residual", [False, True])
def test_operator(place: Place, residual: bool) -> None:
    """Schema, fake, autograd and compilation."""
    x, w, r = draw(place, 5, 64), draw(place, 64), draw(place, 5, 64) if residual else None
    torch.library.opcheck(kernels.forward, (x, r, w, EPS))
    compiled = torch.compile(lambda x, w, r: rms_norm(x, w, EPS, r), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w, r)[0], rms_norm(x, w, EPS, r)[0])


@pytest.mark.parametrize("place", PLACE)
def test_every_configuration(place: Place) -> None:
    for space in (kernels.FORWARD, kernels.BACKWARD):
        for config in space.cases["row"]:
            with space.forced(config):
                both(draw(place, 7, 48), draw(place, 48), draw(place, 7, 48))


def test_wrong_arguments_are_named() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="weight is"):
        rms_norm(x, torch.ones(5), EPS)
    with pytest.raises(ValueError, match="residual must have"):
        rms_norm(x, torch.ones(4), EPS, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"x is torch.float64"):
        rms_norm(x.double(), torch.ones(4), EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("T", [1, 8192, 16385])
def test_real_shape(dtype: torch.dtype, residual: bool, T: int) -> None:
    place = ("cuda", dtype)
    both(draw(place, T, 5120), draw(place, 5120), draw(place, T, 5120) if residual else None)


@pytest.mark.gpu
def test_graph_on_a_side_stream() -> None:
    """Captured once and replayed on new values; the same bits every time."""
    place = ("cuda", torch.bfloat16)
    inputs = [draw(place, 3600, 5120), draw(place, 5120), draw(place, 3600, 5120)]
    check_cuda_graph(lambda x, weight, residual: rms_norm(x, weight, EPS, residual), inputs)
