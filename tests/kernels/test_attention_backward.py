"""The backward of csrc/'s packed attention: its gradients against the definition, its bits, its bounds, its code."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc import build
from phi4rv.ops import cuda, reference
from tests.kernels.check import CUDA_PLACE, CUDA_PLACES, Place, close, parity

EDGES = [1, 15, 16, 17, 63, 64, 65]
WIDE_EDGES = [127, 128, 129, 191, 192, 193]
GPU = [place for place in CUDA_PLACES if place.marks]


@pytest.fixture(autouse=True)
def kernels(csrc: None) -> None:
    """Every test here wants them loaded."""


def offsets(lengths: list[int], place: Place) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=place[0])


def draw(place: Place, lengths: list[int], H: int, G: int, D: int) -> tuple[Tensor, ...]:
    """q, k and v as views of one row, as the model has them."""
    row = torch.randn(sum(lengths), H + 2 * G, D).to(place[1]).to(place[0])
    q, k, v = (x.detach().requires_grad_() for x in row.split([H, G, G], 1))
    return q, k, v


def both(qkv: tuple[Tensor, ...], lengths: list[int], causal: bool) -> None:
    """Parity, its autograd's gradients included."""
    rest = offsets(lengths, (qkv[0].device.type, qkv[0].dtype)), max(lengths, default=0), causal
    parity(
        lambda q, k, v: cuda.packed_attention(q, k, v, *rest),
        lambda q, k, v: reference.packed_attention(q, k, v, *rest),
        qkv,
    )


def arguments(place: Place, lengths: list[int], H: int, G: int, D: int, causal: bool) -> tuple[Any, ...]:
    """Of the backward operator: what its forward gives, and a random gradient."""
    q, k, v = (x.detach() for x in draw(place, lengths, H, G, D))
    rest = offsets(lengths, place), max(lengths), causal
    out, lse = torch.ops.phi4rv_cuda.packed_attention(q, k, v, *rest)
    return torch.randn(q.shape).to(out), q, k, v, out, lse, *rest


def backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cuda.packed_attention_backward(*given)


def equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "H", "G", "D"),
    [
        (EDGES, 2, 2, 64),
        (EDGES, 4, 2, 72),
        (WIDE_EDGES, 1, 1, 72),
        ([257, 66], 2, 1, 80),
        (EDGES, 4, 1, 128),
        (WIDE_EDGES, 1, 1, 128),
    ],
)
def test_parity(place: Place, causal: bool, lengths: list[int], H: int, G: int, D: int) -> None:
    both(draw(place, lengths, H, G, D), lengths, causal)


@pytest.mark.parametrize("place", CUDA_PLACE)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [72, 128])
@pytest.mark.parametrize("lengths", [[0, 9, 0, 0, 70, 0], [0, 0], []])
def test_empty_documents(place: Place, causal: bool, D: int, lengths: list[int]) -> None:
    both(draw(place, lengths, 2, 1, D), lengths, causal)


@pytest.mark.parametrize("place", CUDA_PLACE)
@pytest.mark.parametrize("D", [72, 128])
def test_documents_of_one_row(place: Place, D: int) -> None:
    """Each sees itself: its value is the output, and no score matters."""
    dout, *rest = arguments(place, [1] * (12 if place[0] == "cpu" else 1000), 2, 1, D, True)
    dq, dk, dv = backward(dout, *rest)
    torch.testing.assert_close(dv, dout.sum(1, keepdim=True))
    for nothing in (dq, dk):
        torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", CUDA_PLACE)
@pytest.mark.parametrize("D", [72, 128])
def test_layouts_of_the_gradient(place: Place, D: int) -> None:
    """Rows apart are read in place, what the copy engine cannot read is copied; the bits are the same."""
    given = arguments(place, [30, 100], 2, 2, D, True)
    dout, rest = given[0], given[1:]
    expected = backward(*given)
    wide = dout.new_full((130, 4 * D), float("nan"))
    wide[:, D : 3 * D] = dout.flatten(1)
    equal(backward(wide[:, D : 3 * D].unflatten(1, (2, D)), *rest), expected)
    for other in (dout.transpose(0, 1).contiguous().transpose(0, 1), dout.transpose(1, 2).contiguous().transpose(1, 2)):
        equal(backward(other, *rest), expected)
    with pytest.raises(RuntimeError, match="dout: the heads of a row must follow each other"):
        torch.ops.phi4rv_cuda.packed_attention_backward(dout.transpose(0, 1).contiguous().transpose(0, 1), *rest)


@pytest.mark.parametrize("place", CUDA_PLACE)
def test_one_gradient_for_all_rows(place: Place) -> None:
    """The gradient of a sum is an expanded scalar, that of a sum of rows a row."""
    q, k, v = draw(place, [70], 2, 1, 64)
    out = cuda.packed_attention(q, k, v, offsets([70], place), 70, True)
    ours = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    equal(ours, torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True))
    row = torch.randn(2, 64).to(out)
    ours = torch.autograd.grad((out.sum(0) * row).sum(), (q, k, v), retain_graph=True)
    equal(ours, torch.autograd.grad(out, (q, k, v), row.expand_as(out).contiguous()))


@pytest.mark.parametrize("place", CUDA_PLACE)
def test_rows_far_apart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows lie more than 2^31 elements from the first; only what is touched takes memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    T, D, stride = 40, 64, 2**31 // 32
    dout, q, k, v, *rest = arguments(place, [T], 1, 1, D, True)
    expected = backward(dout, q, k, v, *rest)
    wide = torch.empty(T * stride, dtype=place[1], device=place[0])
    far = [wide.as_strided(q.shape, (stride, D, 1), offset) for offset in (0, 64, 128, 192)]
    for x, y in zip(far, (dout, q, k, v), strict=True):
        x.copy_(y)
    equal(backward(*far, *rest), expected)


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D", [72, 128])
@pytest.mark.parametrize("huge", ["value", "key"])
def test_what_nobody_attends_to(place: Place, causal: bool, D: int, huge: str) -> None:
    """A row of values, or a channel of keys, 2^10 times the others, that loosens dq's bound and has no weight in dq."""
    lengths = [200, 40]
    q, k, v = (x.detach().clone() for x in draw(place, lengths, 2, 1, D))
    q[..., :8] = q[..., :8].abs() + 1
    k[3] = 0
    k[3, :, :8] = -1024 if huge == "key" else -16  # whose scores are under -20 for all rows of its document
    v[3] *= 1024 if huge == "value" else 1
    both(tuple(x.requires_grad_() for x in (q, k, v)), lengths, causal)


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("D", [72, 128])
def test_the_bound_is_reached(place: Place, D: int) -> None:
    """Half of the keys and values are the others' negatives and dout is a value: dq is as large as it can be."""
    lengths = [200, 2]
    sign = torch.ones(202, 1, 1)
    sign[::2] = -1
    u, c = torch.randint(-8, 9, (2, D)) / 4
    dout, v, k = u.expand(202, 2, D), sign * u, sign * c
    dout, v, k = (x.to(place[1]).to(place[0]) for x in (dout.contiguous(), v.contiguous(), k.contiguous()))
    q, rest = torch.zeros_like(dout), (offsets(lengths, place), 200, False)
    dq = backward(dout, q, k, v, *torch.ops.phi4rv_cuda.packed_attention(q, k, v, *rest), *rest)[0]
    expected = (c * u.square().sum() / D**0.5).expand_as(dq).to(dq)
    torch.testing.assert_close(dq, expected, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("causal", [True, False])
def test_small_gradients_of_long_documents(place: Place, causal: bool) -> None:
    """|dq| falls with the document's length, its bound does not: each row is held to its own size here."""
    lengths = [800]
    dout, q, k, v, out, lse, *rest = arguments(place, lengths, 1, 1, 64, causal)
    ours = backward(dout, q, k, v, out, lse, *rest)[0]

    def exact(dtype: torch.dtype) -> Tensor:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        result = reference.packed_attention(*leaves, *rest)
        return torch.autograd.grad(result, leaves[0], dout.to(dtype))[0]

    for rows in (slice(100, 300), slice(600, 800)):
        close(ours[rows], exact(place[1])[rows], exact(torch.float64)[rows])


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-12, 2.0**7])
def test_gradient_of_any_size(place: Place, scale: float) -> None:
    """dq is of a unit that follows the gradient: its bits are those of a gradient of size 1, shifted."""
    dout, *rest = arguments(place, [70], 2, 1, 72, False)
    dout = (dout * 2**-4).bfloat16().to(dout)  # all bits of the scaled one remain in float16
    if place[1] == torch.float16 and scale < 2**-12:
        pytest.skip("float16 has no such numbers")
    for ours, one in zip(backward(dout * scale, *rest), backward(dout, *rest), strict=True):
        torch.testing.assert_close(ours.double() / scale, one.double(), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("place", CUDA_PLACE)
def test_zeros(place: Place) -> None:
    for zero in range(4):
        given = [x.clone() if isinstance(x, Tensor) else x for x in arguments(place, [70, 9], 2, 1, 72, True)]
        given[zero].zero_()
        given[4:6] = torch.ops.phi4rv_cuda.packed_attention(*given[1:4], *given[6:])
        dq, dk, dv = backward(*given)
        assert all(x.isfinite().all() for x in (dq, dk, dv))
        if zero in (0, 2, 3):  # dout, k, v
            assert not dq.any()


@pytest.mark.parametrize("place", CUDA_PLACE)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(place: Place, wrong: float) -> None:
    """A row of dout makes its row of dq NaN; keys and values, all that their document's rows have of their channels."""
    clean = arguments(place, [70, 130], 2, 1, 72, False)
    expected = backward(*clean)[0]
    dout = clean[0].clone()
    dout[100, 1, 5] = wrong
    dq = backward(dout, *clean[1:])[0]
    assert dq[100, 1].isnan().all()
    dq[100, 1] = expected[100, 1]
    assert torch.equal(dq, expected)
    v = clean[3].clone()
    v[199, 0, 3] = wrong
    dq = backward(clean[0], *clean[1:3], v, *clean[4:])[0]
    assert dq[70:].isnan().all() and torch.equal(dq[:70], expected[:70])
    k = clean[2].clone()
    k[199, 0, 3] = wrong
    dq = backward(clean[0], clean[1], k, *clean[3:])[0]
    assert dq[70:, :, 3].isnan().all() and torch.equal(dq[:70], expected[:70])
    lse = clean[5].clone()
    lse[1, 100] = wrong
    if wrong < 0 or wrong != wrong:  # infinite: all weights are zero
        assert backward(*clean[:5], lse, *clean[6:])[0][100, 1].isnan().all()


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("value", [0.0, -1.0, 3.0])
def test_all_equal(place: Place, value: float) -> None:
    """Every weight is the same and every value the mean: dq and dk are zero, dv is the mean gradient."""
    dout, q, k, v, *_ = arguments(place, [70], 1, 1, 72, False)
    q, k, v = (torch.full_like(x, value) for x in (q, k, v))
    rest = offsets([70], place), 70, False
    out, lse = torch.ops.phi4rv_cuda.packed_attention(q, k, v, *rest)
    dq, dk, dv = backward(dout, q, k, v, out, lse, *rest)
    torch.testing.assert_close(dv, dout.float().mean(0, keepdim=True).expand_as(dv).to(dv), rtol=2**-6, atol=1e-3)
    assert float(dq.abs().max()) <= 1e-3 * value**2 and float(dk.abs().max()) <= 1e-2 * value**2


def test_same_bits_whenever_asynchronous_work_is_done() -> None:
    """The emulator's schedules differ by its seed."""
    if torch.cuda.is_available():
        pytest.skip("of the emulator")
    code = (
        "import torch; from tests.kernels import test_attention_backward as t; from phi4rv.ops import cuda\n"
        "cuda.load(); torch.manual_seed(0)\n"
        "for D, causal in ((72, True), (128, False)):\n"
        "    given = t.arguments(('cpu', torch.bfloat16), [300, 0, 70], 2, 1, D, causal)\n"
        "    print([int(x.view(torch.int16).long().mul(torch.arange(x.numel()).view_as(x) % 9973).sum())"
        " for x in t.backward(*given)])"
    )
    results = set()
    for seed in range(3):
        environment = {**os.environ, "PHI4RV_EMULATOR_SEED": str(seed), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=build.ROOT
        )
        assert not run.returncode, run.stderr
        results.add(run.stdout)
    assert len(results) == 1


@pytest.mark.parametrize("place", CUDA_PLACE)
def test_operator(place: Place) -> None:
    """Schema, fake, autograd and compilation."""
    given = arguments(place, [9], 2, 1, 64, True)
    torch.library.opcheck(torch.ops.phi4rv_cuda.packed_attention_backward, given)
    leaves = [x.clone().requires_grad_() for x in given[1:4]]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cuda.packed_attention(q, k, v, *given[6:]).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    equal(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves))


def test_fake() -> None:
    q, k = (torch.zeros(5, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    lse, ends = torch.zeros(4, 5, device="meta"), torch.zeros(2, dtype=torch.int32, device="meta")
    grads = backward(q, q, k, k, q, lse, ends, 5, True)
    assert [x.shape for x in grads] == [(5, 4, 128), (5, 2, 128), (5, 2, 128)]


def test_wrong_arguments_are_named() -> None:
    dout, q, k, v, out, lse, ends, _, _ = arguments(("cpu", torch.bfloat16), [9], 4, 2, 64, True)
    for wrong, message in [
        ((dout.half(), q, k, v, out, lse, ends), "dout must have the dtype of q"),
        ((dout[:3], q, k, v, out, lse, ends), "dout must have q's tokens and head_dim"),
        ((dout[:, :2], q, k, v, out, lse, ends), "dout and out must have q's heads"),
        ((dout, q.float(), k, v, out, lse, ends), "q must be bfloat16 or float16"),
        ((dout, q, k[:, :1], v, out, lse, ends), "those of k and v, which must be equal"),
        ((dout, q, k.transpose(1, 2), v, out, lse, ends), "k must have q's tokens and head_dim"),
        ((dout, q, k, v, out.new_empty(9, 8, 64)[:, :4], lse, ends), "out be contiguous"),
        ((dout, q, k, v, out, lse.T, ends), r"lse must be \(heads, tokens\) float32"),
        ((dout, q, k, v, out, lse.double(), ends), r"lse must be \(heads, tokens\) float32"),
        ((dout, q, k, v, out, lse, ends.long()), r"cu_seqlens must be \(documents \+ 1\) int32"),
        ((*(torch.zeros(9, 4, 96, dtype=torch.bfloat16),) * 5, lse, ends), "head_dim is 96, must be 64, 72, 80 or 128"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            backward(*wrong, 9, True)


REAL = [
    ([16384], 4, 1, 128, True),
    ([9000, 1, 0, 383, 3000, 4000], 40, 10, 128, True),
    ([256, 1023, 3600, 2047], 16, 16, 72, False),
]


@pytest.mark.parametrize("place", GPU)
@pytest.mark.parametrize(("lengths", "H", "G", "D", "causal"), REAL)
def test_real_shapes(place: Place, lengths: list[int], H: int, G: int, D: int, causal: bool) -> None:
    # Exact scores of 16384 rows in float64 take 2 GB a head, so one group of heads stands for all.
    if max(lengths) > 3600:
        H, G = H // G, 1
    both(draw(place, lengths, H, G, D), lengths, causal)


@pytest.mark.parametrize("place", GPU)
@pytest.mark.parametrize(("lengths", "H", "G", "D", "causal"), REAL)
def test_same_bits_twice(place: Place, lengths: list[int], H: int, G: int, D: int, causal: bool) -> None:
    given = arguments(place, lengths, H, G, D, causal)
    equal(backward(*given), backward(*given))
