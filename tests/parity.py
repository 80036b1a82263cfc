"""Errors against what the published code computed in float32: `python -m tests.parity` prints the table.

The golden cases lie in data/tiny-checkpoint/expected. Every error is relative; see ``relative``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import phi4rv
from phi4rv.checkpoint.huggingface import hf_name

CHECKPOINT = Path(__file__).parent / "data" / "tiny-checkpoint"
EXPECTED = CHECKPOINT / "expected"
BOUNDS = {"patches": 1e-5, "vision": 1e-4, "projected": 1e-4, "logits": 1e-4, "loss": 1e-4, "gradients": 1e-4}


@dataclass(frozen=True)
class Case:
    """One golden case: ``record`` of cases.json and the ``tensors`` beside it."""

    record: dict
    tensors: dict[str, Tensor]

    @property
    def prompt(self) -> phi4rv.Prompt:
        images = [CHECKPOINT / name for name in self.record["images"]]
        return phi4rv.Prompt(self.record["prompt"], images, self.record["mode"])


def cases() -> list[Case]:
    records = json.loads((EXPECTED / "cases.json").read_text())
    return [Case(record, load_file(EXPECTED / f"case{i}.safetensors")) for i, record in enumerate(records)]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The larger of |ours - theirs| / |theirs| by Euclidean norm and by largest element; 0 if empty."""
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    if not theirs.numel():
        return 0.0
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    norms = float((ours - theirs).norm() / theirs.norm())
    assert norms == norms, "nan"
    return max(norms, float((ours - theirs).abs().max() / theirs.abs().max()))


def relative_norms(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The worst error of a gradient's norm.

    Some true gradients are zero: a key bias adds the same to all scores of a row, which softmax ignores. What
    is measured there is rounding (1e-10 of the largest), so norms under 5e-5 of the largest count as that.
    """
    assert ours.keys() == theirs.keys()
    floor = 5e-5 * max(theirs.values())
    return max(abs(ours[name] - norm) / max(norm, floor) for name, norm in theirs.items())


def with_answer(sample: phi4rv.Sample, answer: list[int]) -> phi4rv.Sample:
    """``sample`` with the tokens of ``answer`` behind it, each its own label."""
    ids = torch.tensor(answer)
    labels = torch.cat([torch.full_like(sample.input_ids, -100), ids])
    return dataclasses.replace(sample, input_ids=torch.cat([sample.input_ids, ids]), labels=labels)


def gradients(model: phi4rv.Phi4RV, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter that ``loss`` depends on, by its published name."""
    named = {hf_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def errors(model: phi4rv.Phi4RV, processor: phi4rv.Processor, case: Case) -> dict[str, float]:
    """The error of each quantity of BOUNDS that the case has."""
    sample = processor.encode(case.prompt)
    batch = phi4rv.pack([sample]).to(model.device)
    found = {}
    with torch.no_grad():
        if case.record["images"]:
            found["patches"] = relative(batch.patches, case.tensors["patches"])
            found["vision"] = relative(model.vision(batch), case.tensors["vision"])
            found["projected"] = relative(model.encode_images(batch), case.tensors["projected"])
        found["logits"] = relative(model(batch)[-8:], case.tensors["logits_last8"])
    loss = model.loss(phi4rv.pack([with_answer(sample, case.record["answer_ids"])]).to(model.device))
    found["loss"] = abs(loss.item() - case.record["loss"]) / case.record["loss"]
    norms = {name: g.norm().item() for name, g in gradients(model, loss).items()}
    found["gradients"] = relative_norms(norms, case.record["grad_norm"])
    return found


def main() -> None:
    model, processor = phi4rv.load(CHECKPOINT, dtype=torch.float32)
    rows = [errors(model, processor, case) for case in cases()]
    print(f"{'quantity':<10}" + "".join(f"{f'case {i}':>10}" for i in range(len(rows))) + f"{'bound':>10}")
    for name, bound in BOUNDS.items():
        cells = (f"{row[name]:.1e}" if name in row else "-" for row in rows)
        print(f"{name:<10}" + "".join(f"{cell:>10}" for cell in cells) + f"{bound:>10.0e}")


if __name__ == "__main__":
    main()
