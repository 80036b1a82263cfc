"""patch_embed against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_parity, draw
from triton_kernels import patch_embed as kernels
from triton_kernels.patch_embed import patch_embed

Grids = list[tuple[int, int]]
SEVERAL: Grids = [(3, 5), (1, 1), (7, 4), (4, 4), (1, 9), (2, 2)]
MANY: Grids = [(1 + i % 3, 1 + i % 2) for i in range(40)]


def arguments(
    place: Place, grids: Grids, side: int = 3, K: int = 24, C: int = 40, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """patches, weight, bias, table, grids."""
    patches = draw(place, sum(math.prod(grid) for grid in grids), K, scale=scale)
    table = draw(place, side * side, C)
    sizes = torch.tensor(grids, dtype=torch.int32).reshape(-1, 2).to(place[0])
    return patches, draw(place, C, K, scale=K**-0.5), draw(place, C), table, sizes


def both(args: tuple[Tensor, ...], gradients: bool = True, slack: float = 1.0) -> None:
    check_parity(patch_embed, reference.patch_embed, args, gradients, slack)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("grids", [[], [(1, 1)], [(1, 37)], [(37, 1)], [(3, 3)], [(17, 8)], SEVERAL], ids=str)
def test_grids(place: Place, grids: Grids) -> None:
    both(arguments(place, grids))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("side", [1, 5])
def test_tables_of_other_sizes(place: Place, side: int) -> None:
    both(arguments(place, [(3, 7), (1, 1)], side=side))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("grids", [[(16, 16)], [(17, 16)], [(20, 31)], [(2, 9)]], ids=str)
def test_the_real_table(place: Place, grids: Grids) -> None:
    both(arguments(place, grids, side=16), gradients=place[0] == "cuda")  # 256 programs take long to interpret


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("K", "C"), [(1, 1), (100, 36), (64, 130), (65, 64)])
def test_widths(place: Place, K: int, C: int) -> None:
    both(arguments(place, [(3, 5), (2, 2)], K=K, C=C))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("P", [127, 128, 129])
def test_lengths_at_tile_edges(place: Place, P: int) -> None:
    both(arguments(place, [(1, P - 4), (2, 2)]))


@pytest.mark.parametrize("place", PLACE)
def test_many_images(place: Place) -> None:
    both(arguments(place, MANY, side=1))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    both(arguments(place, [(3, 5)], scale=scale), slack=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[2:])
@pytest.mark.parametrize("grids", [[(60, 60)] * 8, [(16, 16), (1, 1), (60, 60), (13, 20), (1, 256)], MANY], ids=len)
def test_real_sizes(place: Place, grids: Grids) -> None:
    both(arguments(place, grids, 16, 768, 1152))


@pytest.mark.parametrize("place", PLACES[1:3])
def test_patches_of_another_dtype(place: Place) -> None:
    patches, *rest = arguments(place, SEVERAL)
    ours, theirs = patch_embed(patches.float(), *rest), patch_embed(patches, *rest)
    assert torch.equal(ours, theirs) and ours.dtype == place[1]
    wide = patches.detach().float().requires_grad_()
    for operation in (patch_embed, reference.patch_embed):
        (grad,) = torch.autograd.grad(operation(wide, *rest).sum(), [wide])
        assert grad.dtype == torch.float32


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_are_not_adjacent(place: Place) -> None:
    patches, weight, bias, table, grids = (a.detach() for a in arguments(place, SEVERAL, K=24, C=24))
    wide = torch.cat([patches, patches], 1)[:, 12:36]
    spread = torch.stack([bias, bias], 1)[:, 0]
    floats = (x.requires_grad_() for x in (wide, weight.T, spread, table))
    both((*floats, torch.cat([grids, grids], 1)[:, 1:3].flip(1)))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_wanted(place: Place, wanted: int) -> None:
    *floats, grids = (a.detach() for a in arguments(place, [(3, 5)]))
    floats[wanted].requires_grad_()
    both((*floats, grids))


@pytest.mark.parametrize("place", PLACE)
def test_patches_of_no_image_get_no_position(place: Place) -> None:
    patches, weight, bias, table, grids = arguments(place, [(3, 5), (2, 2)])
    out = patch_embed(patches, weight, bias, table, grids[:1])
    expected = torch.nn.functional.linear(patches, weight, bias)[15:]
    torch.testing.assert_close(out[15:], expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("place", PLACE)
def test_operator(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    args = arguments(place, [(3, 5), (2, 2)], side=2)
    torch.library.opcheck(kernels.forward, args)
    compiled = torch.compile(patch_embed, backend="aot_eager", fullgraph=True)
    outs = [compiled(*args), patch_embed(*args)]
    grads = [torch.autograd.grad(out, args[:4], torch.ones_like(out)) for out in outs]
    for ours, theirs in zip(*([out, *grad] for out, grad in zip(outs, grads, strict=True)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
def test_every_configuration(place: Place) -> None:
    case = "float32" if place[1] == torch.float32 else "short"
    for space, configs in (
        (kernels.FORWARD, kernels.FORWARD.cases[case]),
        (kernels.TABLE, kernels.TABLE.cases["cell"]),
    ):
        for config in configs:
            with space.forced(config):
                # The interpreter adds a cell's partial sums one after the other, which rounds more often.
                both(arguments(place, [(10, 13)], side=2, K=70, C=140), slack=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[2:])
def test_same_bits_every_time(place: Place) -> None:
    args = arguments(place, [(60, 60), (16, 16), (30, 40)], 16, 768, 1152)

    def run() -> list[Tensor]:
        out = patch_embed(*args)
        return [out, *torch.autograd.grad(out, args[:4], torch.ones_like(out))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
def test_graph_capture_and_side_stream() -> None:
    """Captured with one batch of images, replayed with another of as many patches."""
    place = ("cuda", torch.bfloat16)
    args = [a.detach() for a in arguments(place, [(8, 32), (20, 20)], 16, 768, 1152)]
    expected = patch_embed(*args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(patch_embed(*args), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = patch_embed(*args)
    args[4].copy_(torch.tensor([[16, 16], [40, 10]], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, patch_embed(*args))


def test_wrong_arguments_are_named() -> None:
    patches, weight, bias, table, grids = (a.detach() for a in arguments(("cpu", torch.float32), [(3, 5)]))
    for wrong, message in [
        ((patches.double(), weight, bias, table, grids), "patches is torch.float64"),
        ((patches[0], weight, bias, table, grids), "patches has 1 dim"),
        ((patches, weight.T, bias, table, grids), "weight is"),
        ((patches, weight, bias[1:], table, grids), "bias is"),
        ((patches, weight, bias.half(), table, grids), "bias and table must be"),
        ((patches, weight, bias, table[:8], grids), "table is"),
        ((patches, weight, bias, table, grids[0]), "grids is"),
        ((patches, weight, bias, table, grids.long()), "grids is"),
    ]:
        with pytest.raises(ValueError, match=message):
            patch_embed(*wrong)
