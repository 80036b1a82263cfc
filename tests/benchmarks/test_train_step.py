"""The benchmark of a training step: that both sides take the same step on the same rows, and how it is judged."""

from __future__ import annotations

import dataclasses
import os
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import models, train_step
from benchmarks.jobs import run_in_process
from benchmarks.training import contenders
from benchmarks.training.batches import CASES, TOKENS, count_work, grid, make_batches
from phi4rv.batch import NO_LABEL
from phi4rv.checkpoint.huggingface import HF_PREFIXES, hf_name
from phi4rv.config import Config
from phi4rv.quantization.float8_linear import Float8Linear
from train.data.flops import flops

CPU = torch.device("cpu")


def test_rows_are_full_and_alike_in_both_cases() -> None:
    config = dataclasses.replace(Config(), vocab_size=1000)
    images = make_batches("images", config, TOKENS, 2)
    for row, text in zip(images, make_batches("text", config, TOKENS, 2), strict=True):
        assert 0.98 * TOKENS < len(row.input_ids) <= TOKENS
        assert torch.equal(row.cu_seqlens, text.cu_seqlens)
        assert torch.equal(row.targets() == NO_LABEL, text.targets() == NO_LABEL)
        assert len(row.patches) > 2000 and not len(text.patches)
        assert row.labels is not None and (row.labels[row.cu_seqlens[:-1].long()] == NO_LABEL).all()
        assert (row.targets()[row.image_positions[:-1]] == NO_LABEL).all()
        document = torch.bucketize(row.image_positions, row.cu_seqlens, right=True)
        for a, b in pairwise(row.cu_patches.tolist()):  # an image lies in one document, without gaps
            assert len(document[a:b].unique()) == 1 and row.image_positions[b - 1] - row.image_positions[a] == b - a - 1
    tokens = [n for row in images for n in row.cu_seqlens.diff().tolist()]
    patches = [n for row in images for n in row.grids.prod(1).tolist()]
    labelled = sum(int((row.targets() != NO_LABEL).sum()) for row in images)
    assert count_work(config, images)["operations"] == flops(config, tokens, patches, labelled).total


def test_grid() -> None:
    assert grid(3600) == (45, 80) and grid(1) == (1, 1)
    assert all(r * c <= n < r * (c + 1) for n in range(1, 500) for r, c in [grid(n)])


def same_weights(ours: contenders.Phi4RVTrainer, theirs: contenders.TransformersTrainer) -> None:
    def state(prefix: str, strip: str) -> dict[str, Tensor]:
        named = ours.model.named_parameters()
        return {hf_name(n).removeprefix(strip): p.detach().clone() for n, p in named if n.startswith(prefix)}

    theirs.decoder.load_state_dict(state("decoder.", ""))
    theirs.tower.load_state_dict(state("vision.", HF_PREFIXES[0][1]))
    theirs.projector.load_state_dict(state("projector.", "model.mm_projector."))


@pytest.mark.parametrize("case", CASES)
def test_both_sides_take_the_same_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses before, and after two updates of a rate that changes them."""
    monkeypatch.setattr(contenders, "STAGE", dataclasses.replace(contenders.STAGE, lr=3e-3))
    monkeypatch.setattr(models, "INIT_STD", 0.3)
    config = train_step.TINY
    ours = contenders.Phi4RVTrainer(config, "torch", CPU, torch.float32)
    theirs = contenders.TransformersTrainer(config, CPU, torch.float32)
    same_weights(ours, theirs)
    assert sum(p.numel() for p in theirs.params) == sum(p.numel() for p in ours.optimizer.params.values())
    rows = make_batches(case, config, train_step.TINY_TOKENS, 3)
    losses = [(ours.step(rows), theirs.step(rows)) for _ in range(3)]
    assert losses[0][0] - losses[2][0] > 0.1
    for own, peer in losses:
        assert own == pytest.approx(peer, rel=1e-4)


def test_masters_keep_what_bfloat16_weights_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate under half a bit of most weights both sides still learn the same."""
    monkeypatch.setattr(contenders, "STAGE", dataclasses.replace(contenders.STAGE, lr=1e-4))
    monkeypatch.setattr(models, "INIT_STD", 0.3)
    config = train_step.TINY
    ours = contenders.Phi4RVTrainer(config, "torch", CPU, torch.bfloat16)
    theirs = contenders.TransformersTrainer(config, CPU, torch.bfloat16)
    same_weights(ours, theirs)
    for params, masters in (
        (theirs.params, theirs.masters),
        (list(ours.optimizer.params.values()), list(ours.optimizer.masters.values())),
    ):
        with torch.no_grad():
            for p, m in zip(params, masters, strict=True):
                m.copy_(p)
    rows = make_batches("text", config, train_step.TINY_TOKENS, 2)
    losses = [(ours.step(rows), theirs.step(rows)) for _ in range(8)]
    assert losses[0][0] - losses[-1][0] > 0.05
    for own, peer in losses:
        assert own == pytest.approx(peer, rel=5e-3)


def test_layers_are_chosen_by_memory() -> None:
    config = Config()
    layers = [train_step.layers_that_fit(config, memory * 10**9, TOKENS, 6000) for memory in (40, 80, 141, 10**4)]
    assert layers[0] == 1 and layers[3] == config.num_hidden_layers
    assert layers == sorted(layers) and 2 <= layers[1] < layers[2] < 20
    one, two = (train_step.count_bytes(config, n, TOKENS, 0) for n in (1, 2))
    weights = 2 * 5120 + 5120 * (7680 + 5120 + 3 * 17920)  # norms and products of a layer
    assert two - one == 20 * weights + TOKENS * (40 * 5120 + 8 * 17920)


def record(rate: float, mfu: float, last: float = 11.0) -> dict[str, Any]:
    return {"tokens_per_second": rate, "mfu": mfu, "memory": 2**30, "losses": [11.5, last]}


def result(device: str = "cuda", **sides: Any) -> dict[str, Any]:
    made = {name.replace("liger", "transformers + Liger"): {case: r for case in CASES} for name, r in sides.items()}
    about = {"device": device, "layers": 3, "rows": 8, "tokens": TOKENS, "product": 8e14}
    return {**about, "sides": {"cuda": {"reason": "no nvcc"}, **made}}


def verdicts(judged: list[dict[str, Any]]) -> dict[str, str]:
    return {f"{goal['case']} {goal['name']}": goal["verdict"] for goal in judged}


def test_goals() -> None:
    sides = {"torch": record(90, 0.3), "transformers": record(60, 0.2), "liger": record(120, 0.3)}
    fast = result(triton=record(200, 0.52), **sides, **{"triton, fp8": record(250, 0.6, last=11.02)})
    judged = train_step.goals(fast)
    assert [goal["value"] for goal in judged] == [0.52, pytest.approx(200 / 120), 1.25] * 2
    assert verdicts(judged) == {
        "text MFU": "missed", "text over transformers": "met", "text fp8 over bfloat16": "missed",
        "images MFU": "met", "images over transformers": "met", "images fp8 over bfloat16": "missed",
    }  # fmt: skip
    assert "no nvcc" in train_step.table(fast) and "52.0% MFU" in train_step.table(fast)


def test_rows() -> None:
    sides = {"torch": record(90, 0.3), "transformers": record(60, 0.2), "liger": record(120, 0.3)}
    text, fp8, mfu, *_ = train_step.table_rows(result(triton={**record(200, 0.52), "spread": 0.01}, **sides))
    assert (text.what, text.value, text.peer, text.verdict) == ("text, 3 decoder layers", 200, train_step.LIGER, "met")
    assert text.ratio == pytest.approx(200 / 120) and text.share == 0.52 and text.noise == 0.01 and not text.tiny
    assert (
        fp8.value is None and fp8.peer == "triton" and fp8.reason == "cuda: no nvcc" and fp8.verdict == "not measured"
    )
    assert mfu.value == 52 and mfu.goal == "55%" and mfu.verdict == "missed"
    late = {side: {"reason": "out of time"} for side in train_step.CONTENDERS}
    for row in train_step.table_rows({**result(), "sides": late, "device": "cpu"}):
        assert row.value is None and row.ratio is None and row.tiny


def test_a_compiled_peer_learns_the_same() -> None:
    """Run eagerly here: what is compiled, and that nothing else changes."""
    rows = make_batches("images", train_step.TINY, 64, 1)
    losses = []
    for how in ("", "compiled"):
        torch.manual_seed(0)
        side = contenders.TransformersTrainer(train_step.TINY, CPU, torch.float32, how)
        layers = [*side.decoder.model.layers, *side.tower.encoder.layers]
        assert all((layer._compiled_call_impl is not None) == bool(how) for layer in layers)
        with torch.compiler.set_stance("force_eager"):
            losses.append(side.step(rows))
    assert losses[0] == losses[1]


def test_what_does_not_learn_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    last = 11.2
    others = {"torch": record(90, 0.3), "transformers": record(60, 0.2)}
    wrong = result(triton=record(200, 0.9, last), **others, **{"triton, fp8": record(250, 0.6, last)})
    unsure = result(triton=record(200, 0.9), transformers=record(60, 0.2))  # nothing to hold its losses to
    for found in (wrong, unsure, {**result(triton=record(200, 0.9), **others), "device": "cpu"}):
        assert set(verdicts(train_step.goals(found)).values()) == {"not measured"}
    monkeypatch.setattr(contenders.Phi4RVTrainer, "step", lambda self, rows: float("nan"))
    with pytest.raises(ValueError, match=r"^the losses of text are \[nan, nan\]"):
        train_step.measure("torch", train_step.TINY, "cpu", 64, 1, 1e12)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, side, reason in (
        ("liger_kernel", train_step.LIGER, "Liger-Kernel is not installed"),
        ("transformers", train_step.LIGER, "transformers is not installed"),
        ("flash_attn", "transformers, flash-attn", "flash-attn is not installed"),
    ):
        monkeypatch.setattr(
            train_step.importlib.util, "find_spec", lambda name, gone=missing: None if name == gone else 1
        )
        assert train_step.unavailable_reason(side, CPU) == reason
    assert train_step.unavailable_reason("torch", CPU) is None
    monkeypatch.undo()
    assert train_step.unavailable_reason("transformers", CPU) is None
    assert train_step.unavailable_reason("transformers, compiled", CPU) == "not on a CPU"


def test_fp8_is_trained_in_fp8() -> None:
    model = contenders.Phi4RVTrainer(train_step.TINY, "torch", CPU, torch.float32, float8=True).model
    assert sum(isinstance(m, Float8Linear) for m in model.modules()) == 4 * train_step.TINY.num_hidden_layers


def test_a_process_of_its_own() -> None:
    assert run_in_process(divmod, (7, 2), 60) == ((3, 1), None)
    assert run_in_process(int, ("x",), 60)[1] == "ValueError: invalid literal for int() with base 10: 'x'"
    assert run_in_process(os._exit, (9,), 60)[1] == "the process ended with 9"
    assert run_in_process(time.sleep, (600,), 0.5)[1] == "no answer in 0.5 s"


def test_everything_runs() -> None:
    kept: list[dict[str, Any]] = []
    found = train_step.run(on_result=lambda so_far: kept.append(so_far))
    assert len(kept) == len(train_step.CONTENDERS)
    sides = found["sides"]
    assert sides["triton"] == sides["cuda"] == {"reason": "not on a CPU"}
    for side in ("transformers", "torch"):
        for case in CASES:
            assert sides[side][case]["tokens_per_second"] > 0 and 4 < sides[side][case]["losses"][0] < 5
    if "reason" in sides["transformers + Liger"]:
        assert sides["transformers + Liger"]["reason"] == "Liger-Kernel is not installed"
    assert "tiny" in train_step.table(found)
