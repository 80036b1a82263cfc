"""fp8_linear against its definition, and the rounding of its operands bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_cuda_graph, check_parity, draw
from triton_kernels import fp8_linear as kernels
from triton_kernels.fp8_linear import fp8_linear, quantize_rows

# NumPy, for the interpreter: of rows of zeros, tiny numbers and infinities.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning")
LINEAR_PLACES = [PLACES[0], PLACES[2]]


def same(x: Tensor, by: Tensor | None = None) -> None:
    for ours, theirs in zip(quantize_rows(x, by), reference.quantize_rows(x, by), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        raw = torch.uint8 if ours.dtype == torch.float8_e4m3fn else torch.int32
        assert torch.equal(ours.contiguous().view(raw), theirs.contiguous().view(raw))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 16), (17, 5121), (2, 3, 40), (0, 16), (4, 0)])
def test_parity(place: Place, shape: tuple[int, ...]) -> None:
    x = draw(place, *shape)
    same(x)
    same(x, torch.rand(shape[-1], device=place[0]) * 1e-3)


@pytest.mark.parametrize("place", PLACE)
def test_every_value_of_the_format(place: Place) -> None:
    """All 256 codes come back, subnormal ones too; halfway between two neighbours the even one wins."""
    codes = torch.arange(256, dtype=torch.uint8, device=place[0])
    values = codes.view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].to(place[1])
    data, scales = quantize_rows(values[None])
    assert scales.item() == 1 and torch.equal(data.float()[0], values.float())
    ordered = values.float().unique()
    halves = torch.cat([(ordered[1:] + ordered[:-1]) / 2, ordered[-1:]]).to(place[1])
    same(halves[None])


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e30])
def test_extreme_values(place: Place, scale: float) -> None:
    same((scale * torch.randn(3, 50, device=place[0])).to(place[1]))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(place: Place, value: float) -> None:
    x = torch.randn(2, 40, device=place[0]).to(place[1])
    x[1, 3] = value
    for quantize in (quantize_rows, reference.quantize_rows):
        data, scales = quantize(x)
        restored = data.float() * scales[:, None]
        assert restored[0].isfinite().all() and restored[1].isnan().any()


@pytest.mark.parametrize("place", PLACE)
def test_elements_that_are_not_adjacent(place: Place) -> None:
    wide = draw(place, 8, 96).detach()
    for x in (wide[:, 16:80], wide.T, wide[::2], wide.view(2, 4, 96).transpose(0, 1)):
        same(x)


@pytest.mark.parametrize("place", PLACE)
def test_every_configuration(place: Place) -> None:
    for config in kernels.ROW.cases["row"]:
        with kernels.ROW.forced(config):
            same(draw(place, 2, 5000))


@pytest.mark.parametrize("place", PLACE)
def test_operator_and_errors(place: Place) -> None:
    x = draw(place, 5, 64).detach()
    torch.library.opcheck(kernels.operator, (x, None), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match=r"^quantize_rows: by must be float32 \(64,\)"):
        quantize_rows(x, torch.ones(63, device=place[0]))
    with pytest.raises(ValueError, match=r"^quantize_rows: x is torch.int32"):
        quantize_rows(x.int())


@pytest.mark.parametrize("place", LINEAR_PLACES)
@pytest.mark.parametrize("T,K,N", [(1, 16, 16), (7, 48, 32), (33, 256, 96)])
def test_linear(place: Place, T: int, K: int, N: int) -> None:
    """Weights whose rows differ by powers of ten, so that a scale in the wrong place is seen."""
    x, w = draw(place, T, K), draw(place, N, K).detach()
    w = (w * torch.logspace(-2, 1, N, device=place[0], dtype=place[1])[:, None]).requires_grad_()
    check_parity(fp8_linear, reference.fp8_linear, (x, w), slack=4)  # the library sums in an order of its own


@pytest.mark.parametrize("place", LINEAR_PLACES)
def test_only_what_is_wanted_gets_a_gradient(place: Place) -> None:
    x, w = draw(place, 5, 32), draw(place, 16, 32)
    check_parity(fp8_linear, reference.fp8_linear, (x.detach(), w))
    check_parity(fp8_linear, reference.fp8_linear, (x, w.detach()))


def test_linear_errors() -> None:
    x, w = torch.ones(2, 32), torch.ones(16, 32)
    for given, message in (
        ((x, w[:, :16]), r"x \(T, K\), weight \(N, K\)"),
        ((x.half(), w), r"x is torch.float16, weight torch.float32, must be the same"),
        ((x, w[:15]), r"\(15, 32\) must be multiples of 16"),
    ):
        with pytest.raises(ValueError, match="^fp8_linear: " + message):
            fp8_linear(*given)


@pytest.mark.parametrize("place", LINEAR_PLACES)
def test_compiled(place: Place) -> None:
    """Without a graph break, to the same bits."""
    x, w = draw(place, 16, 32), draw(place, 48, 32)
    compiled = torch.compile(fp8_linear, backend="aot_eager", fullgraph=True, dynamic=False)
    cotangent = torch.randn(16, 48, device=place[0]).to(place[1])
    found = [[out, *torch.autograd.grad(out, (x, w), cotangent)] for out in (compiled(x, w), fp8_linear(x, w))]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "N", "K"), [(8192, 7680, 5120), (1000, 5120, 17920)])
def test_real_shape(T: int, N: int, K: int) -> None:
    place = ("cuda", torch.bfloat16)
    check_parity(fp8_linear, reference.fp8_linear, (draw(place, T, K), draw(place, N, K, scale=K**-0.5)), slack=4)


@pytest.mark.gpu
def test_graph_on_a_side_stream() -> None:
    """Captured once and replayed on new values; the same bits every time."""
    place = ("cuda", torch.bfloat16)
    check_cuda_graph(fp8_linear, [draw(place, 512, 5120), draw(place, 7680, 5120, scale=5120**-0.5)])
