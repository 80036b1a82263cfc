"""The model on a CUDA device: the golden cases in float32, bfloat16 beside it, training and generation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import phi4rv
from phi4rv.ops import cuda
from tests import parity
from tests.small import generate, small_checkpoint
from train import main
from train.synthetic import write_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
CASES = parity.cases()


@pytest.fixture(scope="module")
def on_gpu() -> tuple[phi4rv.Phi4RV, phi4rv.Processor]:
    # TF32 products would be a hundred times less exact than what is compared here.
    torch.backends.cuda.matmul.allow_tf32 = False
    return phi4rv.load(parity.CHECKPOINT, device="cuda", dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_golden_features_logits_and_loss(on_gpu: tuple[phi4rv.Phi4RV, phi4rv.Processor], case: parity.Case) -> None:
    model, processor = on_gpu
    sample = processor.encode(case.prompt)
    batch = phi4rv.pack([sample]).to("cuda")
    with torch.no_grad():
        if case.record["images"]:
            assert parity.relative(model.vision(batch).cpu(), case.tensors["vision"]) < 1e-4
            assert parity.relative(model.encode_images(batch).cpu(), case.tensors["projected"]) < 1e-4
        assert parity.relative(model(batch)[-8:].cpu(), case.tensors["logits_last8"]) < 1e-4
    answered = phi4rv.pack([parity.with_answer(sample, case.record["answer_ids"])]).to("cuda")
    assert model.loss(answered).item() == pytest.approx(case.record["loss"], rel=1e-4)


def test_golden_tokens(on_gpu: tuple[phi4rv.Phi4RV, phi4rv.Processor]) -> None:
    model, processor = on_gpu
    made = generate(model, processor, [case.prompt for case in CASES], 12)
    assert [generation.token_ids for generation in made] == [case.record["greedy"] for case in CASES]


@pytest.mark.parametrize("kernels", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("limits", [{}, {"overlap": False}, {"speculate": 0}, {"cache_dtype": "fp8"}], ids=str)
def test_engine_in_bfloat16(
    on_gpu: tuple[phi4rv.Phi4RV, phi4rv.Processor], limits: dict[str, Any], kernels: str
) -> None:
    """Graphs, overlap and drafts: a token that full recomputation would not choose was within rounding of the best."""
    if kernels == "cuda" and (why := cuda.unavailable_reason(torch.device("cuda"))):
        pytest.skip(why)
    rough, processor = phi4rv.load(parity.CHECKPOINT, device="cuda", dtype=torch.bfloat16, kernels=kernels)
    prompts = [case.prompt for case in CASES] * 3
    for prompt, made in zip(prompts, generate(rough, processor, prompts, 60, page_size=16, **limits), strict=True):
        sample = processor.encode(prompt)
        ids = torch.cat([sample.input_ids, torch.tensor(made.token_ids)])
        batch = phi4rv.pack([dataclasses.replace(sample, input_ids=ids)]).to("cuda")
        rows = slice(len(sample) - 1, len(ids) - 1)
        with torch.no_grad():
            logits, exact = rough(batch)[rows], on_gpu[0](batch)[rows]
        chosen = logits.gather(1, ids[len(sample) :, None].cuda()).squeeze(1)
        # A cache in fp8 keeps 4 bits where bfloat16 keeps 8.
        rounding = (16 if limits.get("cache_dtype") else 2) * (logits - exact).abs().amax(1)
        assert (logits.amax(1) - chosen <= rounding).all()


def test_bfloat16_is_near_float32(on_gpu: tuple[phi4rv.Phi4RV, phi4rv.Processor]) -> None:
    """Within 5 %: bfloat16 keeps 8 bits, a few roundings a layer."""
    rough, processor = phi4rv.load(parity.CHECKPOINT, device="cuda", dtype=torch.bfloat16)
    batch = processor([case.prompt for case in CASES]).to("cuda")
    with torch.no_grad():
        ours, exact = rough(batch).double(), on_gpu[0](batch).double()
    assert float((ours - exact).norm() / exact.norm()) < 0.05


def test_training_in_bfloat16_lowers_the_loss(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", 2, "train", 40, seed=0)
    out = tmp_path / "out"
    options = ["--max-steps", "20", "--lr", "1e-3", "--global-batch", "8", "--sequence-length", "2048", "--warmup", "0"]
    checkpoint = small_checkpoint(tmp_path)
    status = main.main(["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(out), *options])
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert status == 0
    assert losses[-1] < losses[0]
