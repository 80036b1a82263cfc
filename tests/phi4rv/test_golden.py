"""The model against the golden cases: what the published code does with the tiny checkpoint in float32."""

import dataclasses

import pytest
import torch

from phi4rv import Phi4RV, Processor, pack
from tests import parity
from tests.parity import BOUNDS, Case, gradients, relative, with_answer
from tests.small import generate

CASES = parity.cases()
Tiny = tuple[Phi4RV, Processor]
each_case = pytest.mark.parametrize("case", CASES, ids=[f"case{i}" for i in range(len(CASES))])


def published_ids(ids: list[int], image_positions: list[int], grids: list[list[int]]) -> list[int]:
    """Our ids as the published code writes them: one -200 for all patches of an image."""
    marks, start = {}, 0
    for rows, cols in grids:
        positions = image_positions[start : start + rows * cols]
        assert positions == list(range(positions[0], positions[0] + rows * cols))
        marks.update({positions[0]: [-200], **{i: [] for i in positions[1:]}})
        start += rows * cols
    assert start == len(image_positions)
    return [token for i, own in enumerate(ids) for token in marks.get(i, [own])]


@each_case
def test_tokens_and_grids(tiny: Tiny, case: Case) -> None:
    batch = tiny[1]([case.prompt])
    record = case.record
    assert batch.grids.tolist() == record.get("grids", [])
    ids = published_ids(batch.input_ids.tolist(), batch.image_positions.tolist(), batch.grids.tolist())
    assert ids == record["input_ids"]
    assert len(batch.input_ids) == batch.max_seqlen == record["sequence_length"]
    assert batch.positions.tolist() == list(range(record["sequence_length"]))


@each_case
def test_every_quantity(tiny: Tiny, case: Case) -> None:
    errors = parity.errors(*tiny, case)
    with_images = {"patches", "vision", "projected"} if case.record["images"] else set()
    assert errors.keys() == {"logits", "loss", "gradients"} | with_images
    assert {name: error for name, error in errors.items() if error >= BOUNDS[name]} == {}


def test_packed_together(tiny: Tiny) -> None:
    model, processor = tiny
    batch = processor([case.prompt for case in CASES])
    with torch.no_grad():
        logits, vision, projected = model(batch), model.vision(batch), model.encode_images(batch)
    ends = batch.cu_seqlens[1:].tolist()
    patches = [len(case.tensors.get("vision", ())) for case in CASES]
    for i, case in enumerate(CASES):
        assert relative(logits[ends[i] - 8 : ends[i]], case.tensors["logits_last8"]) < BOUNDS["logits"]
        if patches[i]:
            assert relative(vision.split(patches)[i], case.tensors["vision"]) < BOUNDS["vision"]
            assert relative(projected.split(patches)[i], case.tensors["projected"]) < BOUNDS["projected"]


def test_packed_losses_and_gradients_are_the_sums(tiny: Tiny) -> None:
    model, processor = tiny
    samples = [with_answer(processor.encode(case.prompt), case.record["answer_ids"]) for case in CASES]
    total, count = model.loss_sum(pack(samples))
    assert count == sum(len(case.record["answer_ids"]) for case in CASES)
    golden = sum(case.record["loss"] * len(case.record["answer_ids"]) for case in CASES)
    assert total.item() == pytest.approx(golden, rel=BOUNDS["loss"])

    packed = gradients(model, total)
    alone: dict[str, torch.Tensor] = {}
    for sample in samples:
        for name, grad in gradients(model, model.loss_sum(pack([sample]))[0]).items():
            alone[name] = alone.get(name, 0) + grad
    assert packed.keys() == alone.keys() == CASES[1].record["grad_norm"].keys()
    largest = max(grad.norm() for grad in alone.values())
    for name, grad in alone.items():  # zero gradients (key biases) are rounding, see parity.relative_norms
        assert (packed[name] - grad).norm() < BOUNDS["gradients"] * max(grad.norm(), 5e-5 * largest), name


def test_each_document_keeps_its_own_loss(tiny: Tiny) -> None:
    """Labels in one document of a packed row only: the loss of that document."""
    model, processor = tiny
    samples = [with_answer(processor.encode(case.prompt), case.record["answer_ids"]) for case in CASES]
    for kept, case in enumerate(CASES):
        masked = [
            s if i == kept else dataclasses.replace(s, labels=torch.full_like(s.labels, -100))
            for i, s in enumerate(samples)
        ]
        with torch.no_grad():
            loss = model.loss(pack(masked)).item()
        assert loss == pytest.approx(case.record["loss"], rel=BOUNDS["loss"])


def test_greedy_tokens_by_full_recomputation(tiny: Tiny) -> None:
    model, processor = tiny
    samples = [processor.encode(case.prompt) for case in CASES]
    for step in range(len(CASES[0].record["greedy"])):
        batch = pack(samples)
        with torch.no_grad():
            tokens = model(batch)[batch.cu_seqlens[1:].long() - 1].argmax(-1)
        assert tokens.tolist() == [case.record["greedy"][step] for case in CASES]
        samples = [
            dataclasses.replace(s, input_ids=torch.cat([s.input_ids, token[None]]))
            for s, token in zip(samples, tokens, strict=True)
        ]


def test_greedy_tokens_of_the_engine(tiny: Tiny) -> None:
    together = generate(*tiny, [case.prompt for case in CASES], 12)
    for case, generation in zip(CASES, together, strict=True):
        assert generation.token_ids == case.record["greedy"]
        assert generate(*tiny, [case.prompt], 12)[0].token_ids == case.record["greedy"]
