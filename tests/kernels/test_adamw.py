"""adamw, its short parameters and its 8-bit moments, against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from phi4rv.ops import reference
from phi4rv.ops.low_precision import Moment8, hash32, random_bits, stochastic_round
from tests.kernels.check import PLACE, PLACES, Place, check_close
from triton_kernels import adamw as kernels
from triton_kernels.adamw import adamw

NUMBERS = (3, 1e-2, (0.9, 0.99), 1e-8, 0.1)  # step, lr, betas, eps, weight decay
Moment = Tensor | Moment8


def state(shape: tuple[int, ...], param: torch.dtype, moment: torch.dtype, device: str) -> list[Any]:
    """param, gradient in float32 and two moments; ``moment`` uint8 for Moment8."""
    generator = torch.Generator().manual_seed(1)
    p, g, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
    v = v.square()
    if moment != torch.uint8:
        return [p.to(device, param), g.to(device), m.to(device, moment), v.to(device, moment)]
    moments = [Moment8.zeros(p.numel()), Moment8.zeros(p.numel())]
    for target, x, signed in zip(moments, (m, v), (True, False), strict=True):
        target.encode_(x.flatten(), random_bits(5, 1, p.numel(), p.device), signed)
    return [p.to(device, param), g.to(device), *(Moment8(*(t.to(device) for t in x)) for x in moments)]


def same_but_for_rounding(ours: Moment, theirs: Moment, share: float = 0.01) -> None:
    """Equal bits but for a few elements, which are neighbours: float32 values differ in their last places."""
    if isinstance(ours, Moment8):
        torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-6, atol=0)
        a, b = ours.codes.int(), theirs.codes.int()
    else:
        a, b = (x.flatten().view(torch.int16).int() for x in (ours, theirs))
    assert int((a - b).abs().max()) <= 1
    assert float((a != b).float().mean()) <= max(share, 1 / a.numel())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1,), (3, 85), (256,), (257,), (1000,), (2048,), (2, 3, 683), (0,)])
def test_float32(place: Place, shape: tuple[int, ...]) -> None:
    """The place's dtype is the gradient's and the copy's."""
    device, dtype = place
    start = state(shape, torch.float32, torch.float32, device)
    start[1] = start[1].to(dtype)
    clip = torch.tensor(0.37, device=device)

    def run(step: Callable[..., None], wide: torch.dtype | None) -> list[Tensor]:
        inputs = [x.to(wide, copy=True) if wide else x.clone() for x in start]
        copy = inputs[0].new_empty(shape, dtype=torch.float16 if device == "cpu" else dtype) if not wide else None
        step(*inputs, *NUMBERS, clip=clip, copy=copy)
        if copy is not None:
            assert torch.equal(copy, inputs[0].to(copy.dtype))
        return [inputs[0], *inputs[2:]]

    outs = run(adamw, None), run(reference.adamw, None), run(reference.adamw, torch.float64)
    for name, ours, plain, exact in zip(("param", "exp_avg", "exp_avg_sq"), *outs, strict=True):
        check_close(ours, plain, exact, name, slack=2)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moment", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("n", [1, 255, 1024, 2300])
def test_short_state(place: Place, param: torch.dtype, moment: torch.dtype, n: int) -> None:
    """Rounded by the same random bits as the definition's."""
    ours, theirs = (state((n,), param, moment, place[0]) for _ in range(2))
    for step, inputs in ((adamw, ours), (reference.adamw, theirs)):
        step(*inputs, *NUMBERS, seed=7)
    if param == torch.float32:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    else:
        same_but_for_rounding(ours[0], theirs[0])
    same_but_for_rounding(ours[2], theirs[2])
    same_but_for_rounding(ours[3], theirs[3])


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e4])
def test_extreme_gradients(place: Place, scale: float) -> None:
    """All zero, whose squares are tiny, and large; from the moments' first state."""
    device, n = place[0], 300
    ours, theirs = ([x.clone() for x in state((n,), torch.float32, torch.float32, device)[:2]] for _ in range(2))
    for step, (p, g) in ((adamw, ours), (reference.adamw, theirs)):
        moments = Moment8.zeros(n, device), Moment8.zeros(n, device)
        for number in (1, 2):
            step(p, g * scale, *moments, number, *NUMBERS[1:], seed=number)
        assert p.isfinite().all() and all(m.scales.isfinite().all() for m in moments)
    # A code that fell otherwise moves its element by up to some hundredths of lr.
    assert float((ours[0] - theirs[0]).abs().max()) < 1e-3
    assert float((ours[0] - theirs[0]).abs().median()) < 1e-6


@pytest.mark.parametrize("place", PLACE)
def test_not_a_number_is_kept(place: Place) -> None:
    for param in (torch.float32, torch.bfloat16):
        p, g, m, v = state((8,), param, torch.bfloat16, place[0])
        g[3] = torch.nan
        adamw(p, g, m, v, *NUMBERS, seed=1)
        for x in (p, m, v):
            assert x.isnan().tolist() == [i == 3 for i in range(8)]


@pytest.mark.parametrize("place", PLACE)
def test_stochastic_rounding_is_unbiased(place: Place) -> None:
    """The same value everywhere: the mean of what it is rounded to is the value, and two seeds differ."""
    n, step = 1 << 14, torch.finfo(torch.bfloat16).eps
    value = 1 + 0.3 * step
    drawn = []
    for seed in (1, 2):
        p = torch.ones(n, dtype=torch.bfloat16, device=place[0])
        zeros = (torch.zeros(n, device=place[0]) for _ in range(3))
        adamw(p, *zeros, 1, 1.0, (0.9, 0.9), 1e-8, 1 - value, seed=seed)  # decay alone: p · (1 - lr · (1 - value))
        assert set(p.tolist()) == {1.0, 1.0 + step}
        assert abs(float(p.double().mean()) - value) < 4 * step * (0.21 / n) ** 0.5
        drawn.append(p == 1)
    assert abs(float((drawn[0] & drawn[1]).float().mean()) - 0.49) < 0.03


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("value", [1e-4, 0.01234, 0.5])
def test_eight_bits_are_unbiased(signed: bool, value: float) -> None:
    """Each block a 1 and 255 times a value under it."""
    n = 1 << 16
    x = torch.full((n,), value)
    x[::256] = 1.0
    moment = Moment8.zeros(n)
    moment.encode_(x, random_bits(3, 9, n, x.device), signed)
    decoded = moment.decode(signed)
    assert decoded[::256].eq(1).all() or torch.allclose(decoded[::256], x[::256], rtol=1e-6)
    rest = decoded.view(-1, 256)[:, 1:].double()
    assert len(rest.unique()) == 2
    assert abs(float(rest.mean()) - value) < 4 * float(rest.std()) / rest.numel() ** 0.5


def test_random_bits() -> None:
    assert hash32(1) == 0x514E28B7  # a published value of MurmurHash3's finaliser
    bits = random_bits(1, 2, 1 << 14, torch.device("cpu"))
    share = torch.stack([(bits >> i) & 1 for i in range(32)]).double().mean(1)
    assert float((share - 0.5).abs().max()) < 4 * 0.5 / (1 << 14) ** 0.5
    x = torch.tensor([1.0, -2.5, float("inf"), float("nan"), 0.0])
    assert torch.equal(
        stochastic_round(x, torch.tensor([0xFFFF0000] * 5)).isnan(), torch.tensor([False] * 3 + [True, False])
    )
    assert stochastic_round(x, torch.full((5,), 0xFFFF)).tolist()[:3] == [1.0, -2.5, float("inf")]


@pytest.mark.parametrize("heavy", [False, True])
def test_eight_bit_error(heavy: bool) -> None:
    """What Moment8's docstring states."""
    torch.manual_seed(0)
    n = 1 << 18
    x = torch.distributions.StudentT(3.0).sample((n,)) if heavy else torch.randn(n)
    bits = random_bits(1, 1, n, x.device)
    first, second = Moment8.zeros(n), Moment8.zeros(n)
    first.encode_(x, bits, True)
    second.encode_(x * x, bits, False)
    size = x.square().mean().sqrt()
    assert float((first.decode(True) - x).square().mean().sqrt() / size) < (0.014 if heavy else 0.0105)
    assert float((second.decode(False).sqrt() - x.abs()).square().mean().sqrt() / size) < (0.0065 if heavy else 0.0052)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_training_with_eight_bit_moments(beta2: float) -> None:
    """200 steps of a small network: within 1 % of the loss with float32 moments."""
    losses = []
    for eight in (False, True):
        torch.manual_seed(0)
        x = torch.randn(256, 32) * torch.logspace(0, -2, 32)
        y = torch.tanh(x @ (torch.randn(32, 64) / 4)) @ torch.randn(64, 4)
        weights = [(torch.randn(32, 32) / 6).requires_grad_(), (torch.randn(32, 4) / 6).requires_grad_()]
        make = Moment8.zeros if eight else torch.zeros
        moments = [(make(w.numel()), make(w.numel())) for w in weights]
        for step in range(1, 201):
            loss = (torch.tanh(x @ weights[0]) @ weights[1] - y).square().mean()
            grads = torch.autograd.grad(loss, weights)
            for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
                reference.adamw(w.data, g, *moments[i], step, 3e-3, (0.9, beta2), 1e-8, 0.01, seed=i)
        losses.append(float(loss.detach()))
    assert losses[0] < 0.2
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize("moment", [torch.float32, torch.uint8])
def test_operator(place: Place, moment: torch.dtype) -> None:
    """Schema, fake, mutation and compilation."""
    p, g, m, v = state((300,), torch.float32, moment, place[0])
    scales = (None, None) if isinstance(m, Tensor) else (m.scales, v.scales)
    first, second = (x if isinstance(x, Tensor) else x.codes for x in (m, v))
    copy, clip = p.half(), torch.tensor(0.5, device=place[0])
    torch.library.opcheck(
        kernels.update, (p, g, first, second, *scales, copy, clip, 1.0, 3, 0.1, 0.9, 0.99, 1e-8, 0.1, 4)
    )
    compiled = torch.compile(
        lambda p, g, m, v, copy: adamw(p, g, m, v, *NUMBERS, copy=copy, seed=1), backend="aot_eager", fullgraph=True
    )
    ours, theirs = (state((300,), torch.float32, moment, place[0]) for _ in range(2))
    compiled(*ours, copy)
    adamw(*theirs, *NUMBERS, seed=1)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(copy, ours[0].half())


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(
    ("case", "param", "moment"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("8-bit", torch.bfloat16, torch.uint8),
    ],
)
def test_every_configuration(place: Place, case: str, param: torch.dtype, moment: torch.dtype) -> None:
    """The same bits whatever the tiles."""
    outs = []
    for config in kernels.STEP.cases[case]:
        with kernels.STEP.forced(config):
            inputs = state((3000,), param, moment, place[0])
            adamw(*inputs, *NUMBERS, seed=1)
            outs.append([inputs[0], *(x if isinstance(x, Tensor) else x.codes for x in inputs[2:])])
    for other in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))


def test_wrong_arguments_are_named() -> None:
    p, g, m, v = state((4, 6), torch.float32, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"param is torch.float16"):
        adamw(p.half(), g, m, v, *NUMBERS)
    with pytest.raises(ValueError, match="param must be contiguous"):
        adamw(p.T, g.view(6, 4), m, v, *NUMBERS)
    with pytest.raises(ValueError, match="grad is"):
        adamw(p, g[:3], m, v, *NUMBERS)
    with pytest.raises(ValueError, match="exp_avg_sq has 23 elements, param 24"):
        adamw(p, g, m, v.flatten()[:23], *NUMBERS)
    with pytest.raises(ValueError, match=r"exp_avg is torch.float16"):
        adamw(p, g, m.half(), v, *NUMBERS)
    with pytest.raises(ValueError, match="one float32 scale for every 256"):
        adamw(p, g, m, Moment8(Moment8.zeros(24).codes, torch.zeros(2)), *NUMBERS, seed=1)
    with pytest.raises(ValueError, match=r"copy is torch.float32"):
        adamw(p, g, m, v, *NUMBERS, copy=p.clone())
    with pytest.raises(ValueError, match="clip must be one float32"):
        adamw(p, g, m, v, *NUMBERS, clip=torch.ones(2))
    for step in (adamw, reference.adamw):
        with pytest.raises(ValueError, match="need a seed"):
            step(p.bfloat16(), g, m, v, *NUMBERS)
        with pytest.raises(ValueError, match="need a seed"):
            step(p, g, Moment8.zeros(24), v, *NUMBERS)


@pytest.mark.gpu
@pytest.mark.parametrize("moment", [torch.float32, torch.uint8])
def test_graph_and_stream(moment: torch.dtype) -> None:
    """Captured on a side stream, replayed: the bits of an ordinary call, which are the same every time."""
    ours, theirs, again = (state((100_000,), torch.float32, moment, "cuda") for _ in range(3))
    for inputs in (theirs, again):
        adamw(*inputs, *NUMBERS, seed=1)
    assert torch.equal(theirs[0], again[0])
    warm = state((100_000,), torch.float32, moment, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        adamw(*warm, *NUMBERS, seed=1)
        with torch.cuda.graph(graph, stream=stream):
            adamw(*ours, *NUMBERS, seed=1)
        graph.replay()
    stream.synchronize()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.gpu
def test_real_shape() -> None:
    """A weight of the decoder, with every kind of state."""
    shape = (5120, 5120)
    for place in (PLACES[2].values[0], PLACES[3].values[0]):
        test_float32(place, shape)
    for param in (torch.float32, torch.bfloat16):
        for moment in (torch.bfloat16, torch.uint8):
            test_short_state(PLACES[2].values[0], param, moment, shape[0] * shape[1])


@pytest.mark.gpu
def test_over_two_to_the_31_elements() -> None:
    n = (1 << 31) + 300
    p, g = torch.ones(n, dtype=torch.bfloat16, device="cuda"), torch.ones(n, dtype=torch.bfloat16, device="cuda")
    moments = Moment8.zeros(n, "cuda"), Moment8.zeros(n, "cuda")
    adamw(p, g, *moments, 1, *NUMBERS[1:], seed=1)
    for x in (p, moments[0].codes, moments[1].codes):
        for end in (x[:256], x[-256:]):
            assert end.unique().numel() <= 2 and end.float().mean() != (1 if x is p else 0)
    assert all(float(m.scales[-1]) == float(m.scales[0]) > 0 for m in moments)
