"""decode_attention, contiguous and paged, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phi4rv.ops import cuda, reference
from tests.kernels.check import CUDA_PLACE, CUDA_PLACES, PLACE, PLACES, Place, check_parity
from triton_kernels import decode_attention as triton
from triton_kernels.common import cache
from triton_kernels.common.launch import num_sms

SLACK = 4.0  # a score's own rounding is an error of its weight, however few numbers come out
FP8 = torch.float8_e4m3fn
LENGTHS = [1, 16, 17, 0, 64, 65, 300]
Inputs = tuple[Any, ...]
Kernels = Any  # a module that has both functions


def _everywhere(ours: list[Any], csrc: list[Any]) -> pytest.MarkDecorator:
    """Triton's and csrc/'s kernels, each at its places."""
    both = [("triton", triton, p) for p in ours] + [("cuda", cuda, p) for p in csrc]
    rows = [pytest.param(kernels, *p.values, id=f"{name}-{p.id}", marks=p.marks) for name, kernels, p in both]
    return pytest.mark.parametrize(("kernels", "place"), rows)


EVERYWHERE = _everywhere(PLACES, CUDA_PLACES)
ANYWHERE = _everywhere(PLACE, CUDA_PLACE)
ON_GPU = _everywhere(PLACES[2:], CUDA_PLACES[2:])
# The narrowest head is enough where the width does not matter.
NARROW = {triton: 16, cuda: 64}
HEAD_DIMS = {triton: (1, 24, 64, 72, 200, 256), cuda: cuda.HEAD_DIMS}


@pytest.fixture(autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """csrc/'s kernels, where a test takes them."""
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("kernels") is cuda:
        request.getfixturevalue("csrc")


def draw(place: Place, *shape: int, scale: float = 1.0, fp8: bool = False) -> Tensor:
    device, dtype = place
    x = (scale * torch.randn(shape)).to(device, dtype)
    return x.to(FP8) if fp8 else x


def scales(place: Place, fp8: bool, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """A scalar and one for each head."""
    if not fp8:
        return None, None
    return torch.tensor(0.3, device=place[0]), (0.5 + torch.rand(heads)).to(place[0])


def packed(
    place: Place, lengths: list[int], H: int, G: int, D: int, M: int = 1, fp8: bool = False, scale: float = 1.0
) -> Inputs:
    """Documents out of order, with rows between them that are no one's: NaN."""
    cache = torch.zeros(2, sum(lengths) + 3 * len(lengths), G, D)
    cache[:] = float("nan")
    starts, row = [0] * len(lengths), 0
    for b in reversed(range(len(lengths))):
        starts[b] = row
        cache[:, row : row + lengths[b]] = scale * torch.randn(2, lengths[b], G, D)
        row += lengths[b] + 3
    k, v = cache.to(place[0], FP8 if fp8 else place[1])
    offsets = [torch.tensor(x, dtype=torch.int32, device=place[0]) for x in (starts, lengths)]
    return draw(place, len(lengths), M, H, D, scale=scale), k, v, *offsets, *scales(place, fp8, G)


def paged(place: Place, lengths: list[int], H: int, G: int, D: int, size: int, M: int = 1, fp8: bool = False) -> Inputs:
    """Pages in random order; rows past a document's end are NaN, entries of the table past it out of range."""
    used = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(used) + 2).tolist()
    cache = torch.full((2, len(order), size, G, D), float("nan"))
    table = torch.full((len(lengths), max(used) + 1), -1)
    for b, n in enumerate(lengths):
        for i in range(used[b]):
            table[b, i] = order.pop()
            rows = min(size, n - i * size)
            cache[:, table[b, i], :rows] = torch.randn(2, rows, G, D)
    table[table < 0] = torch.tensor([-1, 2**31 - 1]).repeat(table.numel())[: int((table < 0).sum())]
    k, v = cache.to(place[0], FP8 if fp8 else place[1])
    integers = [x.to(place[0], torch.int32) for x in (table, torch.tensor(lengths))]
    return draw(place, len(lengths), M, H, D), k, v, *integers, *scales(place, fp8, G)


def held(kernels: Kernels, inputs: Inputs) -> None:
    check_parity(kernels.decode_attention, reference.decode_attention, inputs, slack=SLACK)


def held_paged(kernels: Kernels, inputs: Inputs) -> None:
    check_parity(kernels.paged_decode_attention, reference.paged_decode_attention, inputs, slack=SLACK)


@EVERYWHERE
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads", [(4, 1), (2, 2), (40, 1)])
def test_ragged_lengths(kernels: Kernels, place: Place, fp8: bool, heads: tuple[int, int]) -> None:
    held(kernels, packed(place, LENGTHS if heads[0] < 40 else [0, 70], *heads, D=NARROW[kernels], fp8=fp8))


@EVERYWHERE
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("M", [2, 8, 17])
def test_several_tokens(kernels: Kernels, place: Place, fp8: bool, M: int) -> None:
    """Down to a document that is all new, where its first token sees itself alone."""
    held(kernels, packed(place, [M, M + 1, 0, 70], 2, 1, NARROW[kernels], M, fp8))


@EVERYWHERE
def test_head_dims(kernels: Kernels, place: Place) -> None:
    """One token, and as many as make more than 16 rows."""
    for D in HEAD_DIMS[kernels]:
        for fp8 in (False, True) if kernels is triton or D != 72 else (False,):
            held(kernels, packed(place, [70], 2, 1, D, fp8=fp8))
            held(kernels, packed(place, [70], 4, 1, D, M=5, fp8=fp8))


@EVERYWHERE
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_paged(kernels: Kernels, place: Place, fp8: bool, size: int) -> None:
    D = {triton: 24, cuda: 64}[kernels]
    held_paged(kernels, paged(place, [1, 0, 64, 257], 2, 1, D, size, fp8=fp8))
    if size == 16:
        held_paged(kernels, paged(place, [5, 131], 2, 2, D, size, M=5, fp8=fp8))


@_everywhere([], CUDA_PLACE)
@pytest.mark.parametrize("fp8", [False, True])
def test_long_documents(kernels: Kernels, place: Place, fp8: bool) -> None:
    """Few parts, through which a ring of stages goes many times; and more parts than a round of the merge takes."""
    held(kernels, packed(place, [1500], 6, 6, 64, fp8=fp8))
    held_paged(kernels, paged(place, [1300], 6, 6, 64, 48, M=2, fp8=fp8))
    held(kernels, packed(place, [0] * 40 + [6000] + [0] * 39, 2, 1, 64, fp8=fp8))


@_everywhere([], CUDA_PLACE)
def test_parts_that_round_up(kernels: Kernels, place: Place) -> None:
    """Documents a little longer than a part share the blocks there are."""
    for lengths in ([130] * 5, [65] * 11, [129, 1, 1, 1, 193]):
        held(kernels, packed(place, lengths, 2, 1, 64))


@_everywhere([], CUDA_PLACE)
def test_pages_change_no_bit(kernels: Kernels, place: Place) -> None:
    q, k, v, table, lengths, *_ = paged(place, [300, 0, 77], 4, 2, 64, 16, M=2)
    rows = [table[b, : -(-n // 16)].long() for b, n in enumerate(lengths.tolist())]
    starts = 16 * torch.tensor([0, len(rows[0]), len(rows[0])], device=place[0])
    together = [x[torch.cat(rows)].flatten(0, 1) for x in (k, v)]
    once = kernels.paged_decode_attention(q, k, v, table, lengths)
    assert torch.equal(kernels.decode_attention(q, *together, starts, lengths), once)


@ON_GPU
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("M", [1, 8])
@pytest.mark.parametrize("lengths", [LENGTHS, [16384], [4096] * 8, [4095, 9, 0, 3600, 16384], [20] * 700 + [9000]])
def test_real_shapes(kernels: Kernels, place: Place, fp8: bool, M: int, lengths: list[int]) -> None:
    held(kernels, packed(place, lengths, 40, 10, 128, M, fp8))
    held_paged(kernels, paged(place, lengths, 40, 10, 128, 64, M, fp8))


@EVERYWHERE
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_extreme_values(kernels: Kernels, place: Place, scale: float) -> None:
    """All equal, nearly so, and one key that takes all: a score of 1e8."""
    held(kernels, packed(place, [40, 130], 4, 1, NARROW[kernels], scale=scale))
    q, k, v, *rest = packed(place, [40, 130], 4, 1, NARROW[kernels], M=2, fp8=True)
    held(kernels, (q * scale, k, v, *rest))


@ANYWHERE
def test_a_thousand_documents_of_one_token(kernels: Kernels, place: Place) -> None:
    """A softmax of one key is 1: the result is the value's own bits. Interpreted, fifty do."""
    B, D = 50 if place[0] == "cpu" else 1000, NARROW[kernels]
    v = draw(place, B, 1, D)
    starts = torch.randperm(B).to(place[0])
    out = kernels.decode_attention(draw(place, B, 1, 1, D), draw(place, B, 1, D), v, starts, torch.ones_like(starts))
    assert torch.equal(out[:, 0], v[starts])


@ANYWHERE
@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 1, 4)])
def test_nothing(kernels: Kernels, place: Place, shape: tuple[int, ...]) -> None:
    """No document, no token, no key."""
    D = NARROW[kernels]
    q, cache = draw(place, *shape, D), draw(place, 0, 2, D)
    zero = torch.zeros(shape[0], dtype=torch.int64, device=place[0])
    assert torch.equal(kernels.decode_attention(q, cache, cache, zero, zero), torch.zeros_like(q))
    table, pages = zero.new_zeros((shape[0], 0)), draw(place, 1, 1, 2, D)
    assert torch.equal(kernels.paged_decode_attention(q, pages, pages, table, zero), torch.zeros_like(q))


@ANYWHERE
def test_strided_inputs(kernels: Kernels, place: Place) -> None:
    """Keys and values side by side in one cache, channels of q apart, a table of more columns than are given."""
    D = {triton: 24, cuda: 64}[kernels]
    both = draw(place, 90, 2, 2, D + 24)
    k, v = both[:, 0, :, 8 : D + 8], both[:, 1, :, 8 : D + 8]
    q = draw(place, D, 4, 1, 2).permute(3, 2, 1, 0)
    starts, lengths = torch.tensor([[1, 9], [40, 9], [30, 9], [50, 9]], device=place[0])[:, 0].view(2, 2)
    held(kernels, (q, k, v, starts, lengths))
    held(kernels, (q, k, v, torch.stack([starts, lengths]).T[:, 0], lengths))
    pages = both.view(9, 10, 2, 2, D + 24)
    table = torch.tensor([[3, 1, 8, 0], [2, 5, 7, 0]], dtype=torch.int32, device=place[0])
    for given in (table[:, :3], table.T.contiguous().T):
        held_paged(kernels, (q, pages[:, :, 0, :, :D], pages[:, :, 1, :, :D], given, lengths - 25))


@ANYWHERE
def test_a_cache_of_more_than_2_to_the_31_elements(kernels: Kernels, place: Place) -> None:
    rows, wide, D = 40, 2**31 // 16, NARROW[kernels]
    torch.utils.deterministic.fill_uninitialized_memory = False  # on a CPU, pages that nothing touches cost nothing
    storage = torch.empty(rows * wide, device=place[0], dtype=place[1])
    torch.utils.deterministic.fill_uninitialized_memory = True
    cache = storage.as_strided((rows, 1, D), (wide, D, 1))
    cache.copy_(draw(place, rows, 1, D))
    starts, lengths = torch.tensor([[20], [20]], device=place[0])
    held(kernels, (draw(place, 1, 1, 2, D), cache, cache, starts, lengths))
    table = torch.tensor([[19, 3]], dtype=torch.int32, device=place[0])
    pages = storage.as_strided((20, 2, 1, D), (2 * wide, wide, D, 1))
    held_paged(kernels, (draw(place, 1, 1, 2, D), pages, pages, table, torch.tensor([4], device=place[0])))


@pytest.mark.parametrize("place", PLACE)
def test_every_code_of_float8(place: Place) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=place[0])
    out = torch.empty(256, dtype=torch.float16, device=place[0])
    cache._convert_kernel[(1,)](codes, out, COUNT=256)
    torch.testing.assert_close(out, codes.view(FP8).half(), rtol=0, atol=0, equal_nan=True)


@ANYWHERE
def test_every_code_of_float8_passes(kernels: Kernels, place: Place) -> None:
    """Each is a value that the only key of its document takes whole; but for NaN, that of one alone."""
    v = torch.arange(256, dtype=torch.uint8, device=place[0]).view(FP8).view(4, 1, 64)
    q, starts, lengths = (
        draw(place, 4, 1, 1, 64),
        torch.arange(4, device=place[0]),
        torch.ones(4, device=place[0]).long(),
    )
    out = kernels.decode_attention(q, torch.ones_like(v, dtype=place[1]).to(FP8), v, starts, lengths)
    torch.testing.assert_close(out[:, 0], v.to(place[1]), rtol=0, atol=0, equal_nan=True)


@ANYWHERE
def test_scales_of_a_cache_that_is_not_float8(kernels: Kernels, place: Place) -> None:
    q, k, v, starts, lengths, *_ = packed(place, [70], 2, 2, NARROW[kernels])
    held(kernels, (q, k, v, starts, lengths, *scales(place, True, 2)))
    held(kernels, (q, k, v, starts, lengths, *reversed(scales(place, True, 2))))


@pytest.mark.parametrize("place", PLACE)
def test_every_configuration(place: Place) -> None:
    for case, configs in triton.SPLIT.cases.items():
        D, bits = (int(x) for x in case.split(" of "))
        dtype = torch.float32 if bits == 32 else torch.float16 if place[0] == "cpu" else torch.bfloat16
        for config in configs:
            with triton.SPLIT.forced(config):
                held(triton, packed((place[0], dtype), [140], 1, 1, D, M=2, fp8=bits == 8))
    for config in triton.COMBINE.cases["row"]:
        with triton.COMBINE.forced(config):
            held(triton, packed(place, [140], 1, 1, 72))


def test_parts_fill_the_chip() -> None:
    assert triton.num_splits_heuristic(programs=10, keys=16384, block=64, slots=264) == 26
    assert triton.num_splits_heuristic(programs=264, keys=16384, block=64, slots=264) == 1
    assert (
        triton.num_splits_heuristic(programs=1, keys=100, block=64, slots=264) == 2
    )  # no more than there are blocks of keys
    assert triton.num_splits_heuristic(programs=1, keys=0, block=64, slots=264) == 1
    assert (
        triton.num_splits_heuristic(2, 300, 64, 2 * num_sms(torch.device("cpu"))) > 1
    )  # the tests above did split and merge
    for programs in range(1, 300):
        parts = triton.num_splits_heuristic(programs, 10**6, 64, 264)
        assert parts <= triton.MAX_SPLITS
        assert programs * parts / (-(-programs * parts // 264) * 264) > 0.9 or programs <= 2


@ANYWHERE
@pytest.mark.parametrize("fp8", [False, True])
def test_operator(kernels: Kernels, place: Place, fp8: bool) -> None:
    """Schema, fake and compilation; the same input gives the same bits."""
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not fp8:  # which the check of the schema cannot compare
        checks.append("test_schema")
    operators = torch.ops.phi4rv_triton if kernels is triton else torch.ops.phi4rv_cuda
    D = NARROW[kernels]
    for name, inputs in (
        ("decode_attention", packed(place, [130], 1, 1, D, fp8=fp8)),
        ("paged_decode_attention", paged(place, [130], 1, 1, D, 16, fp8=fp8)),
    ):
        function = getattr(kernels, name)
        torch.library.opcheck(getattr(operators, name).default, inputs, test_utils=checks)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        once = function(*inputs)
        assert torch.equal(compiled(*inputs), once)
        assert torch.equal(function(*inputs), once)


@ANYWHERE
def test_there_is_no_gradient(kernels: Kernels, place: Place) -> None:
    q, *rest = packed(place, [30], 4, 2, NARROW[kernels])
    with pytest.raises(RuntimeError, match="no autograd formula"):
        kernels.decode_attention(q.requires_grad_(), *rest).sum().backward()


@_everywhere(PLACE[1:], CUDA_PLACE[1:])
def test_a_graph_replayed_while_documents_grow(kernels: Kernels, place: Place) -> None:
    """Captured on a side stream with empty slots, replayed with other lengths and pages."""
    q, k, v, table, lengths, *_ = paged(place, [700, 0, 80, 900], 40, 10, 128, 64)
    filled, grown = table.clamp(0, len(k) - 1), lengths.clone()
    k, v = k.nan_to_num(), v.nan_to_num()
    grown.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernels.paged_decode_attention(q, k, v, filled, grown)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = kernels.paged_decode_attention(q, k, v, filled, grown)
    for step in (lengths, lengths + 1, lengths * 0):
        grown.copy_(step)
        graph.replay()
        assert torch.equal(out, kernels.paged_decode_attention(q, k, v, filled, step))
        check_parity(lambda *x: out, reference.paged_decode_attention, (q, k, v, filled, step))


def test_wrong_arguments_of_triton_are_named() -> None:
    q, k, v, starts, lengths, *_ = packed(("cpu", torch.float32), [5, 6], 4, 2, 16)
    for inputs, message in (
        ((q.double(), k, v, starts, lengths), "q is torch.float64"),
        ((q[0], k, v, starts, lengths), "q has shape"),
        ((q, k[0], v, starts, lengths), "k has shape"),
        ((q, k.half(), v, starts, lengths), "both must be torch.float32"),
        ((q, k, v[:-1], starts, lengths), "v has shape"),
        ((q, k[..., :8], v[..., :8], starts, lengths), "k has head dim 8, q has 16"),
        ((q[:, :, :3], k, v, starts, lengths), "3 query heads"),
        ((q, k.mT.contiguous().mT, v, starts, lengths), "must be adjacent"),
        ((q, k, v, starts[:1], lengths), "starts is"),
        ((q, k, v, starts, lengths.float()), "lengths is torch.float32"),
        ((q, k, v, starts, lengths, torch.ones(3)), "k_scale must be"),
        ((q, k, v, starts, lengths, None, torch.ones(2).half()), "v_scale must be"),
    ):
        with pytest.raises(ValueError, match=f"^decode_attention: .*{message}"):
            triton.decode_attention(*inputs)
    with pytest.raises(ValueError, match="head dim 512"):
        wide = torch.ones(5, 1, 512)
        triton.decode_attention(wide[None, :1], wide, wide, starts[:1], lengths[:1])
    for table, message in ((starts, "page_table has shape"), (starts[None], "page_table is")):
        with pytest.raises(ValueError, match=f"^paged_decode_attention: {message}"):
            triton.paged_decode_attention(q, k[None], v[None], table, lengths)


@pytest.mark.parametrize(("kernels", "place"), [(cuda, ("cpu", torch.bfloat16))])
def test_wrong_arguments_of_cuda_are_named(kernels: Kernels, place: Place) -> None:
    q, k, v, starts, lengths, *_ = packed(place, [5, 6], 4, 2, 64)
    wide = torch.zeros(len(k), 2, 2, 66, dtype=place[1])[:, :, 0, :64]
    for inputs, message in (
        ((q.float(), k, v, starts, lengths), "q must be bfloat16 or float16"),
        ((q[0], k, v, starts, lengths), r"q must be \(documents, tokens, heads, head_dim\)"),
        ((q, k[0], v, starts, lengths), r"k must be \(rows, key heads, head_dim\)"),
        ((q, k.half(), v, starts, lengths), "k must have the dtype of q, or float8_e4m3fn"),
        ((q, k, v.to(FP8), starts, lengths), "v must have the dtype of k"),
        ((q, k, v[:-1], starts, lengths), "v must have the shape of k"),
        ((q, k[..., :32], v[..., :32], starts, lengths), "k must have k's dimensions and q's head_dim"),
        ((q[..., :32], k[..., :32], v[..., :32], starts, lengths), "head_dim is 32, must be 64, 72"),
        ((q[:, :, :3], k, v, starts, lengths), "q has 3 heads, must be a multiple of k's 2"),
        ((q, k.mT.contiguous().mT, v, starts, lengths), "k: channels must be adjacent"),
        ((q, wide, wide, starts, lengths), "k: heads and rows must lie multiples of 16 bytes apart"),
        ((q, k.flatten()[4:-124].view(-1, 2, 64), v[:-1], starts, lengths), "k must start at a multiple of 16 bytes"),
        ((q, k, v, starts[:1], lengths), "starts must be"),
        ((q, k, v, starts, lengths.float()), "lengths must be int32 or int64"),
        ((q, k, v, starts, lengths, torch.ones(3)), "k_scale must be float32, a scalar or one for each of 2 key heads"),
        ((q, k, v, starts, lengths, None, torch.ones(2).half()), "v_scale must be"),
    ):
        with pytest.raises(RuntimeError, match=f"decode_attention: {message}"):
            kernels.decode_attention(*inputs)
    for table, message in (
        (starts, r"page_table must be \(documents, most pages\)"),
        (starts[None], "page_table must be"),
    ):
        with pytest.raises(RuntimeError, match=f"decode_attention: {message}"):
            kernels.paged_decode_attention(q, k[None], v[None], table, lengths)
