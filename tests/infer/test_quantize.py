"""Scales found on prompts, what quantised weights cost, and the command that does and says all that."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from infer.heldout import Question, generate
from infer.quantization import calibration
from infer.quantization.calibration import (
    LayerInputs,
    collect_inputs,
    compute_logits,
    layer_error,
    logits_error,
    quantize_calibrated,
    scale_errors,
)
from infer.quantize import compare, prompts_of, questions_of
from infer.quantize import main as quantize_command
from infer.requests.outputs import Generation
from infer.requests.sampling_params import SamplingParams
from phi4rv import Prompt, pack
from phi4rv.ops.low_precision import FORMATS, dequantize, quantize
from phi4rv.processing.answers import parse_answer
from phi4rv.quantization.quantized_linear import parse_formats, quantized_layers
from tests import parity
from tests.infer.test_weights import MIXED, Tiny, load, same_model, same_weight
from tests.small import mixed_data, record, small_checkpoint, write_jsonl

# Calibration.


def heavy_tailed(n: int, k: int, seed: int) -> Tensor:
    """Of Student's t with 3 degrees of freedom, where clipping pays."""
    generator = torch.Generator().manual_seed(seed)
    normal, others = torch.randn(n, k, generator=generator), torch.randn(3, n, k, generator=generator)
    return normal / others.square().mean(0).sqrt()


def test_shrunk_scales_clip() -> None:
    """By hand: at half the scale the largest value is off by half, and the small ones are rounded twice as finely."""
    weight = torch.zeros(1, 128)
    weight[0, :3] = torch.tensor([7.0, 1.5, -7.0])
    assert dequantize(quantize(weight, "int4"), torch.float32)[0, :3].tolist() == [7.0, 2.0, -7.0]
    half = dequantize(quantize(weight, "int4", torch.full((1, 1), 0.5)), torch.float32)
    assert half[0, :3].tolist() == [3.5, 1.5, -3.5]
    int8 = dequantize(quantize(torch.tensor([[127.0, 0.5, -127.0]]), "int8", torch.tensor([0.5])), torch.float32)
    assert int8.tolist() == [[63.5, 0.5, -63.5]]


def correlated(rows: int, k: int, seed: int) -> Tensor:
    """Columns of very different sizes that have something in common, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    common = torch.randn(rows, 1, generator=generator)
    return (torch.randn(rows, k, generator=generator) + common + 0.5) * torch.logspace(-1.5, 0.5, k)[order]


def gram(x: Tensor) -> Tensor:
    inputs = LayerInputs(x.shape[1])
    for part in x.split(7):
        inputs.add(part)
    return inputs.gram


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [128, 300])
def test_errors_of_each_scale(format: str, k: int) -> None:
    """Those of the outputs themselves, group by group; of a row the groups' errors are added up."""
    weight, x = heavy_tailed(5, k, 0), correlated(50, k, 1)
    q = quantize(weight, format)
    off = (weight.double() - dequantize(q, torch.float64)).split(128, 1)
    parts = [(a.double() @ d.T).square().sum(0) for a, d in zip(x.split(128, 1), off, strict=True)]
    expected = torch.stack(parts, 1)
    expected = expected.sum(1) if q.scales.ndim == 1 else expected
    torch.testing.assert_close(scale_errors(weight, q, gram(x)).double(), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("format", FORMATS)
def test_calibration_lowers_the_weighted_error(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no scale is it more than without, and none of the tried factors is better; in 4 bits much less in all."""
    monkeypatch.setattr(calibration, "CHUNK_ROWS", 40)
    weight, seen = heavy_tailed(96, 300, 2), gram(correlated(500, 300, 3))
    chosen = scale_errors(weight, quantize_calibrated(weight, format, seen), seen)
    for factor in calibration.SCALE_FACTORS:
        other = scale_errors(weight, quantize(weight, format, torch.full(chosen.shape, factor)), seen)
        assert (chosen <= other * (1 + 1e-5)).all(), factor
    plain = scale_errors(weight, quantize(weight, format), seen)
    assert float(chosen.sum() / plain.sum()) < (0.8 if "4" in format else 1.0)


def test_calibration_lowers_the_error_of_the_output() -> None:
    """On inputs drawn anew."""
    weight = heavy_tailed(64, 256, 4)
    q = quantize_calibrated(weight, "int4", gram(correlated(2000, 256, 5)))
    fresh = correlated(500, 256, 6)
    errors = [layer_error("x", weight, w, fresh).output_error for w in (q, quantize(weight, "int4"))]
    assert errors[0] < 0.9 * errors[1]


def test_dead_inputs_and_zero_weights() -> None:
    for format in FORMATS:
        weight = torch.randn(4, 130, generator=torch.Generator().manual_seed(0))
        q = quantize_calibrated(weight, format, gram(torch.zeros(3, 130)))
        assert same_weight(q, quantize(weight, format)), "nothing to choose by: the scale stays"
        assert not dequantize(
            quantize_calibrated(torch.zeros(4, 130), format, gram(torch.ones(3, 130))), torch.float32
        ).any()


def test_inputs_are_those_that_the_layers_read(tiny: Tiny) -> None:
    """All of a layer's, of prompts and answers, added up; few rows of each are kept."""
    model, processor = tiny
    answered = [Generation(case.prompt, 0, 0, [7, 300 + i, 9][:i]) for i, case in enumerate(parity.cases())]
    found = collect_inputs(model, processor, answered, parse_formats("int8,head=int8,tower=int8"))
    logits = compute_logits(model, processor, answered)
    assert len(found) == 2 * 4 + 2 * 6 + 1
    expected = torch.zeros(2, 128, 128)
    rows = []
    for generation in answered:
        sample = processor.encode(generation.prompt)
        ids = torch.tensor([*sample.input_ids.tolist(), *generation.token_ids])
        given = pack([dataclasses.replace(sample, input_ids=ids)])
        x = model.decoder.embed_tokens(given.input_ids).detach()
        if len(given.patches):
            x[given.image_positions] = model.encode_images(given).detach()
        x = F.rms_norm(x, (256,), model.decoder.layers[0].input_layernorm.weight.detach(), 1e-5)
        expected += torch.stack([half.T @ half for half in x.split(128, 1)])
        rows.append(x)
        last = model(given).detach()[-calibration.LOGIT_ROWS :]
        torch.testing.assert_close(logits[: len(last)], last, rtol=1e-3, atol=1e-4)
        logits = logits[len(last) :]
    assert not len(logits)
    first = found["decoder.layers.0.self_attn.qkv_proj"]
    torch.testing.assert_close(first.gram, expected, rtol=1e-3, atol=1e-2)
    kept, everything = torch.cat(first.rows), torch.cat(rows)
    assert 8 < len(kept) <= calibration.KEPT_ROWS
    assert torch.cdist(kept, everything, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-3
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_few_rows_are_kept_of_many() -> None:
    inputs = LayerInputs(4)
    for count in (1, 1000, 7, 9, *[50] * 30):
        inputs.add(torch.ones(count, 4))
    assert inputs.gram.shape == (1, 128, 128) and (inputs.gram[0, :4, :4] == 2517).all()
    assert not inputs.gram[0, 4:].any()
    assert [len(rows) for rows in inputs.rows[:4]] == [1, 8, 7, 5] and len(torch.cat(inputs.rows)) == 64


# What it costs.


def test_errors_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "CHUNK_ROWS", 7)
    weight, rows = heavy_tailed(20, 200, 0), torch.randn(9, 200, generator=torch.Generator().manual_seed(1))
    for format in FORMATS:
        q = quantize(weight, format)
        off = weight.double() - dequantize(q, torch.float64)
        error = layer_error("a.b", weight, q, rows)
        assert (error.layer, error.format) == ("a.b", format)
        assert error.weight_error == pytest.approx(float(off.norm() / weight.norm()), rel=1e-4)
        right = rows.double() @ weight.double().T
        assert error.output_error == pytest.approx(float((rows.double() @ off.T).norm() / right.norm()), rel=1e-4)
    assert layer_error("z", weight * 0, quantize(weight * 0, "int8"), rows).output_error == 0.0


def test_errors_of_logits() -> None:
    """Two rows by hand: KL of (1/2, 1/2) from (1/4, 3/4) is ln 2 - ln(3) / 2; that of the other row is nothing."""
    right = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    given = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = logits_error(given, right)
    assert found["kl"] == pytest.approx((math.log(2) - math.log(3) / 2) / 2, rel=1e-5)
    assert found["same_first"] == 0.5
    assert found["relative"] == pytest.approx(float((given - right).norm() / right.norm()))
    assert logits_error(right, right) == {"relative": 0.0, "kl": 0.0, "same_first": 1.0}


def test_answers_are_compared(tiny: Tiny) -> None:
    processor = tiny[1]
    said = {text: processor.tokenizer.encode(text, add_special_tokens=False).ids for text in ("yes", "no", "yes it")}

    def given(*texts: str) -> list[Generation]:
        return [Generation(Prompt("?"), 1, 0, said[text]) for text in texts]

    questions = [Question(Prompt("?"), parse_answer(right)) for right in ("yes", "no", "yes")]
    found = compare(processor, questions, given("yes", "no", "yes"), given("yes", "no", "yes it"))
    assert (found["questions"], found["same_answers"]) == (3, 2)
    assert found["tokens_before_difference"] == len(said["yes"])
    assert (found["before"]["exact_match"], found["after"]["exact_match"]) == (1.0, 2 / 3)
    assert compare(processor, questions[:1], given("no"), given("no"))["tokens_before_difference"] is None


# The command.


def run(arguments: list[Any]) -> int:
    return quantize_command([*map(str, arguments), "--device", "cpu"])


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folder, report and printed figures agree with one another, and calibration changes scales alone."""
    pictures = parity.CHECKPOINT / "images"
    heldout = write_jsonl(
        tmp_path / "heldout.jsonl",
        [
            record("<image>\nWhat is it?", "<nothink>A.", str(pictures / "1_0.png")),
            record("And?", "<think>a</think>B."),
        ],
    )
    line = ["--checkpoint", checkpoint, "--weights", MIXED, "--dtype", "float32"]
    line += ["--heldout", heldout, "--max-new-tokens", 4, "--samples", 2]
    reports = {}
    for name, more in (("plain", []), ("calibrated", ["--calibration", pictures])):
        out, file = tmp_path / name, tmp_path / f"{name}.json"
        assert run([*line, "--output", out, "--report", file, *more]) == 0
        reports[name] = report = json.loads(file.read_text())
        printed = capsys.readouterr().out
        assert printed.endswith(f"written: {out}\n")
        assert f"answers: {report['heldout']['same_answers']} of 2 the same" in printed
        model, processor = load(out)
        assert len(report["layers"]) == len(quantized_layers(model)) == 21
        assert {entry["layer"]: entry["format"] for entry in report["layers"]} == {
            path: layer.quantized.format for path, layer in quantized_layers(model).items()
        }
        held = sum(t.nbytes for f in out.glob("*.safetensors") for t in load_file(f).values())
        assert report["bytes_after"] == held < report["bytes_before"]
        plain, _ = load(checkpoint)
        assert len(prompts_of(pictures if more else None, 2)) == report["prompts"] == (2 if more else 4)
        asked = [question.prompt for question in questions_of(heldout, 2)]
        before = generate(plain, processor, asked, SamplingParams(max_new_tokens=4))
        rows = [compute_logits(m, processor, before) for m in (model, plain)]
        assert report["logits"]["relative"] == pytest.approx(logits_error(*rows)["relative"], rel=1e-3)
    assert same_model(load(tmp_path / "plain")[0], load(checkpoint, MIXED)[0])
    ours, theirs = (quantized_layers(load(tmp_path / name)[0]) for name in reports)
    assert not any(
        same_weight(ours[path].quantized, theirs[path].quantized) for path in ours if path.startswith("model.layers.")
    )
    errors = [
        sum(entry["output_error"] for entry in report["layers"] if entry["format"] == "int4")
        for report in reports.values()
    ]
    assert errors[1] < 0.95 * errors[0]


def test_calibration_on_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--checkpoint", small_checkpoint(tmp_path), "--weights", "int4_zero", "--samples", 5]
    assert run([*line, "--calibration", mixed_data(tmp_path), "--output", tmp_path / "out"]) == 0
    assert "qkv_proj" in capsys.readouterr().out
    assert len(prompts_of(tmp_path / "data.jsonl", 5)) == 5


BAD_CALLS: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "formats": (lambda d: ["--weights", "int5"], "--weights: 'int5' is unknown"),
    "taken": (lambda d: ["--output", d], "exists already; name a new folder"),
    "samples": (lambda d: ["--samples", 0], "--samples: 0 must be 1 to 10^9"),
    "tokens": (lambda d: ["--max-new-tokens", -1], "--max-new-tokens: -1 must be 1 to 10^9"),
    "report": (lambda d: ["--report", d / "none" / "r.json"], "is no folder; name a file in one that exists"),
    "pictures": (lambda d: ["--calibration", d], "--calibration: "),
    "records": (lambda d: ["--calibration", d / "none.jsonl"], "none.jsonl: cannot be read"),
    "heldout": (lambda d: ["--heldout", d / "none.jsonl"], "none.jsonl: cannot be read"),
    "checkpoint": (lambda d: ["--checkpoint", d / "none"], "not a folder"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_wrong_call_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    more, words = BAD_CALLS[name]
    line = ["--checkpoint", checkpoint, "--weights", "int8", "--output", tmp_path / "out"]
    assert run([*line, *more(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert not (tmp_path / "out").exists()
