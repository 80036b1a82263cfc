"""paged_prefill_attention against its definition."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_parity
from tests.kernels.test_decode_attention import SLACK, draw, paged
from triton_kernels import paged_prefill_attention as kernels
from triton_kernels.common.schedule import head_dim_case, schedule_tiles
from triton_kernels.paged_prefill_attention import paged_prefill_attention

Runs = list[tuple[int, int]]  # new tokens, rows of the cache with them
FP8 = torch.float8_e4m3fn
# None, one and more new tokens, whole prompts and prefixes.
RAGGED = [(40, 170), (0, 5), (1, 9), (0, 0), (33, 33), (1, 1)]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, float32 takes the other dtypes' tiles: fewer programs, and the tiles that matter."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels, "head_dim_case", lambda D, dtype: head_dim_case(D, torch.float16))


def offsets(runs: Runs, place: Place) -> Tensor:
    return torch.tensor([0, *accumulate(m for m, _ in runs)], dtype=torch.int32, device=place[0])


def inputs(place: Place, runs: Runs, H: int, G: int, D: int, size: int, fp8: bool = False) -> tuple[Any, ...]:
    """Pages in random order; rows past a document's end are NaN, entries of the table past it out of range."""
    _, k, v, table, lengths, *scales = paged(place, [n for _, n in runs], H, G, D, size, fp8=fp8)
    q = draw(place, sum(m for m, _ in runs), H + 2 * G, D)[:, :H]  # of a row of queries, keys and values
    return q, k, v, table, lengths, offsets(runs, place), max(m for m, _ in runs), *scales


def held(given: tuple[Any, ...]) -> None:
    check_parity(paged_prefill_attention, reference.paged_prefill_attention, given, slack=SLACK)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("D", "size"), [(64, 16), (72, 64), (80, 64), (128, 256)])
def test_ragged_runs(place: Place, fp8: bool, D: int, size: int) -> None:
    held(inputs(place, RAGGED if D == 64 else [(20, 150), (1, 9)], 4, 2, D, size, fp8))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("size", [1, 48, 64, 256])
def test_edges_of_pages_and_tiles(place: Place, size: int) -> None:
    """A tile is of 32 tokens, a block of 64 keys: runs, prefixes and documents one short of them, as long, one over."""
    held(inputs(place, [(31, 63), (32, 64), (33, 65), (32, 96), (1, 257)], 4, 1, 64, size))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(("H", "G"), [(2, 2), (5, 1), (12, 2), (40, 1)])
def test_groups_of_heads(place: Place, H: int, G: int) -> None:
    held(inputs(place, [(20, 30), (1, 5)], H, G, 16, 16))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("D", [1, 24, 200, 256])
def test_other_head_dims(place: Place, D: int) -> None:
    for fp8 in (False, True):
        held(inputs(place, [(70, 75)], 1, 1, D, 16, fp8))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fp8", [False, True])
def test_chunks_of_a_prompt_are_packed_attention_of_the_whole(place: Place, fp8: bool) -> None:
    """What the other definition gives for a prompt, in chunks and beside another document."""
    q, k, v, table, *_ = inputs(place, [(110, 110), (9, 9)], 4, 2, 64, 16, fp8)
    ends = [0, 37, 110]
    pages = table[0, :7].long()
    rows = [x[pages].flatten(0, 1)[:110].to(place[1]) for x in (k, v)]

    def chunks(q: Tensor, *rows: Tensor) -> Tensor:
        outs = []
        for first, last in pairwise(ends):
            new = torch.cat([q[first:last], q[:9]])
            held, offsets = torch.tensor([[last, 9, 0], [0, last - first, last - first + 9]], device=place[0])
            outs.append(paged_prefill_attention(new, k, v, table, held[:2], offsets.int(), last - first + 9)[:-9])
        return torch.cat(outs)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu_seqlens = torch.tensor([0, 110], dtype=torch.int32, device=place[0])
        return reference.packed_attention(q, k, v, cu_seqlens, 110, causal=True)

    check_parity(chunks, whole, (q[:110], *rows), slack=SLACK)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
@pytest.mark.parametrize("fp8", [False, True])
def test_extreme_values(place: Place, scale: float, fp8: bool) -> None:
    """All equal, nearly so, and one key that takes all: scores of 1e5 and, but for float8, of 1e8."""
    q, k, v, *rest = inputs(place, [(40, 70), (3, 3)], 2, 1, 72, 16, fp8)
    held((q.sign() * scale, k, v, *rest))  # products that float32 holds: no luck of rounding
    if fp8 and scale < 1:  # channels of one row 1e5 apart: more than float16's range
        held((torch.cat([q[..., :64] * scale, q[..., 64:].sign() * 100], -1), k, v, *rest))
    if not fp8:
        held((q * scale, k * scale, v * scale, *rest))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fp8", [False, True])
def test_scales(place: Place, fp8: bool) -> None:
    """One or one a head, of either sign, none at all; they go with any cache."""
    given = inputs(place, [(20, 70)], 4, 2, 72, 16, fp8)[:7]
    one, each = torch.tensor(-1.7, device=place[0]), torch.tensor([[0.0, -0.3], [-0.6, 0.1]], device=place[0]).T[0]
    for scales in ((one, each), (each, one), (each, None), (None, one)):
        held((*given, *scales))


@pytest.mark.parametrize("place", PLACE)
def test_a_thousand_documents_of_one_token(place: Place) -> None:
    """A softmax of one key is 1: the result is the value's own bits. Interpreted, twenty do."""
    B = 20 if place[0] == "cpu" else 1000
    k, v = draw(place, 2, B, 1, 1, 64)
    table = torch.randperm(B).to(place[0])[:, None]
    ends = torch.arange(B + 1, device=place[0], dtype=torch.int32)
    out = paged_prefill_attention(draw(place, B, 1, 64), k, v, table, torch.ones_like(table[:, 0]), ends, 1)
    assert torch.equal(out, v[table[:, 0], 0])


@pytest.mark.parametrize("place", PLACE)
def test_slots_without_a_document(place: Place) -> None:
    """Rows of a slot whose length is 0 are zeros, whatever its pages."""
    q, k, v, table, lengths, cu_seqlens, *rest = inputs(place, [(40, 40), (5, 70)], 2, 1, 64, 16)
    lengths[0] = 0
    out = paged_prefill_attention(q, k, v, table, lengths, cu_seqlens, *rest)
    assert torch.equal(out[:40], torch.zeros_like(out[:40]))
    held((q, k, v, table, lengths, cu_seqlens, *rest))


@pytest.mark.parametrize("place", PLACE)
def test_nothing(place: Place) -> None:
    """No document, no token, no page."""
    cache = draw(place, 1, 16, 2, 64)
    for B, T in ((0, 0), (2, 0), (2, 3)):
        q, zeros = draw(place, T, 4, 64), torch.zeros(B, dtype=torch.int32, device=place[0])
        cu_seqlens = torch.tensor([0, 0, T][-B - 1 :], dtype=torch.int32, device=place[0])
        out = paged_prefill_attention(q, cache, cache, zeros.new_zeros(B, 0), zeros, cu_seqlens, T)
        assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("place", PLACE)
def test_strided_inputs(place: Place) -> None:
    """Keys and values side by side in a page, queries with channels, heads and rows apart, columns of tables."""
    D, runs = 24, [(9, 25), (6, 26)]
    both = draw(place, 9, 10, 2, 2, D + 24)
    k, v = both[:, :, 0, :, 8 : D + 8], both[:, :, 1, :, 8 : D + 8]
    table = torch.tensor([[3, 1, 8, 0], [2, 5, 7, 0]], dtype=torch.int32, device=place[0])
    lengths, ends = torch.tensor([[25, 26, -1], [0, 9, 15]], dtype=torch.int32, device=place[0]).T.contiguous().T
    for q in (draw(place, D, 4, 15).permute(2, 1, 0), draw(place, 4, 15, D).transpose(0, 1)):
        for given in (table[:, :3], table.T.contiguous().T):
            held((q, k, v, given, lengths[:2], ends, max(m for m, _ in runs)))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(("size", "length"), [(2, 20), (128, 100)])
def test_a_cache_of_more_than_2_to_the_31_elements(
    place: Place, size: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages far apart, and rows of one page; on a CPU, memory that nothing touches costs nothing."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows, wide = 128, 2**31 // 50
    storage = torch.empty(rows * wide, device=place[0], dtype=place[1])
    pages = storage.as_strided((rows // size, size, 1, 16), (size * wide, wide, 16, 1))
    table = torch.arange(rows // size - 1, -1, -1, dtype=torch.int32, device=place[0])[None]
    for i in range(length):
        pages[table[0, i // size], i % size] = draw(place, 1, 16)
    lengths = torch.tensor([length], device=place[0])
    held((draw(place, 6, 2, 16), pages, pages, table, lengths, offsets([(6, length)], place), 6))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("fp8", [False, True])
def test_every_configuration(place: Place, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = set()
    for name, configs in kernels.FORWARD.cases.items():
        kind, _, eight = name.partition(" of ")
        if bool(eight) != fp8:
            continue
        monkeypatch.setattr(kernels, "head_dim_case", lambda D, dtype, kind=kind: kind)
        for config in configs:
            sizes = (config["BLOCK_M"], config["BLOCK_N"])
            if place[0] == "cpu" and sizes in tried:  # the interpreter knows neither warps nor stages
                continue
            tried.add(sizes)
            with kernels.FORWARD.forced(config):
                held(inputs(place, [(66, 130)], 2, 1, int(kind) if kind.isdigit() else 20, 64, fp8))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(
    "runs", [RAGGED, [(16, 32 * i) for i in range(1, 12)], [(1, 1)] * 600 + [(40, 90)], [(0, 9)], []]
)
def test_tiles_with_prefixes(place: Place, runs: Runs) -> None:
    """Every tile once, those of the most keys first."""
    lengths = torch.tensor([n for _, n in runs], dtype=torch.int64, device=place[0])
    T, longest, most = sum(m for m, _ in runs), *(max((run[i] for run in runs), default=0) for i in (0, 1))
    tiles = schedule_tiles(offsets(runs, place), T, longest, 16, True, lengths=lengths, max_length=most).tolist()
    real = [(document, block) for document, block in tiles if document >= 0]
    assert tiles[: len(real)] == [list(tile) for tile in real]  # what is unused comes last
    assert sorted(real) == [(d, block) for d, (m, _) in enumerate(runs) for block in range(-(-m // 16))]
    costs = [(runs[d][1] - runs[d][0]) // 16 + block for d, block in real]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("fp8", [False, True])
def test_operator(place: Place, fp8: bool) -> None:
    """Schema, fake and compilation; the same input gives the same bits."""
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not fp8:  # which the check of the schema cannot compare
        checks.append("test_schema")
    given = inputs(place, [(5, 30)], 2, 1, 16, 16, fp8)
    torch.library.opcheck(torch.ops.phi4rv_triton.paged_prefill_attention.default, given, test_utils=checks)
    compiled = torch.compile(paged_prefill_attention, backend="aot_eager", fullgraph=True)
    once = paged_prefill_attention(*given)
    assert torch.equal(compiled(*given), once)
    assert torch.equal(paged_prefill_attention(*given), once)


@pytest.mark.parametrize("place", PLACE)
def test_there_is_no_gradient(place: Place) -> None:
    q, *rest = inputs(place, [(5, 30)], 2, 1, 16, 16)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        paged_prefill_attention(q.requires_grad_(), *rest).sum().backward()


def test_wrong_arguments_are_named() -> None:
    q, k, v, table, lengths, ends, longest, *_ = inputs(("cpu", torch.float32), [(5, 30), (3, 3)], 4, 2, 16, 16)
    for given, message in (
        ((q.double(), k, v, table, lengths, ends), "q is torch.float64"),
        ((q[0], k, v, table, lengths, ends), "q has shape"),
        ((q, k[0], v, table, lengths, ends), "k has shape"),
        ((q, k[:, :0], v[:, :0], table, lengths, ends), "k has shape .*: a page must hold a row"),
        ((q, k.half(), v, table, lengths, ends), "both must be torch.float32"),
        ((q, k, v[:-1], table, lengths, ends), "v has shape"),
        ((q, k[..., :8], v[..., :8], table, lengths, ends), "k has head dim 8, q has 16"),
        ((q[:, :3], k, v, table, lengths, ends), "3 query heads"),
        ((q, k.mT.contiguous().mT, v, table, lengths, ends), "must be adjacent"),
        ((q, k, v, table[0], lengths, ends), "page_table has shape"),
        ((q, k, v, table.float(), lengths, ends), "page_table is torch.float32"),
        ((q, k, v, table, lengths[:1], ends), "lengths is"),
        ((q, k, v, table, lengths, ends.long()), "cu_seqlens is torch.int64"),
        ((q, k, v, table, lengths, ends[1:]), "cu_seqlens is"),
    ):
        with pytest.raises(ValueError, match=f"^paged_prefill_attention: .*{message}"):
            paged_prefill_attention(*given, longest)
    with pytest.raises(ValueError, match="k_scale must be"):
        paged_prefill_attention(q, k, v, table, lengths, ends, longest, torch.ones(3))


@pytest.mark.parametrize("place", PLACES[2:])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize(
    "runs",
    [[(2048, 16384)], [(4096, 4096)], [(300, 5000), (1, 9000), (0, 77), (1023, 1023), (64, 64)], [(9, 90)] * 300],
)
def test_real_shapes(place: Place, fp8: bool, size: int, runs: Runs) -> None:
    # Exact scores in float64 take gigabytes: one group of heads stands for all, and the whole decoder's the short runs.
    heads = (40, 10) if max(n for _, n in runs) < 1000 else (4, 1)
    held(inputs(place, runs, *heads, 128, size, fp8))


@pytest.mark.parametrize("place", PLACES[2:])
def test_a_graph_replayed_for_other_chunks(place: Place) -> None:
    """A captured launch follows what lengths, offsets and pages hold at replay."""
    q, k, v, table, lengths, cu_seqlens, longest, *_ = inputs(place, [(500, 900), (100, 100), (0, 60)], 40, 10, 128, 64)
    k, v, table = k.nan_to_num(), v.nan_to_num(), table.clamp(0, len(k) - 1)
    paged_prefill_attention(q, k, v, table, lengths, cu_seqlens, longest)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_prefill_attention(q, k, v, table, lengths, cu_seqlens, longest)
    for runs in ([(500, 900), (100, 100), (0, 60)], [(1, 1), (500, 500), (99, 700)], [(300, 0), (300, 300), (0, 0)]):
        lengths.copy_(torch.tensor([n for _, n in runs]))
        cu_seqlens.copy_(offsets(runs, place))
        table.copy_(table[[1, 2, 0]])
        graph.replay()
        assert torch.equal(out, paged_prefill_attention(q, k, v, table, lengths, cu_seqlens, longest))
        check_parity(lambda *x: out, reference.paged_prefill_attention, (q, k, v, table, lengths, cu_seqlens, longest))
