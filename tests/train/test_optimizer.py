"""The optimizer against torch.optim.AdamW with clip_grad_norm_, and what bfloat16 weights need."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phi4rv.ops.registry import Operations
from train.optimizers.adamw import EPS, AdamW
from train.recipe import Stage, stage

OPS = Operations("torch")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 3, bias=False))


def example(step: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(7, (rows,), generator=generator), torch.randn(rows, 3, generator=generator)


def loss_sum(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).square().sum()


def optimizer_of(net: nn.Module, **overrides: Any) -> AdamW:
    chosen: Stage = stage(2, False, {"lr": 1e-2, "weight_decay": 0.1, **overrides})
    return AdamW(dict(net.named_parameters()), chosen, OPS)


def torch_adamw(net: nn.Module, chosen: Stage) -> torch.optim.AdamW:
    """Decay on matrices alone, as two groups."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim >= 2], "weight_decay": chosen.weight_decay},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(chosen.beta1, chosen.beta2), eps=EPS, foreach=False)


@pytest.mark.parametrize("clip", [0.05, 1e6], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("number", [1, 2])
def test_steps_are_those_of_torch(number: int, clip: float) -> None:
    """Float32, eight steps of changing rate. The order of operations differs, so 1e-6 and not 0."""
    net = network()
    twin = copy.deepcopy(net)
    chosen = stage(number, False, {"clip": clip, "weight_decay": 0.1})
    ours, theirs = AdamW(dict(net.named_parameters()), chosen, OPS), torch_adamw(twin, chosen)
    for step in range(8):
        x, y = example(step)
        rate = 1e-2 / (step + 1)
        loss_sum(net, x, y).backward()
        ours.accumulate()
        norm = ours.step(rate, len(x))

        theirs.zero_grad()
        (loss_sum(twin, x, y) / len(x)).backward()
        expected_norm = nn.utils.clip_grad_norm_(twin.parameters(), clip)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()

        assert norm == pytest.approx(float(expected_norm), rel=1e-5)
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert ours.steps == 8


def test_decay_is_on_matrices_alone_and_decoupled() -> None:
    """Without a gradient nothing moves but the matrices, by exactly 1 - lr · decay."""
    net = network()
    before = copy.deepcopy(net)
    optimizer_of(net).step(0.5, 1)
    for p, q in zip(net.parameters(), before.parameters(), strict=True):
        expected = q * (1 - 0.5 * 0.1) if p.ndim >= 2 else q
        torch.testing.assert_close(p, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_micro_batches_add_up_to_the_whole(pieces: int) -> None:
    """Ragged pieces, with one division by the whole count at the end."""
    whole, parts = network(), network()
    first, second = optimizer_of(whole), optimizer_of(parts)
    for step in range(3):
        x, y = example(step, 13)
        loss_sum(whole, x, y).backward()
        first.accumulate()
        for piece_x, piece_y in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
            loss_sum(parts, piece_x, piece_y).backward()
            second.accumulate()
            assert all(p.grad is None for p in parts.parameters()), "a gradient left over would count twice"
        first.step(1e-2, 13)
        second.step(1e-2, 13)
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_missing_gradient_counts_as_zero() -> None:
    """A part that no token used keeps its momentum, as with a gradient of zeros."""
    net, twin = network(), network()
    ours, explicit = optimizer_of(net), optimizer_of(twin)
    for step in range(4):
        x, y = example(step)
        for model, optimizer in ((net, ours), (twin, explicit)):
            loss_sum(model, x, y).backward()
            if step % 2:
                model[3].weight.grad = None if model is net else torch.zeros_like(model[3].weight)
            optimizer.accumulate()
            optimizer.step(1e-2, 12)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bfloat16_weights_keep_updates_too_small_for_them() -> None:
    """1200 updates of 1e-5 each on weights near 1, where bfloat16's next number is 0.0078 away."""
    weight = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = AdamW({"w": weight}, stage(2, False, {"weight_decay": 0.0, "beta2": 0.95}), OPS)
    for step in range(1200):
        weight.grad = torch.ones_like(weight)
        optimizer.accumulate()
        optimizer.step(1e-5, 1)
        if step == 10:
            assert torch.equal(weight, torch.ones_like(weight)), "not yet a step of bfloat16"
    master = optimizer.state_dict()["master/w"]
    torch.testing.assert_close(master, torch.full((8, 8), 1 - 1200e-5), rtol=0, atol=1e-4)
    assert torch.equal(weight, master.bfloat16())
    assert not torch.equal(weight, torch.ones_like(weight))


def test_gradients_of_bfloat16_are_summed_in_float32() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = AdamW({"w": weight}, stage(2, False, {}), OPS)
    for _ in range(1000):  # in bfloat16 the sum would stop growing at 256
        weight.grad = torch.ones_like(weight)
        optimizer.accumulate()
    assert float(optimizer.step(0.0, 1)) == 1000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_and_load_state(dtype: torch.dtype) -> None:
    """A copy that loads weights and state takes the same further steps, to the bit."""

    def advance(net: nn.Module, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            x, y = example(step)
            loss_sum(net, x, y.to(dtype)).backward()
            optimizer.accumulate()
            optimizer.step(1e-2, 12)

    net = network().to(dtype)
    optimizer = optimizer_of(net)
    advance(net, optimizer, range(3))
    kept = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert any(name.startswith("master/") for name in kept) == (dtype == torch.bfloat16)

    twin = network(seed=9).to(dtype)
    twin.load_state_dict(net.state_dict())
    resumed = optimizer_of(twin)
    resumed.load_state_dict(kept, 3)
    advance(net, optimizer, range(3, 6))
    advance(twin, resumed, range(3, 6))
    assert resumed.steps == 6
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

    del kept["exp_avg/0.weight"]
    with pytest.raises(KeyError, match=r"exp_avg/0\.weight"):
        optimizer_of(twin).load_state_dict(kept, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    net = network()
    before = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    loss_sum(net, *example(0)).backward()
    net[1].bias.grad[0] = bad  # type: ignore[index]
    optimizer.accumulate()
    norm = optimizer.step(1e-2, 12)
    assert not math.isfinite(norm)
    assert (optimizer.steps, optimizer.skipped) == (1, 1)
    for p, q in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
