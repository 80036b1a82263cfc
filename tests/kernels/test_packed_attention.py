"""packed_attention, of Triton, of csrc/ and of flash-attn, against its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from phi4rv.ops import cuda, flash_attn, reference
from tests.kernels.check import CUDA_PLACE, CUDA_PLACES, PLACE, PLACES, Place, check_close, check_parity
from triton_kernels import packed_attention as kernels
from triton_kernels import packed_attention_backward as backward_kernels
from triton_kernels.common.schedule import head_dim_case, schedule_tiles
from triton_kernels.common.tuning import SearchSpace
from triton_kernels.packed_attention import packed_attention

SPACES = (kernels.FORWARD, backward_kernels.DQ, backward_kernels.DKDV)
EDGES = [1, 15, 16, 17, 63, 64, 65]
WIDE_EDGES = [127, 128, 129, 256]
Attention = Callable[..., Tensor]


def rows(triton: list[Any], csrc: list[Any]) -> list[Any]:
    """(kind, place): every implementation where it can run."""
    kinds = {"triton": triton, "cuda": csrc, "flash_attn": [place for place in triton if place.marks]}
    return [
        pytest.param(kind, *place.values, id=f"{kind}-{place.id}", marks=place.marks)
        for kind, places in kinds.items()
        for place in places
    ]


ROWS, ROW = rows(PLACES, CUDA_PLACES), rows(PLACE, CUDA_PLACE)
OURS = [row for row in ROW if row.values[0] != "flash_attn"]


def offsets(lengths: list[int], place: Place) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=place[0])


def draw(place: Place, lengths: list[int], H: int, G: int, D: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    """q, k and v as views of one row, as the model has them."""
    device, dtype = place
    row = (scale * torch.randn(sum(lengths), H + 2 * G, D)).to(device, dtype)
    q, k, v = (x.detach().requires_grad_() for x in row.split([H, G, G], 1))
    return q, k, v


def both(
    qkv: tuple[Tensor, ...],
    lengths: list[int],
    causal: bool,
    key_ends: Tensor | None = None,
    attention: Attention = packed_attention,
    gradients: bool = True,
) -> None:
    """float32 has four units of slack: weights are recomputed as 2^(score - lse), whose exponent is rounded at ±10."""
    slack = 4.0 if qkv[0].dtype == torch.float32 else 1.0
    cu_seqlens = offsets(lengths, (qkv[0].device.type, qkv[0].dtype))
    rest = cu_seqlens, max(lengths, default=0), causal, key_ends

    def run(function: Attention) -> Callable[..., Tensor]:
        return lambda q, k, v: function(q, k, v, *rest)

    check_parity(run(attention), run(reference.packed_attention), qkv, gradients, slack)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, float32 takes the other dtypes' tiles: fewer programs, and the tiles that matter."""
    if not torch.cuda.is_available():
        for module in (kernels, backward_kernels):
            monkeypatch.setattr(module, "head_dim_case", lambda D, dtype: head_dim_case(D, torch.float16))


@pytest.fixture
def attention(kind: str, place: Place, request: pytest.FixtureRequest) -> Attention:
    """The implementation of the row; skips those that are not there."""
    if kind == "triton":
        return packed_attention
    if kind == "cuda":
        request.getfixturevalue("csrc")
        return cuda.packed_attention
    reason = flash_attn.unavailable_reason(torch.device(place[0]))
    if reason:
        pytest.skip(reason)
    return flash_attn.packed_attention


@pytest.mark.parametrize(("kind", "place"), ROWS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "H", "G", "D"),
    [
        (EDGES, 1, 1, 64),
        (WIDE_EDGES, 1, 1, 72),
        ([66], 4, 2, 128),
        ([66], 5, 1, 8),
        ([100], 1, 1, 80),
        ([40], 1, 1, 20),
    ],
)
def test_parity(
    kind: str, place: Place, causal: bool, lengths: list[int], H: int, G: int, D: int, attention: Attention
) -> None:
    if kind == "cuda" and D not in cuda.HEAD_DIMS:
        pytest.skip(f"csrc/ has no head dim {D}")
    both(draw(place, lengths, H, G, D), lengths, causal, None, attention)


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "H", "G", "D"),
    [
        ([191, 192, 193, 383, 385], 2, 2, 72),  # its tiles are of 192 rows; more of them than multiprocessors
        ([191, 192, 193], 3, 1, 64),
        ([127, 128, 129, 255, 257], 2, 1, 80),
        ([*EDGES, *WIDE_EDGES], 4, 2, 128),  # blocks of two heads that share their keys
        ([300, 1, 130], 3, 1, 128),  # an odd number of heads to a key head: each by itself
    ],
)
def test_tiles_of_csrc(
    place: Place, causal: bool, lengths: list[int], H: int, G: int, D: int, csrc: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = draw(place, lengths, H, G, D)
    both(qkv, lengths, causal, None, cuda.packed_attention)
    # Scores whose largest come late: what has been summed shrinks at every block of keys.
    growing = torch.linspace(4, 0.1, sum(lengths), device=place[0]).to(place[1])[:, None, None]
    q, k, v = (x.detach() for x in qkv)
    both((q, k * growing, v), lengths, causal, None, cuda.packed_attention)


@pytest.mark.parametrize(("kind", "place"), ROW)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[0, 9, 0, 0, 3, 0], [0, 0], []])
def test_empty_documents(kind: str, place: Place, causal: bool, lengths: list[int], attention: Attention) -> None:
    both(draw(place, lengths, 1, 1, 64), lengths, causal, None, attention)


@pytest.mark.parametrize(("kind", "place"), OURS)
def test_a_thousand_documents(kind: str, place: Place, attention: Attention) -> None:
    """Of one token: it sees itself, and so its value is the output, and no score matters."""
    on_cpu = {"triton": 16, "cuda": 300}[kind]  # interpreted, a program takes 50 ms
    lengths = [1] * (on_cpu if place[0] == "cpu" else 1000)
    q, k, v = draw(place, lengths, 2, 1, 64)
    out = attention(q, k, v, offsets(lengths, place), 1, True)
    assert torch.equal(out, v.expand_as(out))
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    torch.testing.assert_close(dv, dout.sum(1, keepdim=True))
    for nothing in (dq, dk):
        torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "place"), ROWS)
@pytest.mark.parametrize("causal", [True, False])
def test_large_values(kind: str, place: Place, causal: bool, attention: Attention) -> None:
    """±1e4: scores up to 1e10, exact in float32, whose softmax is 1 or a tie. Gradients: with large values only, as the
    log-sum-exp of such scores, float32 in every flash implementation, has no bits left for their difference."""
    lengths = [150]
    q, k, v = draw(place, lengths, 1, 1, 72)
    large = tuple((1e4 * x.detach().sign()).requires_grad_() for x in (q, k, v))
    both(large, lengths, causal, None, attention, gradients=False)
    finite = place[1] != torch.float16  # gradients would be over 65504
    both((q, k, large[2]), lengths, causal, None, attention, finite)


@pytest.mark.parametrize(("kind", "place"), ROWS)
@pytest.mark.parametrize("value", [0.0, -1.0, 1e4])
def test_all_equal(kind: str, place: Place, value: float, attention: Attention) -> None:
    """Every score is the same: the output is the mean of the values, which are."""
    lengths = [70]
    q, k, v = (x.detach().fill_(value) for x in draw(place, lengths, 1, 1, 72))
    torch.testing.assert_close(attention(q, k, v, offsets(lengths, place), 70, False), v)


@pytest.mark.parametrize("place", PLACE)
def test_layouts(place: Place) -> None:
    """Adjacent tensors, transposed ones, and channels that are not next to each other."""
    lengths = [30]
    q, k, v = (x.detach() for x in draw(place, lengths, 4, 2, 16))
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k = k.contiguous()
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    both(tuple(x.requires_grad_() for x in (q, k, v)), lengths, True)


@pytest.mark.parametrize(("kind", "place"), OURS)
def test_rows_far_apart(kind: str, place: Place, attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows lie more than 2^31 elements from the first; only what is touched takes memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    T, H, D, stride = 40, 1, 64, 2**31 // 32
    q, k, v = (x.detach() for x in draw(place, [T], H, H, D))
    wide = torch.empty(T * stride, dtype=place[1], device=place[0])
    far = [wide.as_strided(q.shape, (stride, D, 1), offset) for offset in (0, 64, 128)]
    for x, y in zip(far, (q, k, v), strict=True):
        x.copy_(y)
    out = attention(*far, offsets([T], place), T, True)
    assert torch.equal(out, attention(q, k, v, offsets([T], place), T, True))


def extents(lengths: list[int], images: list[tuple[int, int]], place: Place) -> Tensor:
    """key_ends of a row with images at these rows."""
    ends = torch.arange(1, sum(lengths) + 1, dtype=torch.int32)
    for first, last in images:
        ends[first:last] = last
    return ends.to(place[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("lengths", "images"),
    [
        ([200], [(3, 190)]),
        ([70, 150], [(0, 70), (75, 80), (80, 219)]),
    ],
)
def test_images_see_themselves(place: Place, lengths: list[int], images: list[tuple[int, int]]) -> None:
    both(draw(place, lengths, 1, 1, 72), lengths, True, extents(lengths, images, place))


@pytest.mark.parametrize("place", PLACE)
def test_key_ends_stop_at_the_document(place: Place) -> None:
    """Extents past a document's end show nothing of the next; those before a row do not hide it from itself."""
    lengths = [30, 70]
    qkv = draw(place, lengths, 1, 1, 64)
    far = torch.full((100,), 1000, dtype=torch.int32, device=place[0])
    cu_seqlens = offsets(lengths, place)
    everything = packed_attention(*qkv, cu_seqlens, 70, False)
    assert torch.equal(packed_attention(*qkv, cu_seqlens, 70, True, far), everything)
    causal = packed_attention(*qkv, cu_seqlens, 70, True)
    assert torch.equal(packed_attention(*qkv, cu_seqlens, 70, True, torch.zeros_like(far)), causal)


@pytest.mark.parametrize(("kind", "place"), [row for row in ROWS if row.values[0] != "flash_attn"])
@pytest.mark.parametrize("causal", [True, False])
def test_log_sum_exp(kind: str, place: Place, causal: bool, attention: Attention) -> None:
    lengths = [70, 17, 200]
    q, k, v = (x.detach() for x in draw(place, lengths, 2, 1, 72))
    cu_seqlens = offsets(lengths, place)
    if kind == "cuda":
        lse = torch.ops.phi4rv_cuda.packed_attention(q, k, v, cu_seqlens, 200, causal)[1]
    else:
        lse = kernels.forward(q, k, v, cu_seqlens, 200, causal, None)[1]

    def exact(dtype: torch.dtype) -> Tensor:
        parts = []
        for qd, kd in zip(q.to(dtype).split(lengths), k.to(dtype).split(lengths), strict=True):
            s = torch.einsum("mhd,nhd->hmn", qd, kd.repeat_interleave(2, 1)) / math.sqrt(72)
            hidden = torch.ones_like(s, dtype=torch.bool).triu(1) & causal
            parts.append(s.masked_fill(hidden, -math.inf).logsumexp(-1))
        return torch.cat(parts, 1)

    assert lse.dtype == torch.float32
    check_close(lse, exact(torch.float32), exact(torch.float64), slack=4.0)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_every_configuration(place: Place, space: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = set()
    for name, configs in space.cases.items():
        for module in (kernels, backward_kernels):
            monkeypatch.setattr(module, "head_dim_case", lambda D, dtype, name=name: name)
        for config in configs:
            sizes = (config["BLOCK_M"], config["BLOCK_N"])
            if place[0] == "cpu" and sizes in tried:  # the interpreter knows neither warps nor stages
                continue
            tried.add(sizes)
            D = int(name) if name.isdigit() else 20
            with space.forced(config):
                both(draw(place, [150], 1, 1, D), [150], True)


@pytest.mark.parametrize("place", PLACE)
def test_operator(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    lengths = [9]
    q, k, v = draw(place, lengths, 2, 1, 16)
    cu_seqlens = offsets(lengths, place)
    ends = extents(lengths, [(2, 6)], place)
    torch.library.opcheck(kernels.forward, (q, k, v, cu_seqlens, 9, True, ends))
    out, lse = kernels.forward(q, k, v, cu_seqlens, 9, False, None)
    detached = [x.detach() for x in (out, q, k, v, out, lse)]
    torch.library.opcheck(backward_kernels.backward, (*detached, cu_seqlens, 9, False, None))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, cu_seqlens, 9, True, ends).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", CUDA_PLACE)
def test_operator_of_csrc(place: Place, csrc: None) -> None:
    lengths = [9, 140]
    q, k, v = (x.detach() for x in draw(place, lengths, 2, 1, 128))
    cu_seqlens = offsets(lengths, place)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.phi4rv_cuda.packed_attention.default, (q, k, v, cu_seqlens, 140, True), test_utils=tests
    )
    compiled = torch.compile(cuda.packed_attention, backend="aot_eager", fullgraph=True)
    expected = cuda.packed_attention(q, k, v, cu_seqlens, 140, True)
    assert torch.equal(compiled(q, k, v, cu_seqlens, 140, True), expected)


@pytest.mark.parametrize("place", CUDA_PLACE)
@pytest.mark.parametrize(("H", "G", "D", "causal"), [(4, 2, 128, True), (2, 2, 72, False)])
def test_neighbours_are_not_read(place: Place, H: int, G: int, D: int, causal: bool, csrc: None) -> None:
    """Between the rows and in the other document is NaN, or the largest number; neither shows. Same bits twice."""
    lengths = [150, 215]
    wide = torch.full((sum(lengths), H + 2 * G + 1, D), torch.nan, device=place[0], dtype=place[1])
    wide[:, : H + 2 * G] = torch.randn(sum(lengths), H + 2 * G, D).to(wide)
    q, k, v, _ = wide.split([H, G, G, 1], 1)
    cu_seqlens = offsets(lengths, place)
    both((q, k, v), lengths, causal, None, cuda.packed_attention)
    first = cuda.packed_attention(q, k, v, cu_seqlens, 215, causal)
    wide[150:, : H + 2 * G] = torch.finfo(wide.dtype).max
    second = cuda.packed_attention(q, k, v, cu_seqlens, 215, causal)
    assert torch.equal(first[:150], second[:150])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("lengths", [[3, 0, 64, 17, 200], [16] * 70, [1] * 1000, [1], [0], []])
def test_schedule(place: Place, lengths: list[int], causal: bool, reverse: bool) -> None:
    """Every tile once, dearest first."""
    tiles = schedule_tiles(offsets(lengths, place), sum(lengths), max(lengths, default=0), 16, causal, reverse).tolist()
    counts = [-(-n // 16) for n in lengths]
    real = [(document, block) for document, block in tiles if document >= 0]
    assert tiles[: len(real)] == [list(tile) for tile in real]  # what is unused comes last
    assert sorted(real) == [(document, block) for document, n in enumerate(counts) for block in range(n)]
    costs = [(counts[d] - b if reverse else b + 1) if causal else counts[d] for d, b in real]
    assert costs == sorted(costs, reverse=True)


def test_wrong_arguments_are_named() -> None:
    q, k, v = torch.ones(4, 2, 16), torch.ones(4, 1, 16), torch.ones(4, 1, 16)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    for message, arguments in {
        "k is torch.float16": (q, k.half(), v, cu_seqlens, 4, True),
        "q is torch.float64": (q.double(), k.double(), v.double(), cu_seqlens, 4, True),
        "no multiple of 3": (q, k.expand(4, 3, 16), v.expand(4, 3, 16), cu_seqlens, 4, True),
        "v \\(3, 1, 16\\), must be": (q, k, v[:3], cu_seqlens, 4, True),
        "head dim 300": (*(torch.ones(4, 1, 300),) * 3, cu_seqlens, 4, True),
        "cu_seqlens must be": (q, k, v, cu_seqlens.long(), 4, True),
        "key_ends are for causal": (q, k, v, cu_seqlens, 4, False, cu_seqlens),
        "key_ends must be": (q, k, v, cu_seqlens, 4, True, cu_seqlens),
    }.items():
        with pytest.raises(ValueError, match=message):
            packed_attention(*arguments)
    with pytest.raises(ValueError, match="key_ends are for causal"):
        reference.packed_attention(q, k, v, cu_seqlens, 4, False, torch.ones(4, dtype=torch.int32))


def test_wrong_arguments_of_csrc_are_named(csrc: None) -> None:
    q, ends = torch.zeros(4, 2, 72, dtype=torch.bfloat16), torch.tensor([0, 4], dtype=torch.int32)
    for message, arguments in {
        "q must be bfloat16 or float16": (q.float(), q, q, ends),
        "k must have the dtype of q": (q, q.half(), q, ends),
        "k must have q's tokens and head_dim": (q, q[:3], q, ends),
        "heads of a row must follow each other": (q[..., :40], q[..., :40], q[..., :40], ends),
        "those of k and v, which must be equal": (q, q, q[:, :1], ends),
        r"cu_seqlens must be \(documents \+ 1\) int32": (q, q, q, ends.long()),
        "head_dim is 96, must be 64, 72, 80 or 128": (*(q.new_zeros(4, 2, 96),) * 3, ends),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            cuda.packed_attention(*arguments, max_seqlen=4, causal=False)
    with pytest.raises(RuntimeError, match="max_seqlen is 0, must be the longest"):
        cuda.packed_attention(q, q, q, ends, 0, False)
    with pytest.raises(ValueError, match="has no key_ends"):
        cuda.packed_attention(q, q, q, ends, 4, True, ends)


def test_flash_attn_says_why_not() -> None:
    q = torch.ones(4, 1, 16)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    assert flash_attn.unavailable_reason(torch.device("cpu")) == "flash-attn needs CUDA"
    with pytest.raises(ValueError, match="no flash-attn for head dim 16 on cpu"):
        flash_attn.packed_attention(q, q, q, cu_seqlens, 4, True)
    with pytest.raises(ValueError, match="no key_ends"):
        flash_attn.packed_attention(q, q, q, cu_seqlens, 4, True, torch.ones(4, dtype=torch.int32))


ON_GPU = [row for row in ROWS if row.marks]
REAL = [
    ([16384], 40, 10, 128, True),
    ([9000, 1, 0, 383, 3000, 4000], 40, 10, 128, True),
    ([256, 1023, 3600, 2047], 16, 16, 72, False),
]


@pytest.mark.parametrize(("kind", "place"), ON_GPU)
@pytest.mark.parametrize(("lengths", "H", "G", "D", "causal"), REAL)
def test_real_shapes(
    kind: str, place: Place, lengths: list[int], H: int, G: int, D: int, causal: bool, attention: Attention
) -> None:
    # Exact scores of 16384 rows in float64 take 2 GB a head, so one group of heads stands for all.
    if max(lengths) > 3600:
        H, G = H // G, 1
    both(draw(place, lengths, H, G, D), lengths, causal, attention=attention)


@pytest.mark.parametrize(("kind", "place"), ON_GPU)
@pytest.mark.parametrize(("lengths", "H", "G", "D", "causal"), REAL)
def test_same_bits_twice(
    kind: str, place: Place, lengths: list[int], H: int, G: int, D: int, causal: bool, attention: Attention
) -> None:
    qkv = draw(place, lengths, H, G, D)
    first, second = (gradients(attention, qkv, offsets(lengths, place), max(lengths), causal) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def gradients(
    attention: Attention, qkv: tuple[Tensor, ...], cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> list[Tensor]:
    """The output and the gradients of its square."""
    out = attention(*qkv, cu_seqlens, max_seqlen, causal)
    return [out, *torch.autograd.grad(out.square().sum(), qkv)]


@pytest.mark.parametrize(("kind", "place"), [row for row in ON_GPU if row.values[0] != "flash_attn"])
def test_graph_and_stream(kind: str, place: Place, attention: Attention) -> None:
    """A captured launch follows what cu_seqlens holds at replay; and a stream of its own changes nothing."""
    qkv = draw(place, [600], 4, 2, 72)
    cu_seqlens = offsets([500, 100, 0], place)
    gradients(attention, qkv, cu_seqlens, 500, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(attention, qkv, cu_seqlens, 500, True)
    for lengths in ([500, 100, 0], [1, 99, 500], [0, 300, 300]):
        cu_seqlens.copy_(offsets(lengths, place))
        graph.replay()
        for ours, theirs in zip(captured, gradients(attention, qkv, cu_seqlens, 500, True), strict=True):
            assert torch.equal(ours, theirs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = gradients(attention, qkv, cu_seqlens, 500, True)
    side.synchronize()
    for ours, theirs in zip(aside, captured, strict=True):
        assert torch.equal(ours, theirs)
