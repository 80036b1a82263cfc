"""AdamW inside the backward pass: against gradients kept whole, what replaces clipping, and whole runs."""

import copy
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phi4rv.errors import UserError
from phi4rv.ops.low_precision import Moment8, hash32
from phi4rv.ops.registry import Operations
from tests.small import mixed_data, small_checkpoint, small_model, timeless, weights
from tests.train.test_optimizer import example, loss_sum, network
from tests.train.test_resume import saved, stop_at
from tests.train.test_train_command import the_error
from tests.train.test_training import batches
from train.build import build
from train.distributed.ranks import Ranks
from train.figures.metrics import read_metrics
from train.main import main
from train.optimizers import layerwise
from train.optimizers.adamw import EPS
from train.optimizers.layerwise import LayerwiseAdamW
from train.recipe import stage
from train.trainer import train_step_layerwise

OPS = Operations("torch")


def optimizer_of(net: nn.Module, **overrides: Any) -> LayerwiseAdamW:
    chosen = {"lr": 1e-2, "weight_decay": 0.1, "optimizer": "layerwise", "global_batch": 1, "clip": 1e6, **overrides}
    return LayerwiseAdamW(dict(net.named_parameters()), stage(2, False, chosen), OPS, seed=7)


def step(net: nn.Module, optimizer: LayerwiseAdamW, x: Tensor, y: Tensor, rate: float = 1e-2) -> float:
    optimizer.begin_step(rate, len(x))
    loss_sum(net, x, y).backward()
    return optimizer.finish_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small_slices", [False, True])
def test_steps_are_those_with_all_gradients_kept(
    dtype: torch.dtype, small_slices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what ``adamw`` makes of whole gradients, slice by slice with seeds counted through."""
    size = 256 if small_slices else layerwise.SLICE_ELEMENTS
    monkeypatch.setattr(layerwise, "SLICE_ELEMENTS", size)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 41), nn.Tanh(), nn.Linear(41, 3)).to(dtype)  # 820 elements: four slices
    twin = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    slices = [s for p in twin.parameters() for s in p.data.view(-1).split(size)]
    moments = [(Moment8.zeros(len(s)), Moment8.zeros(len(s))) for s in slices]
    for number in range(1, 5):
        x, y = torch.randn(9, 20).to(dtype), torch.randn(9, 3).to(dtype)
        step(net, optimizer, x, y)

        twin.zero_grad()
        loss_sum(twin, x, y).backward()
        grads = [g for p in twin.parameters() if p.grad is not None for g in p.grad.view(-1).split(size)]
        decays = [0.1 if p.ndim >= 2 else 0.0 for p in twin.parameters() for _ in p.data.view(-1).split(size)]
        for i, (w, g, m, decay) in enumerate(zip(slices, grads, moments, decays, strict=True)):
            OPS.adamw(w, g, *m, number, 1e-2, (0.9, 0.95), EPS, decay, 1 / 9, seed=hash32(hash32(7) ^ i))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
    assert optimizer.steps == 4


def test_no_two_gradients_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    optimizer = optimizer_of(net)
    update, order = LayerwiseAdamW._update, []

    def watched(self: LayerwiseAdamW, name: str, gradient: Tensor | None, factor: float) -> None:
        assert all(p.grad is None for p in net.parameters())
        order.append(name)
        update(self, name, gradient, factor)

    monkeypatch.setattr(LayerwiseAdamW, "_update", watched)
    step(net, optimizer, *example(0))
    assert sorted(order) == sorted(dict(net.named_parameters()))
    assert order[0].startswith("3.") and order[-1].startswith("0."), "from the last layer to the first"


def test_the_norm_is_that_of_the_whole_gradient() -> None:
    net = network()
    twin = copy.deepcopy(net)
    x, y = example(3)
    (loss_sum(twin, x, y) / len(x)).backward()
    expected = float(nn.utils.clip_grad_norm_(twin.parameters(), 1.0))
    assert step(net, optimizer_of(net), x, y) == pytest.approx(expected, rel=1e-6)


class Factors(LayerwiseAdamW):
    """Notes the factors and norms that clipping gave, and leaves the weights as they are."""

    def __init__(self, net: nn.Module, clip: float, clipping: str = "exact"):
        chosen = stage(2, False, {"optimizer": "layerwise", "global_batch": 1, "clip": clip, "clipping": clipping})
        super().__init__({n: p for n, p in net.named_parameters() if p.requires_grad}, chosen, OPS, seed=0)
        self.clipped: list[float] = []

    def _update(self, name: str, gradient: Tensor | None, factor: float) -> None:
        if gradient is None:
            return
        self.clipped.append(float(gradient.double().norm()) * factor)


def test_a_measured_norm_is_clipped_exactly() -> None:
    """Each tensor gets clip / global norm."""
    net = network()
    optimizer = Factors(net, clip=0.01)
    x, y = example(0)
    for measure in (True, False):
        optimizer.begin_step(1e-2, len(x), measure)
        loss_sum(net, x, y).backward()
        norm = optimizer.finish_step()
    assert optimizer.steps == 1, "measuring is no step"
    assert norm > 0.1
    assert len(optimizer.clipped) == 6
    assert math.hypot(*optimizer.clipped) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("clipping", ["exact", "delayed"])
def test_exact_clipping_measures_every_step(clipping: str, tmp_path: Path) -> None:
    """Other records in each step: exact leaves clip of every gradient, delayed of the first, which is measured too."""
    model, processor = small_model()
    optimizer = Factors(model, 0.01, clipping)
    left = []
    for made in batches(processor, mixed_data(tmp_path, 4), [[1], [0, 2, 3]]):
        optimizer.clipped.clear()
        metrics = train_step_layerwise(model, optimizer, [made], 1e-3)
        assert metrics["grad_norm"] > 0.1
        left.append(math.hypot(*optimizer.clipped))
    assert left[0] == pytest.approx(0.01, rel=1e-5)
    assert (left[1] == pytest.approx(0.01, rel=1e-5)) == (clipping == "exact")
    assert optimizer.steps == 2


@pytest.mark.parametrize("last_step", [True, False])
def test_a_spike_in_any_tensor_is_bounded(last_step: bool) -> None:
    """Each tensor's gradient in turn 10⁶ times as large as in the last step, if there was one, the others as before."""
    for spiked in dict(network().named_parameters()):
        net = network()
        optimizer = Factors(net, clip=0.01)
        if last_step:
            step(net, optimizer, *example(0))
        optimizer.clipped.clear()
        net.get_parameter(spiked).register_hook(lambda grad: grad * 1e6)
        assert step(net, optimizer, *example(0)) > 1e3
        assert max(optimizer.clipped) <= 0.01 * (1 + 1e-5), spiked
        assert math.hypot(*optimizer.clipped) <= 0.01 * math.sqrt(2 + 2 * math.log(1e6)), spiked


def test_a_gradient_below_the_bound_is_left_alone() -> None:
    net = network()
    optimizer = Factors(net, clip=1e3)
    norm = step(net, optimizer, *example(0))
    assert math.hypot(*optimizer.clipped) == pytest.approx(norm, rel=1e-5)


def test_a_missing_gradient_counts_as_zero() -> None:
    net, twin = network(), network()
    ours, explicit = optimizer_of(net), optimizer_of(twin)
    for number in range(4):
        x, y = example(number)
        for model, optimizer in ((net, ours), (twin, explicit)):
            optimizer.begin_step(1e-2, 12)
            used = number % 2 == 0
            hidden = model[2](model[1](model[0](x)))
            loss = (model[3](hidden if used else hidden * 0) - y).square().sum()
            if model is net and not used:  # the first layers have no part in it
                loss = (model[3](hidden.detach() * 0) - y).square().sum()
            loss.backward()
            optimizer.finish_step()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_its_weight(bad: float) -> None:
    net = network()
    before = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    optimizer.begin_step(1e-2, 12)
    hidden = net[2](net[1](net[0](example(0)[0])))
    hidden.register_hook(lambda grad: grad * bad)
    with pytest.raises(UserError, match=r"step 1: the norm of 2\.\w+'s gradient is (nan|inf)"):
        net[3](hidden).sum().backward()
    for (name, p), q in zip(net.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(p, q[1]) != name.startswith("3."), name


def test_a_second_backward_pass_is_refused() -> None:
    net = network()
    optimizer = optimizer_of(net)
    step(net, optimizer, *example(0))
    with pytest.raises(RuntimeError, match="a backward pass outside of begin_step and finish_step"):
        loss_sum(net, *example(1)).backward()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_broken_step_is_skipped(broken: str, tmp_path: Path) -> None:
    """A loss that is not finite, and a gradient whose norm is found not to be before any weight changes."""
    model, processor = small_model()
    if broken == "loss":
        with torch.no_grad():
            model.decoder.norm.weight[0] = float("nan")
    else:
        model.decoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(dict(model.named_parameters()))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    chosen = stage(2, False, {"optimizer": "layerwise", "global_batch": 1})
    optimizer = LayerwiseAdamW(named, chosen, OPS, seed=0)
    figures = train_step_layerwise(model, optimizer, batches(processor, mixed_data(tmp_path, 3), [[1]]), 1e-3)
    assert figures["skipped_steps"] == 1 and not math.isfinite(figures["grad_norm"])
    assert math.isfinite(figures["loss"]) == (broken == "gradient")
    assert (optimizer.steps, optimizer.skipped, float(optimizer.norm)) == (1, 1, 0.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("layerwise")
    line = ["--checkpoint", small_checkpoint(folder), "--data", mixed_data(folder), "--device", "cpu", "--seed", 3]
    line += ["--global-batch", 1, "--sequence-length", 256, "--lr", 1e-3, "--warmup", 3]
    return list(map(str, line))


@pytest.mark.parametrize(("dtype", "clipping"), [("float32", "exact"), ("bfloat16", "delayed")])
def test_a_resumed_run_is_the_run_in_one_go(
    inputs: list[str], dtype: str, clipping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*inputs, "--optimizer", "layerwise", "--dtype", dtype, "--clipping", clipping]
    line += ["--max-steps", "6", "--save-every", "2"]
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert main([*line, "--output", str(whole)]) == 0
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, 3)
        main([*line, "--output", str(output)])
    assert main([*line, "--output", str(output), "--resume"]) == 0
    assert timeless(output / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    ours, theirs = weights(output / "model"), weights(whole / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = saved(output / "step-6"), saved(whole / "step-6")
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    assert {t.dtype for n, t in theirs.items() if "/codes/" in n} == {torch.uint8}


@pytest.mark.parametrize(("dtype", "clipping"), [("float32", "delayed"), ("bfloat16", "exact")])
def test_the_loss_stays_within_one_percent_of_adamw(
    inputs: list[str], dtype: str, clipping: str, tmp_path: Path
) -> None:
    """40 steps from 7.4 nats down to 2.3, float32 masters beside: the mean of each ten steps."""
    data = mixed_data(tmp_path, 24)
    losses = {}
    for name in ("adamw", "layerwise"):
        line = [*inputs, "--data", str(data), "--max-steps", "40", "--lr", "5e-4", "--warmup", "10", "--dtype", dtype]
        line += ["--clipping", clipping] if name == "layerwise" else []
        assert main([*line, "--optimizer", name, "--output", str(tmp_path / name)]) == 0
        losses[name] = torch.tensor([e["loss"] for e in read_metrics(tmp_path / name / "metrics.jsonl")]).view(4, -1)
    means = {name: values.mean(1) for name, values in losses.items()}
    assert float(means["adamw"][-1]) < 0.5 * float(means["adamw"][0])
    torch.testing.assert_close(means["layerwise"], means["adamw"], rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--global-batch", "5"], "--global-batch: 5 may need several sequences a step"),
        (["--lora-rank", "4"], "leave --lora-rank out"),
        (["--optimizer", "adamw", "--clipping", "delayed"], "--clipping: delayed is for --optimizer layerwise"),
        (["--optimizer", "sgd"], "--optimizer: 'sgd' is unknown, must be one of adamw, layerwise"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    line = [*inputs, "--optimizer", "layerwise", *arguments, "--output", str(tmp_path / "out")]
    assert main(line) == 2
    assert words in the_error(capsys)


def test_several_processes_are_refused() -> None:
    chosen = stage(2, False, {"optimizer": "layerwise", "global_batch": 1})
    with pytest.raises(UserError, match="--optimizer: layerwise trains in one process, not in 2"):
        build(Namespace(compile=False), chosen, torch.device("cpu"), torch.float32, None, None, Ranks(0, 2))
