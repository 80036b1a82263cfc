"""The stages against the report's Tables 2 and 3, and the learning rate against its definition."""

import dataclasses
import itertools
import math
from typing import Any

import pytest

from phi4rv.errors import UserError
from train import recipe
from train.optimizers.adamw import learning_rate
from train.options import arguments
from train.recipe import Stage, stage

# Copied from the report, table by table.
REPORT: dict[int, dict[str, Any]] = {
    1: {
        "trains": {"projector"},
        "lr": 1e-3,
        "schedule": "cosine",
        "min_lr_ratio": 0,
        "warmup": 0.03,
        "weight_decay": 0,
        "beta1": 0.9,
        "beta2": 0.999,
        "clip": 1.0,
        "global_batch": 1024,
        "sequence_length": 2048,
        "epochs": 1,
    },
    2: {
        "trains": {"vision", "projector", "decoder"},
        "lr": 2e-5,
        "schedule": "cosine",
        "min_lr_ratio": 0.1,
        "warmup": 500,
        "weight_decay": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "clip": 1.0,
        "global_batch": 1920,
        "sequence_length": 8192,
        "epochs": 1,
    },
}
REPORT[3] = {**REPORT[2], "lr": 7e-7, "sequence_length": 16384}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_stages_are_the_reports(number: int) -> None:
    chosen = dataclasses.asdict(stage(number, False, {}))
    chosen["trains"] = set(chosen["trains"])
    assert {key: chosen[key] for key in REPORT[number]} == REPORT[number]
    assert chosen["max_steps"] == 0
    assert chosen["too_long"] == "drop" and chosen["order"] == "shuffled"
    ours = {
        "max_steps",
        "too_long",
        "order",
        "sequence_multiple",
        "optimizer",
        "clipping",
        "linear",
        "lora_rank",
        "lora_alpha",
        "lora_targets",
        "frozen_weights",
    }
    assert set(chosen) == {*REPORT[number]} | ours, "a field that no table was compared with"
    assert (chosen["optimizer"], chosen["linear"], chosen["lora_rank"]) == ("adamw", "dtype", 0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_embedded_model_changes_only_rate_warmup_and_sizes(number: int) -> None:
    """Nothing else may differ from the report where a tiny random model is trained."""
    published, embedded = (dataclasses.asdict(stage(number, e, {})) for e in (False, True))
    changed = {key for key in published if published[key] != embedded[key]}
    assert changed <= {
        "lr",
        "warmup",
        "global_batch",
        "sequence_length",
        "max_steps",
        "epochs",
        "min_lr_ratio",
        "order",
    }
    assert embedded["max_steps"] > 0


def test_overrides_win_over_both_and_none_is_no_override() -> None:
    chosen = stage(2, True, {"lr": 3e-4, "clip": None, "sequence_length": 512, "schedule": "constant"})
    assert (chosen.lr, chosen.sequence_length, chosen.schedule) == (3e-4, 512, "constant")
    assert chosen.clip == 1.0
    assert stage(2, False, {"warmup": 0.0}).warmup == 0


def test_every_field_but_the_trained_parts_is_an_option() -> None:
    assert set(recipe.options()) == {f.name for f in dataclasses.fields(Stage)} - {"trains"}
    values = vars(arguments(["--lr", "1", "--global-batch", "2", "--schedule", "constant"]))
    assert {name for name in recipe.options() if values[name] is not None} == {"lr", "global_batch", "schedule"}
    assert [type(values[name]) for name in ("lr", "global_batch", "schedule")] == [float, int, str]


def test_defaults_are_told_by_stage() -> None:
    assert recipe.defaults("lr", embedded=False) == "0.001, 2e-05, 7e-07 in stages 1, 2, 3"
    assert recipe.defaults("max_steps") == "0; without --data 60, 640, 300 in stages 1, 2, 3"
    assert recipe.defaults("epochs") == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("lr", "clip", "global_batch", "sequence_length", "epochs") for value in (0, -1)),
        *((name, -1) for name in ("warmup", "weight_decay", "max_steps")),
        *((name, value) for name in ("min_lr_ratio", "beta1", "beta2") for value in (-0.1, 1, 1.5)),
        *((name, math.nan) for name in ("lr", "clip", "warmup", "weight_decay", "min_lr_ratio", "beta1", "beta2")),
        *((name, math.inf) for name in ("lr", "warmup", "weight_decay")),
        ("schedule", "linear"),
        ("too_long", "cut"),
    ],
)
def test_a_value_out_of_range_names_its_option(name: str, value: Any) -> None:
    with pytest.raises(UserError, match="^--" + name.replace("_", "-") + ": ") as error:
        stage(2, False, {name: value})
    assert str(value) in str(error.value)
    assert "must be" in str(error.value)


@pytest.mark.parametrize("number", [0, 4, -1])
def test_an_unknown_stage(number: int) -> None:
    with pytest.raises(UserError, match=rf"--stage: {number} is unknown, must be one of 1, 2, 3"):
        stage(number, False, {})


def definition(lr: float, low: float, warmup: int, step: int, steps: int) -> float:
    """Written from the report's words: linear from 0, then half a cosine that ends at the last step."""
    if step + 1 <= warmup:
        return lr * (step + 1) / warmup
    x = 1.0 if steps - 1 == warmup else (step - warmup) / (steps - 1 - warmup)
    return (lr + low) / 2 + (lr - low) / 2 * math.cos(math.pi * x)


@pytest.mark.parametrize(
    ("number", "steps", "warmup", "low"),
    [(1, 1000, 30, 0.0), (1, 101, 4, 0.0), (2, 3000, 500, 2e-6), (3, 1600, 500, 7e-8), (2, 502, 500, 2e-6)],
)
def test_learning_rate_is_its_definition(number: int, steps: int, warmup: int, low: float) -> None:
    chosen = stage(number, False, {})
    rates = [learning_rate(chosen, step, steps) for step in range(steps)]
    expected = [definition(chosen.lr, low, warmup, step, steps) for step in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))
    assert max(rates) == rates[warmup - 1] == chosen.lr
    assert rates[-1] == pytest.approx(low, abs=1e-18)
    assert min(rates) >= 0


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    chosen = stage(2, False, {})
    assert [learning_rate(chosen, step, 3) for step in range(3)] == pytest.approx([4e-8, 8e-8, 1.2e-7])


def test_constant_schedule_and_no_warmup() -> None:
    chosen = stage(2, False, {"schedule": "constant", "warmup": 2.0})
    assert [learning_rate(chosen, step, 5) for step in range(5)] == [1e-5, 2e-5, 2e-5, 2e-5, 2e-5]
    unwarmed = stage(2, False, {"warmup": 0.0})
    assert learning_rate(unwarmed, 0, 10) == 2e-5
    assert learning_rate(unwarmed, 0, 1) == 2e-5, "one step alone must move the weights"
    assert learning_rate(unwarmed, 9, 10) == pytest.approx(2e-6)
