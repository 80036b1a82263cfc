"""linear_cross_entropy against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from tests.kernels.check import PLACE, PLACES, Place, check_close, check_parity, draw
from triton_kernels import linear_cross_entropy as module
from triton_kernels import linear_cross_entropy_kernels as kernels
from triton_kernels.linear_cross_entropy import linear_cross_entropy

SPACES = {s.name.split(".")[1]: s for s in (kernels.FORWARD, kernels.LOGITS, kernels.WEIGHT, kernels.HIDDEN)}
REAL = 8192, 5120, 200064


def targets(place: Place, T: int, V: int, share: float = 1.0) -> Tensor:
    labelled = torch.rand(T) < share
    return torch.where(labelled, torch.randint(V, (T,)), reference.NO_LABEL).to(place[0])


def inputs(place: Place, T: int, C: int, V: int, share: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    return draw(place, T, C), draw(place, V, C, scale=C**-0.5), targets(place, T, V, share)


def both(*arguments: Any, gradients: bool = True) -> None:
    check_parity(linear_cross_entropy, reference.linear_cross_entropy, arguments, gradients)


def gradients(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, *rest)[0], (hidden, weight))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs are slow to start, and with two each walks over several tiles."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(module, "num_sms", lambda device: 2)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 256 columns, so that small vocabularies have several."""
    monkeypatch.setattr(module, "CHUNK", 256)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1, 5, 1), (3, 16, 7), (70, 33, 1000), (0, 16, 7)])
def test_parity(place: Place, shape: tuple[int, int, int]) -> None:
    both(*inputs(place, *shape))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_sum_over_marked_rows(place: Place, share: float) -> None:
    hidden, weight, labels = inputs(place, 70, 33, 300, share)
    marked = torch.arange(70, device=labels.device) % 3 == 0
    ours = linear_cross_entropy(hidden, weight, labels, marked=marked)
    theirs = reference.linear_cross_entropy(hidden.float(), weight.float(), labels, marked=marked)
    assert torch.equal(ours[0], linear_cross_entropy(hidden, weight, labels)[0])
    torch.testing.assert_close(ours[2], theirs[2], rtol=2e-3, atol=0)
    nothing = linear_cross_entropy(hidden[:0], weight, labels[:0], marked=marked[:0])
    assert float(nothing[2]) == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_several_chunks(place: Place, share: float, narrow: None) -> None:
    """With few labels chunks are wider, and the last launches find nothing left."""
    both(*inputs(place, 300, 24, 600, share))


@pytest.mark.parametrize("place", PLACES[1:])
def test_chunks_add_up_without_rounding(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden gradient is rounded once and not once a chunk: nearly all its bits are those of a single chunk."""
    arguments = inputs(place, 4, 32, 1280, 1.0)
    once = gradients(*arguments)
    monkeypatch.setattr(module, "CHUNK", 256)
    chunked = gradients(*arguments)
    assert (chunked[0] != once[0]).float().mean() < 0.1
    assert torch.equal(chunked[1], once[1])


@pytest.mark.parametrize("place", [PLACES[1], PLACES[3]])
def test_many_tiles(place: Place) -> None:
    both(*inputs(place, 20, 70, 2500))


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES[2:])
@pytest.mark.parametrize("labelled", [0, 1, 1638, 8192])
def test_real_shape(place: Place, labelled: int) -> None:
    """The reference in float64 would take 13 GB for the logits alone: it goes over the rows in parts."""
    hidden, weight, _ = inputs(place, *REAL)
    labels = torch.full((REAL[0],), reference.NO_LABEL)
    labels[torch.randperm(REAL[0])[:labelled]] = torch.randint(REAL[2], (labelled,))
    labels = labels.to(place[0])
    exact, plain = (in_parts(hidden, weight, labels, dtype) for dtype in (torch.float64, hidden.dtype))
    total, count = linear_cross_entropy(hidden, weight, labels)
    assert count.item() == labelled
    ours = (total.detach(), *torch.autograd.grad(total, (hidden, weight)))
    # The parts' own sums of the weight's gradient are in float64 and float32, so that only products are rounded.
    for name, own, other, true in zip(("sum", "hidden", "weight"), ours, plain, exact, strict=True):
        check_close(own[: len(true)] if own.ndim else own, other, true, name)


def in_parts(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and gradients in ``dtype``, 512 rows at a time; the weight's gradient of the first 4096 words only."""
    words = 4096
    w, total = weight.detach().to(dtype), torch.zeros((), dtype=torch.float64, device=weight.device)
    dhidden = torch.zeros_like(hidden, dtype=dtype)
    dweight = torch.zeros_like(w[:words], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for start in range(0, len(hidden), 512):
        part = slice(start, start + 512)
        rows = (labels[part] != reference.NO_LABEL).nonzero().squeeze(1)
        h = hidden.detach()[part][rows].to(dtype)
        logits = h @ w.T
        logits = logits if dtype == torch.float64 else logits.float()
        p = logits.softmax(-1)
        picked = labels[part][rows, None]
        total += (logits.logsumexp(-1) - logits.gather(1, picked).squeeze(1)).double().sum()
        p.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=p.dtype))
        p = p.to(dtype)
        dhidden[part][rows] = p @ w
        dweight += (p[:, :words].T @ h).to(dweight.dtype)
    return total, dhidden, dweight


@pytest.mark.parametrize("place", PLACES)
def test_labels_at_the_edges_of_tiles(place: Place) -> None:
    edges = torch.tensor([0, 1, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512])
    hidden, weight, _ = inputs(place, len(edges), 16, 513)
    both(hidden, weight, edges.to(place[0]))


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("labelled", [0, 1, 63, 64, 65, 128, 256])
def test_counts_at_the_edges_of_tiles(place: Place, labelled: int) -> None:
    """None, one, all: in rows from the last on, so that the packed rows are not the first ones."""
    hidden, weight, labels = inputs(place, 256, 8, 40, 1.0)
    labels[: 256 - labelled] = reference.NO_LABEL
    both(hidden, weight, labels)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_values(place: Place, scale: float) -> None:
    """All logits equal, nearly so, and one probability of 1 (or several, in float16)."""
    _, weight, labels = inputs(place, 9, 16, 300)
    both(draw(place, 9, 16, scale=scale), weight, labels)


@pytest.mark.parametrize("place", PLACE)
def test_unlabelled_rows_are_never_read(place: Place) -> None:
    hidden, weight, labels = inputs(place, 40, 16, 300, 0.5)
    labels[0] = reference.NO_LABEL  # no index may fall back on row 0
    with torch.no_grad():
        hidden[labels == reference.NO_LABEL] = float("nan")
    dhidden, dweight = gradients(hidden, weight, labels)
    assert not dhidden[labels == reference.NO_LABEL].any()
    rows = labels != reference.NO_LABEL
    few = hidden.detach()[rows].requires_grad_()
    expected = gradients(few, weight, labels[rows])
    assert torch.equal(dhidden[rows], expected[0]) and torch.equal(dweight, expected[1])
    ours, theirs = (linear_cross_entropy(*x)[0] for x in ((hidden, weight, labels), (few, weight, labels[rows])))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", PLACE)
def test_nan_in_a_labelled_row_shows(place: Place) -> None:
    hidden, weight, labels = inputs(place, 5, 16, 300, 1.0)
    with torch.no_grad():
        hidden[3, 2] = float("nan")
    dhidden, dweight = gradients(hidden, weight, labels)
    assert linear_cross_entropy(hidden, weight, labels)[0].isnan() and dweight.isnan().all()
    assert dhidden.isnan().all(1).tolist() == [False, False, False, True, False] and not dhidden[:3].isnan().any()


@pytest.mark.parametrize("place", PLACE)
def test_a_target_outside_the_vocabulary(place: Place) -> None:
    hidden, weight, labels = inputs(place, 5, 16, 300, 1.0)
    for wrong in (300, 2**40, -1):
        labels[2] = wrong
        total, count = linear_cross_entropy(hidden, weight, labels)
        assert total.isnan() and count.item() == 5
        assert not gradients(hidden, weight, labels)[0].isnan().any()


@pytest.mark.parametrize("place", PLACE)
def test_strided_inputs(place: Place) -> None:
    """Windows of wider rows, transposed, every other label."""
    hidden, weight, labels = draw(place, 7, 60), draw(place, 16, 300, scale=0.3), targets(place, 14, 300)[::2]
    both(hidden[:, 30:46].detach().requires_grad_(), weight.T.detach().requires_grad_(), labels)
    hidden, weight = draw(place, 16, 7), draw(place, 300, 40)
    both(hidden.T.detach().requires_grad_(), weight[:, 8:24].detach().requires_grad_(), labels)


def test_rows_further_apart_than_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    lazy = torch.empty(2**31 + 64, dtype=torch.float16)
    for which in (0, 1):
        pair = [torch.randn(3, 16).half().requires_grad_(), torch.randn(3, 16).half().requires_grad_()]
        pair[which] = lazy.as_strided((3, 16), (2**30 + 8, 1)).normal_().requires_grad_()
        both(*pair, torch.tensor([2, -100, 0]))


@pytest.mark.gpu
def test_weight_of_more_elements_than_32_bits() -> None:
    place = PLACES[2].values[0]
    V, C, last = 450_000, 5120, 1000
    hidden, weight, labels = draw(place, 64, C), draw(place, V, C, scale=C**-0.5), targets(place, 64, V)
    weight.requires_grad_(False)
    both(hidden, weight, labels)
    tails = []
    for dtype in (torch.float64, torch.bfloat16):
        h, w = hidden.detach()[labels >= 0].to(dtype), weight.to(dtype)
        p = (h @ w.T).to(torch.float64 if dtype == torch.float64 else torch.float32).softmax(-1)
        p.scatter_add_(1, labels[labels >= 0, None], p.new_full((len(h), 1), -1.0))
        tails.append(p[:, -last:].to(dtype).T @ h)
    ours = gradients(hidden, weight.requires_grad_(), labels)[1]
    check_close(ours[-last:], tails[1], tails[0])


@pytest.mark.parametrize("place", PLACE)
def test_only_wanted_gradients_are_computed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(place, 5, 16, 300)
    expected = gradients(hidden, weight, labels)
    for x, other, skipped, true in (
        (hidden, weight, "weight_gradient", expected[0]),
        (weight, hidden, "hidden_gradient", expected[1]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, skipped, None)
            other.requires_grad_(False)
            total = linear_cross_entropy(hidden, weight, labels)[0]
            assert torch.equal(torch.autograd.grad(total, x)[0], true)
            other.requires_grad_()


@pytest.mark.parametrize("place", PLACES)
def test_filter(place: Place, narrow: None) -> None:
    both(*inputs(place, 30, 16, 400), 0.003)


def test_filter_by_hand() -> None:
    """The definition of filtering itself, spelt out in float64."""
    hidden, weight, labels = inputs(PLACES[0].values[0], 9, 4, 20, 1.0)
    hidden, weight = hidden.detach().double(), weight.detach().double()
    p = (hidden @ weight.T).softmax(-1)
    onehot = torch.nn.functional.one_hot(labels, 20)
    g = torch.where((p >= 0.04) | (onehot == 1), p - onehot, 0.0)
    assert (g == 0).any() and (g > 0).any() and (p[onehot == 1] < 0.04).any()
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = torch.autograd.grad(reference.linear_cross_entropy(*leaves, labels, 0.04)[0], leaves)
    torch.testing.assert_close(found, (g @ weight, g.T @ hidden))


@pytest.mark.parametrize("place", PLACE)
def test_operator(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    arguments = inputs(place, 5, 16, 300)
    torch.library.opcheck(module.forward, (*arguments, 0.0))
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    total, count = compiled(*arguments)
    assert torch.equal(total, linear_cross_entropy(*arguments)[0]) and count == (arguments[2] != -100).sum()
    ours = torch.autograd.grad(total, arguments[:2])
    for own, other in zip(ours, gradients(*arguments), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kernel", SPACES)
def test_every_configuration(place: Place, kernel: str) -> None:
    space = SPACES[kernel]
    for config in space.cases["float32" if place[1] == torch.float32 else "short"]:
        with space.forced(config):
            both(*inputs(place, 70, 72, 300, 0.95), gradients=kernel != "forward")


@pytest.mark.parametrize("case", ["short", "float32"])
def test_tiles_fit_the_buffer_between_them(case: str) -> None:
    for config in kernels.LOGITS.cases[case]:
        assert kernels.ALIGN % config["BLOCK_M"] == 0 and kernels.ALIGN % config["BLOCK_N"] == 0
        for reader in (*kernels.WEIGHT.cases[case], *kernels.HIDDEN.cases[case]):
            assert config["BLOCK_M"] % reader["BLOCK_K"] == 0 and config["BLOCK_N"] % reader["BLOCK_K"] == 0
            assert kernels.ALIGN % reader["BLOCK_M"] == 0


@pytest.mark.parametrize("place", PLACE)
def test_same_bits_every_time(place: Place) -> None:
    T, C, V = (40, 16, 300) if place[0] == "cpu" else REAL
    arguments = inputs(place, T, C, V)
    first, second = ((linear_cross_entropy(*arguments)[0], *gradients(*arguments)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("T", [8192, 16384])
def test_memory_is_under_a_twentieth_of_the_logits(T: int) -> None:
    _, C, V = REAL
    share = module.workspace_bytes(T, C, V) / (T * V * 2)
    assert 0.04 < share < 0.05


@pytest.mark.gpu
def test_memory_is_what_the_formula_says() -> None:
    hidden, weight, labels = inputs(PLACES[2].values[0], *REAL)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = gradients(hidden, weight, labels)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in found)
    assert extra <= module.workspace_bytes(*REAL) * 1.01 + 2**20


@pytest.mark.gpu
def test_graph_capture_on_a_side_stream() -> None:
    """One graph serves any number of labels."""
    place = PLACES[2].values[0]
    hidden, weight, labels = inputs(place, 300, 64, 1000)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(hidden, weight, labels)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = gradients(hidden, weight, labels)
        for share in (0.0, 0.2, 1.0):
            labels.copy_(targets(place, 300, 1000, share))
            graph.replay()
            stream.synchronize()
            for own, other in zip(found, gradients(hidden, weight, labels), strict=True):
                assert torch.equal(own, other)


def test_wrong_arguments_are_named() -> None:
    hidden, weight, labels = inputs(PLACES[0].values[0], 4, 8, 10)
    for message, arguments in {
        "hidden has 3": (hidden[None], weight, labels),
        "hidden is torch.float64": (hidden.double(), weight, labels),
        "weight is": (hidden, weight[:, :7], labels),
        r"weight is .* torch.float16, must be \(vocabulary, 8\) torch.float32": (hidden, weight.half(), labels),
        "targets is": (hidden, weight, labels[:3]),
        r"must be \(4,\) torch.int64": (hidden, weight, labels.int()),
    }.items():
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
