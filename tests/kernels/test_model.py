"""The whole model on Triton kernels, and on the CUDA kernels, beside the same weights on the definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

import phi4rv
from infer.engine.fused_decoder import is_supported
from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.ops.registry import IMPLEMENTATIONS
from phi4rv.processing.chat_template import Message
from tests import parity
from tests.kernels.check import CUDA_PLACE, PLACE, Place
from tests.small import generate, small_config, small_model

CASES = parity.cases()


def twins(place: Place) -> tuple[phi4rv.Phi4RV, phi4rv.Phi4RV, phi4rv.Processor]:
    """A small model on the definitions in float32, the same on Triton kernels, and their processor."""
    model, processor = small_model()
    twin = empty_model(small_config(), place[0], torch.float32, "triton").to_empty(device=place[0])
    twin.load_state_dict(model.state_dict())
    assert set(twin.ops.backends.values()) == {"triton"}
    return model.to(place[0]), twin, processor


def dialogue(processor: phi4rv.Processor, said: str, answer: str, grids: list[tuple[int, int]]) -> phi4rv.Sample:
    """A labelled sample with random patches."""
    sample = processor.tokens([Message("user", said), Message("assistant", answer)], grids, labelled=True)
    return dataclasses.replace(sample, patches=torch.randn(sum(r * c for r, c in grids), 768))


@pytest.mark.parametrize("place", PLACE)
def test_loss_and_gradients(place: Place) -> None:
    """Three documents, one without an image: tile edges inside the row, unlabelled rows, image rows."""
    model, twin, processor = twins(place)
    texts = [("<image>\nWhere?", "[0.1]", [(2, 3)]), ("Hi", "Yes", []), ("<image>a<image>b", "no", [(4, 3), (1, 4)])]
    batch = phi4rv.pack([dialogue(processor, *text) for text in texts]).to(place[0])
    losses = [m.loss(batch) for m in (model, twin)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    wanted, found = (parity.gradients(m, loss) for m, loss in zip((model, twin), losses, strict=True))
    assert wanted.keys() == found.keys()
    largest = max(float(g.norm()) for g in wanted.values())
    for name, gradient in wanted.items():
        # A key bias moves no softmax: its true gradient is zero, and rounding is measured against the others.
        assert float((found[name] - gradient).norm()) < 1e-5 * max(float(gradient.norm()), 1e-2 * largest), name


@pytest.mark.parametrize("place", PLACE)
def test_tokens(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of two prompts, at once and in chunks, and decoding against their caches."""
    model, twin, processor = twins(place)
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    prompts = [phi4rv.Prompt("<image>\nWhat?", [image], "nothink"), phi4rv.Prompt("Hello", [], "nothink")]
    made, found = ([g.token_ids for g in generate(m, processor, prompts, 3)] for m in (model, twin))
    assert found == made
    monkeypatch.setattr("infer.engine.engine.IDLE_CHUNK_TOKENS", 24)
    chunked = generate(twin, processor, prompts, 3, page_size=16, speculate=0)
    assert [g.token_ids for g in chunked] == made


def test_tokens_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch, csrc: None) -> None:
    """A prompt read in chunks and decoded with drafts, in bfloat16: where a token is another than the definitions', the
    two best logits were within rounding of each other.
    """
    monkeypatch.setattr("infer.engine.engine.IDLE_CHUNK_TOKENS", 24)
    kernels = "torch,paged_decode_attention=cuda,decode_gemv=cuda"
    plain, ours = (phi4rv.load(parity.CHECKPOINT, "cpu", torch.bfloat16, kernels=k) for k in ("torch", kernels))
    assert is_supported(ours[0].decoder)
    prompt, new = phi4rv.Prompt("Hello", mode="nothink"), 4
    [made] = generate(*ours, [prompt], new, page_size=16, speculate=2)
    sample = plain[1].encode(prompt)
    ids = torch.cat([sample.input_ids, torch.tensor(made.token_ids)])
    with torch.no_grad():
        logits = plain[0](phi4rv.pack([dataclasses.replace(sample, input_ids=ids)]))[len(sample) - 1 : -1]
    chosen = logits.gather(1, ids[len(sample) :, None]).squeeze(1)
    assert (logits.amax(1) - chosen <= 2**-5 * logits.abs().amax()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_golden_cases(case: parity.Case) -> None:
    model, processor = phi4rv.load(parity.CHECKPOINT, device="cuda", dtype=torch.float32, kernels="triton")
    for name, error in parity.errors(model, processor, case).items():
        assert error < parity.BOUNDS[name], f"{name}: {error}"


@pytest.mark.parametrize("place", CUDA_PLACE)
@pytest.mark.parametrize("case", CASES)
def test_golden_cases_on_cuda_kernels(place: Place, case: parity.Case, csrc: None) -> None:
    cuda = "cuda"
    if place[0] == "cpu":  # Triton's interpreter has no bfloat16, and the projector's gradient is Triton's
        names = [name for name, kinds in IMPLEMENTATIONS.items() if "cuda" in kinds and not name.startswith("proj")]
        cuda = ",".join(["torch", *(f"{name}=cuda" for name in names)])
    as_near_as_the_definitions(case, place, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_golden_cases_in_bfloat16(case: parity.Case) -> None:
    as_near_as_the_definitions(case, ("cuda", torch.bfloat16), "triton")


def as_near_as_the_definitions(case: parity.Case, place: Place, kernels: str) -> None:
    """To the published code's float32 results: features, logits, loss and gradients, in the same short dtype."""
    plain, ours = (
        parity.errors(*phi4rv.load(parity.CHECKPOINT, device=place[0], dtype=place[1], kernels=kind), case)
        for kind in ("torch", kernels)
    )
    assert ours.keys() == plain.keys()
    for name, error in ours.items():
        assert error <= 2 * plain[name] + torch.finfo(place[1]).eps, f"{name}: {error}, definitions {plain[name]}"


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_a_step_repeats_and_compiles(kernels: str, request: pytest.FixtureRequest) -> None:
    """Loss and all gradients: the same bits twice; with the layers compiled, the same within bfloat16's rounding."""
    if kernels == "cuda":
        request.getfixturevalue("csrc")
    model, processor = phi4rv.load(parity.CHECKPOINT, device="cuda", dtype=torch.bfloat16, kernels=kernels)
    samples = [parity.with_answer(processor.encode(case.prompt), case.record["answer_ids"]) for case in CASES]
    batch = phi4rv.pack(samples).to("cuda")

    def step() -> dict[str, torch.Tensor]:
        loss = model.loss(batch)
        return {"loss": loss.detach(), **{name: g.clone() for name, g in parity.gradients(model, loss).items()}}

    once, twice = step(), step()
    assert all(torch.equal(once[name], again) for name, again in twice.items())
    model.compile_layers()
    for name, compiled in step().items():
        assert parity.relative(compiled.float(), once[name].float()) < 0.05, name
