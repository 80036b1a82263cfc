"""The benchmark of inference: what must be read and computed, who is measured, and how it is judged."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.inference import cases as timed_cases
from benchmarks.inference import command, contenders, energy
from benchmarks.inference.cases import percentile
from benchmarks.inference.contenders import Phi4RVEngine, TransformersEngine
from benchmarks.inference.roofline import (
    FULL,
    TINY,
    cache_bytes,
    matrix_bytes,
    part_formats,
    prefill_operations,
    step_bytes,
    weight_bytes,
    with_rates,
)
from benchmarks.inference.table import goals, same_first_token, table, table_rows
from benchmarks.inference.workload import Workload, patches_per_image, random_prompt
from phi4rv.config import Config
from phi4rv.ops.low_precision import quantize
from train.synthetic.tiny_model import tiny_config

CPU = torch.device("cpu")


def test_what_a_token_must_read() -> None:
    """The published model's figures, in GB."""
    read = {form: round(weight_bytes(Config(), form) / 1e9, 1) for form in ("bf16", "fp8", "int4")}
    assert read == {"bf16": 28.3, "fp8": 14.2, "int4": 8.1}
    assert cache_bytes(Config(), 1) == 204800
    assert step_bytes(Config(), "bf16", 4096) - step_bytes(Config(), "bf16", 0) == 4096 * 204800
    assert prefill_operations(Config(), 4096) == pytest.approx(118e12, rel=0.01)


def test_weights_are_those_of_the_model() -> None:
    """All that the decoder has, but of the embeddings one row; unused parts of the tower count nowhere."""
    config = dataclasses.replace(Config(), num_hidden_layers=3)
    with torch.device("meta"):
        decoder = command.Phi4RV(config, command.Operations("torch")).decoder
    parameters = sum(p.numel() for p in decoder.parameters()) - (config.vocab_size - 1) * config.hidden_size
    assert weight_bytes(config, "bf16") == 2 * parameters


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("shape", [(3, 256), (5, 200), (7, 1)])
def test_bytes_of_a_quantised_matrix(form: str, shape: tuple[int, int]) -> None:
    q = quantize(torch.randn(shape), form)
    assert matrix_bytes(*shape, form) == q.data.nbytes + q.scales.nbytes


def test_formats_of_the_head() -> None:
    assert part_formats("bf16") == {} and part_formats("int4") == {"decoder": "int4"}
    assert part_formats("fp8") == {"decoder": "fp8", "head": "fp8"}


def test_rates() -> None:
    config, ceilings = Config(), {"copy": 3e12, "product": 8e14, "upload": 5e10}
    cases = {
        "decode": {"seconds": step_bytes(config, "int4", 4096) / 1.5e12},
        "first token": {"seconds": 0.25, "patches": 3600},
        "second question": {"seconds": 0.1, "first_seconds": 0.6},
        "at once": {"tokens_per_second": 320.0, "one": 20.0},
        "load": {"seconds": 1.0, "bytes": 4e10},
        "tower": {"reason": "out of memory"},
    }
    found = with_rates("cuda, int4", cases, config, FULL, ceilings)
    assert found["decode"]["share"] == pytest.approx(0.5) and found["load"]["share"] == pytest.approx(0.8)
    assert found["second question"]["ratio"] == pytest.approx(6) and found["at once"]["ratio"] == 16
    tower = 3600 * 26 * 2 * (4 * 1152**2 + 2 * 1152 * 4304) + 26 * 4 * 1152 * 3600**2
    projector = 2 * 3600 * (768 * 1152 + 1152 * 5120 + 5120**2)
    text = prefill_operations(config, 3856)
    assert found["first token"]["operations_per_second"] == pytest.approx((tower + projector + text) / 0.25)
    assert found["tower"] == {"reason": "out of memory"}


def result(device: str = "cuda", layers: int = 40, **changed: Any) -> dict[str, Any]:
    decode = {"share": 0.91, "seconds": 0.01, "top": [(7, -1.0)]}
    first = {"share": 0.6, "seconds": 0.2, "top": [(8, -2.0)]}
    sides: dict[str, Any] = {
        "cuda": {
            "decode": decode, "first token": first, "tower": {"ms": 9.0}, "second question": {"ratio": 4.0},
            "at once": {"reason": "out of memory"},
        },
        "triton": {"decode": {**decode, "share": 0.7, "seconds": 0.013}, "first token": {**first, "share": 0.66}},
        "cuda, fp8": {"decode": {**decode, "share": 0.79, "seconds": 0.006}},
        "cuda, int4": {"reason": "out of time"},
        "load": {"load": {"share": 0.85}},
        "transformers": {
            "decode": {"share": 0.3, "seconds": 0.033, "top": [(9, -0.9), (7, -1.05)]},
            "first token": {"share": 0.3, "seconds": 0.5, "top": [(8, -2.0)]},
        },
        "transformers, static cache": {"decode": {"reason": "out of time"}},
        "vLLM": {"decode": {"share": 0.99, "seconds": 0.001}},
    }  # fmt: skip
    return {"device": device, "layers": layers, "sides": {**sides, **changed}}


def verdicts(judged: list[dict[str, Any]]) -> dict[str, str]:
    return {goal["name"]: goal["verdict"] for goal in judged}


def test_goals() -> None:
    judged = goals(result())
    assert verdicts(judged) == {
        "decode, bf16: share of the copy rate": "met",
        "decode, fp8: share of the copy rate": "missed",
        "decode, int4: share of the copy rate": "not measured",
        "first token: share of the product rate": "met",
        "decode over transformers": "met",
        "first token over transformers": "met",
        "tower and projector, ms": "met",
        "second question, times faster": "missed",
        "many requests at once over one": "not measured",
        "load: share of the copy rate to the GPU": "met",
    }
    values = {goal["name"]: goal["value"] for goal in judged}
    assert values["decode over transformers"] == pytest.approx(3.3)
    for partial in (result("cpu"), result(layers=39)):
        assert set(verdicts(goals(partial)).values()) == {"not measured"}
    slow = verdicts(goals(result(cuda={"tower": {"ms": 10.1}})))
    assert slow["tower and projector, ms"] == "missed"


def test_rows() -> None:
    given = {**result(), "many": 64}
    given["sides"]["cuda"]["decode"].update(tokens_per_second=100.0, spread=0.02)
    given["sides"]["triton"]["decode"].update(tokens_per_second=77.0)
    given["sides"]["cuda, fp8"]["decode"].update(tokens_per_second=160.0)
    given["sides"]["transformers"]["decode"].update(tokens_per_second=30.0)
    given["sides"]["vLLM"]["decode"].update(tokens_per_second=80.0)
    given["sides"]["cuda"]["second question"].update(seconds=0.05, first_seconds=0.2)
    given["sides"]["load"]["load"].update(seconds=0.7)
    found = {row.what: row for row in table_rows(given)}
    decode = found["decode, bf16"]
    assert (decode.value, decode.peer, decode.ratio, decode.noise) == (100, "vLLM", 1.25, 0.02)
    assert (decode.share, decode.ceiling, decode.goal, decode.verdict) == (0.91, "copy", "3x", "met")
    assert found["decode, fp8"].peer is None and found["decode, fp8"].verdict == "missed"
    assert found["decode, int4"].value is None and found["decode, int4"].reason == "cuda, int4: out of time"
    assert found["decode, bf16: share of the copy rate"].value == 91
    assert found["first token"].value == 200 and found["first token"].ratio == 2.5
    assert found["second question"].ratio == 4 and found["tower and projector"].value == 9
    assert found["64 requests at once"].reason == "cuda: out of memory" and found["load"].value == 0.7
    assert not any(row.tiny for row in found.values()) and all(row.verdict for row in found.values())
    assert all(row.what.endswith(", 39 decoder layers") for row in table_rows({**given, "layers": 39}))


def test_another_answer_is_not_faster() -> None:
    """Ours counts against transformers only where both make the first token alike."""
    assert same_first_token({"top": [(7, -1.0)]}, {"top": [(9, -0.9), (7, -1.05)]})
    assert not same_first_token({"top": [(7, -1.0)]}, {"top": [(7, -1.2)]})
    assert not same_first_token({"top": [(7, -1.0)]}, {"top": [(6, -1.0)]})
    other = {"decode": {"share": 0.3, "seconds": 0.033, "top": [(9, -0.9)]}}
    judged = goals(result(transformers=other))
    assert verdicts(judged)["decode over transformers"] == "not measured"


def test_layers_are_chosen_by_memory() -> None:
    layers = [command.layers_that_fit(Config(), FULL, memory * 10**9) for memory in (8, 24, 40, 80, 141)]
    assert layers[0] == 1 and layers[3:] == [40, 40] and 10 < layers[1] < layers[2] < 40


@pytest.mark.parametrize(("config", "shapes", "patches"), [(Config(), FULL, 3600), (tiny_config(), TINY, 91)])
def test_questions_have_their_length(config: Config, shapes: Any, patches: int) -> None:
    workload = Workload(config, CPU, shapes)
    assert patches_per_image(workload) == patches
    asked = random_prompt(workload, shapes.text, seed=1, image=True)
    sample = workload.processor.encode(asked)
    assert len(sample.image_positions) == patches and len(sample) - patches == shapes.text
    other = random_prompt(workload, shapes.text, seed=2, image=True)
    assert other.text != asked.text and other.images[0].tobytes() != asked.images[0].tobytes()
    assert len(workload.processor.encode(random_prompt(workload, shapes.prompt, seed=3))) == shapes.prompt


def test_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy.energy_counter() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab-12"))
    names: list[bytes] = []

    def handle(name: bytes, out: Any) -> int:
        names.append(name)
        return 0

    def counter(status: int) -> Any:
        def read(handle: Any, out: Any) -> int:
            out._obj.value = 2500
            return status

        return SimpleNamespace(
            nvmlInit_v2=lambda: 0, nvmlDeviceGetHandleByUUID=handle, nvmlDeviceGetTotalEnergyConsumption=read
        )

    read = energy.energy_counter(counter(0))
    assert read is not None and read() == 2.5 and names == [b"GPU-ab-12"]
    assert energy.energy_counter(counter(3)) is None  # not supported
    missing = counter(0)
    missing.nvmlInit_v2 = lambda: 9
    assert energy.energy_counter(missing) is None

    def no_library(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert energy.energy_counter() is None


def test_percentile() -> None:
    values = [float(n) for n in range(1, 102)]
    assert percentile(values, 99) == 100 and percentile(values, 50) == 51
    assert percentile([3.0, 1.0], 99) == pytest.approx(2.98)


def test_the_sides_give_the_same_answer_and_all_of_it() -> None:
    workload = Workload(tiny_config(), CPU, TINY)
    asked = random_prompt(workload, TINY.text, seed=5, image=True)
    with torch.no_grad():
        ours = Phi4RVEngine(workload, "torch", "bf16")
        answered = ours.answer(asked, 12)
        for static in (False, True):
            theirs = TransformersEngine(workload, "static cache" if static else "")
            assert theirs.answer(asked, 12).ids == answered.ids
            assert same_first_token({"top": ours.top(asked)}, {"top": theirs.top(asked)})
        assert len(answered.times) == 12 and answered.times == sorted(answered.times) and answered.joules is None
        batch = workload.processor([asked])
        torch.testing.assert_close(theirs.model.encode_images(batch), ours.encoder(asked)(), rtol=1e-4, atol=1e-5)
    clock = contenders.TokenRecorder()
    clock.take([1, 2])
    with pytest.raises(RuntimeError, match=r"^an answer has 2 tokens and should have 3$"):
        clock.answered(3)


def test_everything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "records.json"
    assert command.main(["--json", str(file)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())["results"]["inference"]
    assert "reason" not in json.dumps(found) and table(found) == printed.rstrip("\n")
    assert set(found["sides"]) == set(command.CONTENDERS["cpu"])
    for side, cases in found["sides"].items():
        figures = [r[k] for r in cases.values() for k in ("seconds", "ms", "tokens_per_second", "share") if k in r]
        assert figures and all(math.isfinite(f) and f > 0 for f in figures), side
    assert found["sides"]["torch"].keys() == {"decode", "first token", "tower", "second question", "at once"}
    assert found["sides"]["torch"]["second question"]["cached_tokens"] > 0
    assert "do not agree" not in printed and "is 0" in printed
    assert all(goal["value"] is not None and goal["verdict"] == "not measured" for goal in found["goals"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "41"], "--layers: 41 must be 0 to 40"),
        (["--checkpoint", "x"], "--checkpoint: goes with --protocol; speed is measured with random weights"),
        (["--second", "x"], "--seconds: 'x' is no number, must be above 0"),
    ],
)
def test_bad_input_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(options) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert command.unavailable_reason("torch, fp8", CPU, tmp_path) is None
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.unavailable_reason("transformers, static cache", CPU, tmp_path) == "transformers is not installed"
    assert command.unavailable_reason("vLLM", CPU, tmp_path) == "vLLM is not installed"
    assert str(command.unavailable_reason("load", CPU, None)).endswith("has room for a checkpoint")
    assert command.folder_with_space(1) is not None and command.folder_with_space(10**18) is None
    monkeypatch.undo()
    late = command.run(seconds=0)
    assert all(side == {"reason": "out of time"} for side in late["sides"].values()) and "out of time" in table(late)


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(side: Any) -> dict[str, Any]:
        raise ValueError("no tower\nat all")

    monkeypatch.setattr(timed_cases, "tower", fails)
    found = timed_cases.measure("transformers", tiny_config(), "cpu", TINY, Path())
    assert found["tower"] == {"reason": "ValueError: no tower"} and found["decode"]["seconds"] > 0
