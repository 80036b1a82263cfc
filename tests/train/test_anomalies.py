"""Numbers that are not finite: the step is skipped on every rank and leaves no trace; losses that jump are told."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import phi4rv
from phi4rv.batch import PackedBatch
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from tests.small import mixed_data, small_checkpoint, small_model, timeless
from tests.train.test_resume import stop_at
from train import anomalies
from train.anomalies import DEVIATIONS, MIN_WINDOW, PATIENCE, LossSpikes, SkippedSteps, check_weights
from train.data.packed_dataset import PackedDataset
from train.distributed.ranks import Ranks
from train.export import export
from train.main import main
from train.optimizers.adamw import AdamW
from train.recipe import stage
from train.trainable import set_trainable
from train.trainer import train_step


def snapshot(model: Phi4RV, optimizer: AdamW) -> dict[str, Tensor]:
    everything = {**dict(model.named_parameters()), **optimizer.state_dict(), "gradients": optimizer.flat_grads}
    return {name: tensor.detach().clone() for name, tensor in everything.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def loss_nan(model: Phi4RV) -> Callable[[], None]:
    original = model.ops.linear_cross_entropy
    model.ops.linear_cross_entropy = lambda *a, **k: tuple(x * math.nan for x in original(*a, **k))
    return lambda: setattr(model.ops, "linear_cross_entropy", original)


def gradient_inf(model: Phi4RV) -> Callable[[], None]:
    return model.decoder.norm.weight.register_hook(lambda grad: grad * math.inf).remove


def train_with_and_without(rank: int, world: int, folder: Path, dtype: torch.dtype) -> None:
    """Steps A, two broken ones, B; and A, B: the same to the bit. A broken step's fault lies on the last rank alone."""
    torch.set_num_threads(1)
    if world > 1:
        where = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    chosen, ends = stage(2, False, {"lr": 1e-3, "sequence_length": 512}), []
    for faults in ((loss_nan, gradient_inf), ()):
        model, processor = small_model()
        model = model.to(dtype)
        optimizer = AdamW(set_trainable(model, chosen), chosen, model.ops)
        dataset = PackedDataset([folder / "data.jsonl"], processor, chosen)
        info = [p for line in dataset.lines[0] for p in dataset.measure(line)]
        batches = [dataset.load_row([p]) for p in info[rank::world]]

        def step(model: Phi4RV = model, optimizer: AdamW = optimizer, batches: Any = batches) -> dict[str, Any]:
            return train_step(model, optimizer, batches, 1e-3, Ranks(rank, world))

        step()
        for number, fault in enumerate(faults, 1):
            before = snapshot(model, optimizer)
            heal = fault(model) if rank == world - 1 else lambda: None
            metrics = step()
            heal()
            assert same(snapshot(model, optimizer), before)
            assert not math.isfinite(metrics["grad_norm"]) and metrics["skipped_steps"] == number
            assert math.isfinite(metrics["loss"]) == (fault is gradient_inf)
        assert math.isfinite(step()["grad_norm"])
        assert (optimizer.steps, optimizer.skipped) == (2 + len(faults), len(faults))
        ends.append(snapshot(model, optimizer))
    assert same(*ends)
    (folder / f"passed-{rank}").touch()
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_leaves_no_trace(tmp_path: Path, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    mixed_data(tmp_path, 4)
    train_with_and_without(0, 1, tmp_path, dtype)
    torch.set_num_threads(threads)


def test_nor_on_two_processes(tmp_path: Path) -> None:
    mixed_data(tmp_path, 4)
    mp.spawn(train_with_and_without, (2, tmp_path, torch.float32), nprocs=2)
    assert len(list(tmp_path.glob("passed-*"))) == 2


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """A command line without --output and --max-steps."""
    made = f"--checkpoint {small_checkpoint(tmp_path)} --data {mixed_data(tmp_path)} --device cpu --stage 2 --lr 1e-3"
    return [*made.split(), "--global-batch", "5", "--sequence-length", "256", "--warmup", "1", "--save-every", "2"]


def poison(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[int], bool]) -> None:
    """The loss of every optimizer step whose number (from 1) is wanted becomes NaN."""
    taking, number = Phi4RV.loss_sum_by_mode, [0]

    def broken(self: Phi4RV, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        loss, losses = taking(self, batch)
        bad = math.nan if wanted(number[0]) else 1.0
        return loss * bad, losses * torch.tensor([bad, 1, bad, 1], dtype=torch.float64)

    def counting(*arguments: Any) -> dict[str, Any]:
        number[0] = arguments[1].steps + 1
        return train_step(*arguments)

    monkeypatch.setattr(Phi4RV, "loss_sum_by_mode", broken)
    monkeypatch.setattr("train.trainer.train_step", counting)


def test_a_skipped_step_is_counted_and_logged(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda step: step in (3, 4))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([*line, "--max-steps", "6", "--output", str(whole)]) == 0
    told = [text for text in capsys.readouterr().err.splitlines() if "skipped (" in text]
    assert "step 3 skipped (1 so far): the loss is nan; records: " in told[0]
    steps = timeless(whole / "metrics.jsonl")
    assert [e["skipped_steps"] for e in steps] == [0, 0, 1, 2, 2, 2]
    assert [e["loss"] is None for e in steps] == ["not_finite" in e for e in steps] == [i in (2, 3) for i in range(6)]
    for entry in steps:
        assert ("records" in entry) == ("not_finite" in entry)
    assert len(steps[2]["records"]) == steps[2]["samples"]
    assert all(where.startswith(f"{tmp_path / 'data.jsonl'}:") for where in steps[2]["records"])

    # Taken up again at a save that lies between two skipped steps: Adam's own count of steps goes on as well.
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, 4)
        main([*line, "--max-steps", "6", "--output", str(halves)])
    assert main([*line, "--max-steps", "6", "--output", str(halves), "--resume"]) == 0
    assert timeless(halves / "metrics.jsonl") == steps
    ours, theirs = (dict(phi4rv.load(o / "model", device="cpu")[0].named_parameters()) for o in (halves, whole))
    assert same(ours, theirs)


def exported(step: Path) -> phi4rv.Phi4RV:
    export(step, step.parent / f"{step.name}-exported")
    return phi4rv.load(step.parent / f"{step.name}-exported", device="cpu")[0]


def test_ten_in_a_row_end_the_run(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save named holds what the last finite step left."""
    poison(monkeypatch, lambda step: step > 3)
    output = tmp_path / "out"
    assert main([*line, "--max-steps", "30", "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: steps 4 to 13: no finite loss and gradient in 10 steps in a row, all skipped")
    assert f"the last good checkpoint is {output / 'step-12'}: write" in error
    good = exported(output / "step-12")
    check_weights(good.named_parameters(), "step-12")
    earlier = exported(output / "step-4")
    assert same(dict(good.named_parameters()), dict(earlier.named_parameters()))


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (-math.inf, "an infinite number")])
def test_weights_that_are_not_finite_from_the_start(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: float, word: str
) -> None:
    model, processor = small_model()
    with torch.no_grad():
        model.decoder.layers[1].mlp.down_proj.weight[3, 4] = bad
    checkpoint = tmp_path / "broken"
    phi4rv.save(model, processor, checkpoint)
    line[1] = str(checkpoint)
    assert main([*line, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    name = "decoder.layers.1.mlp.down_proj.weight"
    assert error == f"error: {checkpoint}: {name} holds {word}; nothing can be trained from it, take another checkpoint"


def entry(step: int, loss: float = 1.0, norm: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": norm}


def test_a_streak_ends_with_a_finite_step() -> None:
    skipped = SkippedSteps(lambda: None)
    for step in range(1, PATIENCE):
        skipped.add(entry(step, norm=math.inf))
    skipped.add(entry(PATIENCE))
    for step in range(PATIENCE + 1, 2 * PATIENCE):
        skipped.add(entry(step, loss=math.nan))
    with pytest.raises(UserError, match=r"steps 11 to 20: .*no checkpoint was saved"):
        skipped.add(entry(2 * PATIENCE, norm=math.nan))


def test_a_streak_says_where_the_weights_are_broken() -> None:
    def check() -> None:
        check_weights([("a", torch.zeros(2)), ("b", torch.tensor([1.0, math.nan]))], "the model in memory")

    skipped = SkippedSteps(lambda: Path("step-3"), check)
    with pytest.raises(UserError, match="the model in memory: b holds NaN"):
        for step in range(PATIENCE):
            skipped.add(entry(step, math.nan))


def test_spikes() -> None:
    """By hand: of 16 losses 1.0, 1.2, 1.0, 1.2, … the median is 1.1 and the median deviation 0.1."""
    spikes, usual = LossSpikes(), [1.0, 1.2] * (MIN_WINDOW // 2)
    assert [spikes.add(x) for x in usual] == [None] * MIN_WINDOW
    limit = 1.1 + DEVIATIONS * 0.1
    assert LossSpikes(usual).add(limit - 0.01) is None
    assert LossSpikes(usual).add(limit + 0.01) == pytest.approx(limit)
    assert LossSpikes(usual[1:]).add(100.0) is None, "too few to compare with"
    assert LossSpikes(usual).add(0.0) is None, "a loss that falls is no spike"
    falling = LossSpikes()
    assert all(falling.add(10 * 0.9**i) is None for i in range(100))
    assert len(falling.recent) == anomalies.WINDOW
