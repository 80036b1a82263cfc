"""Answers: the engine against full recomputation, the published code's tokens, and where an answer ends."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

import phi4rv
from infer.engine.output_processor import stop_token_ids
from infer.requests.outputs import Generation
from infer.requests.sampling_params import SamplingParams
from phi4rv.batch import Sample, pack
from phi4rv.errors import UserError
from phi4rv.processing.processor import Processor, Prompt
from tests.small import PUBLISHED, generate, picture, small_model

WARM = SamplingParams(temperature=1.0, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def small() -> tuple[phi4rv.Phi4RV, Processor]:
    return small_model()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Ragged: no, one and two pictures, short and long."""
    folder = tmp_path_factory.mktemp("pictures")
    wide, tall, dot = (folder / picture(folder, f"{w}.png", w, h) for w, h in ((90, 20), (30, 70), (1, 2)))
    return [
        Prompt("Hi"),
        Prompt("<image>\nWhere is the button?", [wide], "nothink"),
        Prompt("First <image> then <image>: what changed? " + "Think twice. " * 20, [tall, dot], "think"),
        Prompt("What is 17 times 23?", mode="think"),
        Prompt("<image>", [dot]),
    ]


def recomputed(model: phi4rv.Phi4RV, processor: Processor, prompt: Prompt, count: int) -> list[int]:
    """Greedy tokens without a cache: the whole row through the model for each of them."""
    sample, tokens = processor.encode(prompt), []
    for _ in range(count):
        logits = model(pack([sample]))[-1]
        tokens.append(int(logits.argmax()))
        best = logits.detach().topk(2).values
        assert best[0] - best[1] > 1e-4, "too near a tie to compare"
        sample = extended(sample, tokens[-1:])
    return tokens


def extended(sample: Sample, tokens: Sequence[int]) -> Sample:
    return dataclasses.replace(sample, input_ids=torch.cat([sample.input_ids, torch.tensor(list(tokens))]))


def ids(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


def with_stops(processor: Processor, stops: object) -> Processor:
    files = {**processor.files, "generation_config.json": json.dumps({"eos_token_id": stops}).encode()}
    return Processor(files, processor.config)


@torch.inference_mode()
def test_the_cache_gives_the_tokens_of_full_recomputation(small, prompts: list[Prompt]) -> None:
    """All packed in one prefill, and one by one."""
    model, processor = small
    expected = [recomputed(model, processor, prompt, 10) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    assert ids(generate(model, processor, prompts, 10)) == expected
    assert [ids(generate(model, processor, [prompt], 10))[0] for prompt in prompts] == expected
    assert ids(generate(model, processor, prompts[::-1], 10)) == expected[::-1]


@torch.inference_mode()
def test_answers_end_at_different_times(small, prompts: list[Prompt]) -> None:
    """Whoever ends early, at a token that the checkpoint lists, changes nothing for the others."""
    model, processor = small
    free = ids(generate(model, processor, prompts, 12))
    stops = [free[1][4], free[3][0], 1011]
    cut = [next((n for n, token in enumerate(tokens) if token in stops), 12) for tokens in free]
    assert cut[3] == 0
    assert len(set(cut)) > 2, "the case does not end at different times"
    stopping = with_stops(processor, stops)
    made = generate(model, stopping, prompts, 12)
    for number, generation in enumerate(made):
        assert generation.token_ids == free[number][: cut[number]]
        assert generation.finish_reason == ("stop" if cut[number] < 12 else "length")


@pytest.mark.parametrize(
    "case", json.loads((PUBLISHED / "expected" / "cases.json").read_text()), ids=lambda c: c["mode"]
)
def test_golden_greedy_tokens(case: dict) -> None:
    model, processor = phi4rv.load(PUBLISHED, device="cpu", dtype=torch.float32)
    prompt = Prompt(case["prompt"], [PUBLISHED / name for name in case["images"]], case["mode"])
    [made] = generate(model, processor, [prompt], len(case["greedy"]))
    assert made.token_ids == case["greedy"]
    assert made.prompt_tokens == case["sequence_length"]
    assert made.image_tokens == sum(rows * cols for rows, cols in case.get("grids", []))
    assert made.finish_reason == "length"


def test_golden_greedy_tokens_all_at_once() -> None:
    model, processor = phi4rv.load(PUBLISHED, device="cpu", dtype=torch.float32)
    cases = json.loads((PUBLISHED / "expected" / "cases.json").read_text())
    asked = [Prompt(c["prompt"], [PUBLISHED / name for name in c["images"]], c["mode"]) for c in cases]
    assert ids(generate(model, processor, asked, 12)) == [c["greedy"] for c in cases]


def test_a_seed_gives_the_same_tokens_whatever_else_is_asked(small, prompts: list[Prompt]) -> None:
    model, processor = small
    alone = ids(generate(model, processor, prompts[:1], 15, WARM))[0]
    assert ids(generate(model, processor, prompts, 15, WARM))[0] == alone
    assert ids(generate(model, processor, [prompts[0], prompts[2]], 15, WARM))[0] == alone
    second = dataclasses.replace(WARM, seed=WARM.seed + 1)
    other = ids(generate(model, processor, [prompts[3], prompts[0]], 15, WARM))[1]
    assert other == ids(generate(model, processor, prompts[:1], 15, second))[0], "prompt i draws with seed + i"
    assert other != alone


def test_sampling_from_one_token_is_greedy(small, prompts: list[Prompt]) -> None:
    model, processor = small
    greedy = ids(generate(model, processor, prompts, 8))
    assert ids(generate(model, processor, prompts, 8, SamplingParams(temperature=2.0, top_k=1))) == greedy
    assert ids(generate(model, processor, prompts, 8, SamplingParams(temperature=2.0, top_p=1e-9))) == greedy


@pytest.mark.parametrize(
    ("listed", "expected"),
    [([7, 8], {7, 8, 1011}), (7, {7, 1011}), ([], {1011})],
    ids=["several", "one", "none"],
)
def test_stop_tokens(small, listed: object, expected: set[int]) -> None:
    assert stop_token_ids(with_stops(small[1], listed)) == expected


def test_stop_tokens_without_a_generation_config(small) -> None:
    processor = small[1]
    files = {k: v for k, v in processor.files.items() if k != "generation_config.json"}
    assert stop_token_ids(Processor(files, processor.config)) == {1011}


@pytest.mark.parametrize("count", [1, 2, 9])
def test_max_new_tokens(small, prompts: list[Prompt], count: int) -> None:
    model, processor = small
    made = generate(model, processor, prompts, count)
    assert [len(g.token_ids) for g in made] == [count] * len(prompts)
    assert {g.finish_reason for g in made} == {"length"}


@pytest.mark.parametrize("count", [0, -3])
def test_max_new_tokens_out_of_range(small, prompts: list[Prompt], count: int) -> None:
    with pytest.raises(UserError, match=f"--max-new-tokens: {count} must be 1 or more"):
        generate(*small, prompts, count)


def test_the_end_of_the_window(small, tmp_path: Path) -> None:
    """Windows from exactly the prompt's length on: the answer takes what is left, and nothing is cut."""
    prompt = Prompt("<image>\nWhat is this?", [tmp_path / picture(tmp_path, "a.png", 60, 40)])
    length = len(small[1].encode(prompt))
    free = ids(generate(*small, [prompt], 5))[0]
    for room in (0, 1, 4):
        model, processor = small_model(context=length + room)
        assert processor.config.context == length + room
        for count in (5, 4096):
            [made] = generate(model, processor, [prompt], count)
            assert made.token_ids == free[:room]
            assert made.finish_reason == "length"
            assert made.prompt_tokens == length
        mixed = generate(model, processor, [prompt, Prompt("Hi"), prompt], 5)
        assert [len(g.token_ids) for g in mixed] == [room, 5, room]
    model, processor = small_model(context=length - 1)
    words = rf"has {length} tokens \(\d+ of them from images\), the model's window holds {length - 1}"
    with pytest.raises(UserError, match="the prompt " + words):
        generate(model, processor, [prompt], 5)
    with pytest.raises(UserError, match="prompt 2 " + words):
        generate(model, processor, [Prompt("Hi"), prompt], 5)


def test_images_matter_and_may_come_in_any_form(small, tmp_path: Path) -> None:
    """The same picture as a path, bytes or an image gives the same answer; another picture, other logits."""
    model, processor = small
    file = tmp_path / picture(tmp_path, "a.png", 60, 40)
    forms = [file, str(file), file.read_bytes(), Image.open(file)]
    made = ids(generate(model, processor, [Prompt("<image> What?", [form]) for form in forms], 6))
    assert made == [made[0]] * 4
    black = processor([Prompt("<image> What?", [Image.new("RGB", (60, 40))])])
    assert not torch.equal(model(black)[-1], model(processor([Prompt("<image> What?", [file])]))[-1])
