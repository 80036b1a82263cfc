"""rope against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_cuda_graph, check_parity, draw
from triton_kernels import rope as kernels
from triton_kernels.rope import rope


def tables(place: Place, T: int, D: int) -> tuple[Tensor, Tensor]:
    """Of positions that start over, as those of documents do."""
    cos, sin = reference.rope_table(torch.arange(T) % 7 * 1000, D, 500000.0)
    return cos.to(place[0]), sin.to(place[0])


def both(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> None:
    check_parity(rope, reference.rope, (qkv, cos, sin, rotated))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("shape", "rotated"),
    [
        ((1, 1, 2), 1),
        ((9, 6, 8), 4),
        ((5, 60, 16), 50),
        ((3, 65, 6), 33),
        ((4, 3, 128), 0),
        ((4, 3, 72), 3),
        ((0, 3, 8), 2),
        ((3, 0, 8), 0),
    ],
)
def test_parity(place: Place, shape: tuple[int, int, int], rotated: int) -> None:
    both(draw(place, *shape), *tables(place, shape[0], shape[2]), rotated)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    both(draw(place, 5, 6, 8, scale=scale), *tables(place, 5, 8), 4)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # NumPy, for the interpreter
@pytest.mark.parametrize("place", PLACE)
def test_the_rest_passes(place: Place) -> None:
    """Bit by bit, whatever it holds."""
    qkv = draw(place, 4, 6, 8).detach()
    qkv[:, 4:, ::3] = torch.inf
    qkv[:, 4:, 1::3] = -0.0
    out = rope(qkv, *tables(place, 4, 8), 4)
    assert torch.equal(out[:, 4:], qkv[:, 4:])
    assert torch.equal(out[:, 4:].signbit(), qkv[:, 4:].signbit())


@pytest.mark.parametrize("place", PLACE)
def test_the_opposite_angle_undoes_it(place: Place) -> None:
    qkv = draw(place, 5, 6, 8)
    cos, sin = tables(place, 5, 8)
    back = kernels.rotate(rope(qkv, cos, sin, 4), cos, sin, 4, True)
    torch.testing.assert_close(back, qkv, atol=1e-1 if qkv.dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize("place", PLACE)
def test_rows_that_are_not_adjacent(place: Place) -> None:
    """Rows of a wider tensor are read where they lie; heads or channels apart are copied first."""
    wide = draw(place, 9, 8, 16).detach()
    cos, sin = tables(place, 18, 16)
    cos, sin = cos[::2], torch.cat([sin, sin], 1)[::2, :8]
    for qkv in (wide[:, 1:7], wide[:, ::2], wide.transpose(1, 2).contiguous().transpose(1, 2)):
        both(qkv.requires_grad_(), cos, sin, 3)
    check_parity(
        lambda *x: rope(*x).transpose(0, 1), lambda *x: reference.rope(*x).transpose(0, 1),
        (wide[:, :6].requires_grad_(), cos.T.contiguous().T, sin, 3),
    )  # fmt: skip


@pytest.mark.parametrize("place", PLACE)
def test_rows_more_than_2_31_elements_apart(place: Place) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # only what is written to takes memory
    stride = 2**30 + 16
    qkv = torch.empty(2 * stride + 64, device=place[0], dtype=torch.float16).as_strided((3, 4, 16), (stride, 16, 1))
    qkv.copy_(torch.randn(3, 4, 16))
    both(qkv.requires_grad_(), *tables(place, 3, 16), 3)


@pytest.mark.parametrize("place", PLACE)
def test_operator(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    qkv, (cos, sin) = draw(place, 5, 6, 8), tables(place, 5, 8)
    torch.library.opcheck(kernels.rotate, (qkv, cos, sin, 4, False))
    compiled = torch.compile(lambda qkv: rope(qkv, cos, sin, 4), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(qkv), rope(qkv, cos, sin, 4))
    assert torch.equal(
        torch.autograd.grad(compiled(qkv).square().sum(), qkv)[0],
        torch.autograd.grad(rope(qkv, cos, sin, 4).square().sum(), qkv)[0],
    )


@pytest.mark.parametrize("place", PLACE)
def test_every_configuration(place: Place) -> None:
    for config in kernels.SPACE.cases["row"]:
        with kernels.SPACE.forced(config):
            both(draw(place, 2, 60, 8), *tables(place, 2, 8), 50)


def test_wrong_arguments_are_named() -> None:
    qkv, table = torch.ones(2, 3, 4), torch.ones(2, 2)
    with pytest.raises(ValueError, match="even D"):
        rope(torch.ones(2, 3, 5), table, table, 1)
    with pytest.raises(ValueError, match="sin is"):
        rope(qkv, table, torch.ones(3, 2), 1)
    with pytest.raises(ValueError, match=r"cos is torch.float16"):
        rope(qkv, table.half(), table, 1)
    with pytest.raises(ValueError, match="rotated is 4"):
        rope(qkv, table, table, 4)
    with pytest.raises(ValueError, match=r"qkv is torch.float64"):
        rope(qkv.double(), table, table, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_shape(dtype: torch.dtype) -> None:
    place = ("cuda", dtype)
    both(draw(place, 4096, 60, 128), *tables(place, 4096, 128), 50)


@pytest.mark.gpu
def test_graph_on_a_side_stream() -> None:
    """Captured once and replayed on new values; the same bits every time."""
    place = ("cuda", torch.bfloat16)
    cos, sin = tables(place, 300, 128)
    check_cuda_graph(lambda qkv: rope(qkv, cos, sin, 50), [draw(place, 300, 60, 128)])
