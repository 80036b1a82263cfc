"""The engine: every feature gives the tokens of full recomputation, and its state is consistent after every step."""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import phi4rv
from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.engine.kv_cache import ACTIVATION_BYTES, GPU_MEMORY_UTILIZATION, PagedKVCache, cache_capacity
from infer.requests.image_cache import ImageCache
from infer.requests.outputs import Generation, StreamEvent
from infer.requests.request import IMAGE_PLACEHOLDER
from infer.requests.sampling_params import SamplingParams
from phi4rv.batch import pack
from phi4rv.errors import UserError
from phi4rv.processing.answers import THINK_END
from phi4rv.processing.chat_template import THINK, Message
from phi4rv.processing.processor import Prompt
from tests.small import picture, small_model

COUNT = 48
Pair = tuple[phi4rv.Phi4RV, phi4rv.Processor]


@pytest.fixture(scope="module")
def small() -> Pair:
    return small_model(context=320)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Short and long, with no, one and two pictures, some that begin alike, one twice."""
    folder = tmp_path_factory.mktemp("pictures")
    wide, tall, dot = (folder / picture(folder, f"{w}.png", w, h) for w, h in ((90, 20), (30, 70), (1, 2)))
    long = "Say it again, say it again, say it again. " * 6
    return [
        Prompt("Hi"),
        Prompt("<image>\nWhere is the button?", [wide], "nothink"),
        Prompt("<image>\nWhere is the other button?", [wide], "nothink"),
        Prompt("<image>\nWhere is the button?", [tall], "nothink"),
        Prompt(long + "First <image> then <image>: what changed?", [tall, dot], "think"),
        Prompt(long + "And then?", mode="think"),
        Prompt("What is 17 times 23?", mode="think"),
        Prompt([Message("user", "What is it?"), Message("assistant", "A fox."), Message("user", long)]),
        Prompt("Hi"),
    ]


@torch.inference_mode()
def recomputed(pair: Pair, prompt: Prompt, count: int = COUNT) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits (count, V) without a cache: the whole row through the model for each."""
    model, processor = pair
    sample, tokens, rows = processor.encode(prompt), [], []
    for _ in range(count):
        logits = model(pack([sample]))[-1]
        best = logits.topk(2).values
        assert best[0] - best[1] > 1e-4, "too near a tie to compare"
        tokens.append(int(logits.argmax()))
        rows.append(logits)
        sample = dataclasses.replace(sample, input_ids=torch.cat([sample.input_ids, torch.tensor(tokens[-1:])]))
    return tokens, torch.stack(rows)


@pytest.fixture(scope="module")
def expected(small: Pair, prompts: list[Prompt]) -> list[list[int]]:
    answers = [recomputed(small, prompt)[0] for prompt in prompts]
    assert len({tuple(a) for a in answers}) == len(prompts) - 1
    return answers


def engine(pair: Pair, **config: Any) -> Engine:
    """One that drafts at every step, if at all, and that no token stops: random weights may choose any."""
    made = Engine(pair, config=EngineConfig(**config))
    made.stop_token_ids.clear()
    made._speculation.should_draft = lambda batch_size: True  # type: ignore[method-assign]
    return made


def greedy(count: int = COUNT, **params: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **params)


def warm(count: int = COUNT, **params: Any) -> SamplingParams:
    return greedy(count, **{**WARM, **params})


def ids(generations: Sequence[Generation]) -> list[list[int]]:
    return [g.token_ids for g in generations]


def drive(made: Engine) -> Iterator[StreamEvent]:
    while made.has_unfinished_requests:
        yield from made.step()
        made.check()


FEATURES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one at a time": {"max_running": 1},
    "pages of 16": {"page_size": 16},
    "chunks of 7": {"page_size": 16, "chunk_tokens": 7},
    "no prefix cache": {"page_size": 16, "prefix_cache": False},
    "no image cache": {"page_size": 16, "image_cache_bytes": 0},
    "no drafts": {"speculate": 0},
    "seven drafts": {"speculate": 7},
    "a full cache": {"page_size": 16, "cache_tokens": 320},
    "a full cache, overlapped": {"page_size": 16, "cache_tokens": 320, "overlap": True},
    "overlapped": {"overlap": True},
    "overlapped, without drafts": {"overlap": True, "speculate": 0},
    "all at once": {"page_size": 16, "cache_tokens": 336, "overlap": True, "chunk_tokens": 13, "max_running": 5},
}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_gives_the_tokens_of_full_recomputation(
    small: Pair, prompts: list[Prompt], expected: list[list[int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, for the caches are full the second time; some prompts while others decode already."""
    monkeypatch.setattr("infer.engine.engine.IDLE_CHUNK_TOKENS", 64)
    made = engine(small, **FEATURES[name])
    cached = 0
    for _ in range(2):
        answers = made.generate(prompts, greedy())
        assert ids(answers) == expected
        made.check()
        assert made.stats.pages_used == 0
        cached += sum(answer.cached_tokens for answer in answers)
    assert made.stats.cached_prompt_tokens == cached
    if "cache_tokens" in FEATURES[name]:
        assert made.stats.preemptions > 0
    assert (made.stats.cached_prompt_tokens > 0) == (name != "no prefix cache")
    assert (made.stats.accepted_tokens > 0) == (FEATURES[name].get("speculate", 4) > 0)


def test_batches_that_are_padded_to_a_graphs_size(
    small: Pair, prompts: list[Prompt], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that pad a batch change nothing, and nothing of theirs grows."""
    made = engine(small, overlap=True)
    monkeypatch.setattr(made.model_runner, "padded_batch_size", lambda count: -(-count // 8) * 8)
    assert ids(made.generate(prompts, greedy())) == expected
    assert int(made.input_batch.num_computed_tokens[-1]) == 0
    assert not made.input_batch.page_table[-1].any()


def test_more_rows_than_the_fused_decoder_takes(small: Pair, prompts: list[Prompt], expected: list[list[int]]) -> None:
    for fused in (True, False):
        made = engine(small, speculate=0)
        if not fused:
            made.model_runner.fused_decoder = None
        assert ids(made.generate(prompts[:3], greedy())) == expected[:3]


@pytest.mark.parametrize("overlap", [False, True])
def test_thousands_of_joins_leaves_and_cancels(
    small: Pair, prompts: list[Prompt], expected: list[list[int]], overlap: bool
) -> None:
    """In a cache that is too small for all: every answer is the one the prompt gets alone, as far as it goes."""
    rng = random.Random(5)
    config = {"max_running": 8, "page_size": 16, "cache_tokens": 320, "chunk_tokens": 50, "overlap": overlap}
    made = engine(small, **config)
    asked: dict[int, tuple[int, int]] = {}
    told: dict[int, list[int]] = {}
    over: dict[int, Generation] = {}
    total = 1000
    while made.has_unfinished_requests or len(asked) < total:
        while len(asked) < total and rng.random() < 0.4:
            which, count = rng.randrange(len(prompts)), rng.choice([1, 1, 2, 2, 5, 5, 9, COUNT])
            asked[made.submit(prompts[which], greedy(count))] = which, count
        if rng.random() < 0.1:
            made.cancel(rng.choice(list(asked)[-8:] or [0]))
            made.check()
        for event in made.step():
            assert event.request_id not in over, "something came after the last event"
            told.setdefault(event.request_id, []).extend(event.token_ids)
            if event.generation:
                over[event.request_id] = event.generation
        made.check()
    assert set(over) == set(asked), "a request was lost"
    reasons = {g.finish_reason for g in over.values()}
    assert reasons == {"length", "cancelled"}
    for number, (which, count) in asked.items():
        generation = over[number]
        assert generation.token_ids == told[number] == expected[which][: len(told[number])]
        assert generation.finish_reason == "cancelled" or len(told[number]) == count
    stats = made.stats
    assert stats.preemptions > 10
    assert sum(stats.finished.values()) == total
    assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0)


def test_a_cancelled_request_frees_its_pages_at_once(small: Pair, prompts: list[Prompt]) -> None:
    made = engine(small, overlap=True)
    first, second = made.submit(prompts[4], greedy()), made.submit(prompts[5], greedy())
    for _ in range(3):
        made.step()
    before = made.stats.pages_used
    made.cancel(first)
    assert made.stats.pages_used < before
    made.cancel(first)
    made.cancel(10**6)
    last = {e.request_id: e.generation.finish_reason for e in drive(made) if e.generation}
    assert last == {first: "cancelled", second: "length"}


def test_a_second_question_about_a_picture_runs_no_tower(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By content: the same picture from elsewhere is known, one that differs in a pixel is not."""
    model, _ = small
    images: list[int] = []
    tower = model.vision.forward
    monkeypatch.setattr(model.vision, "forward", lambda batch: images.append(len(batch.grids)) or tower(batch))
    path = tmp_path / picture(tmp_path, "a.png", 90, 60)
    copy = tmp_path / "copy.png"
    copy.write_bytes(path.read_bytes())
    made = engine(small)
    answers = made.generate([Prompt("<image>\n<image> Same?", [path, copy])], greedy(3))
    assert images == [1]
    made.generate([Prompt("Quite another question: <image>?", [copy])], greedy(3))
    assert images == [1]
    changed = Image.open(path).convert("RGB")
    changed.putpixel((0, 0), (255, 255, 255))
    changed.save(copy)
    made.generate([Prompt("Quite another question: <image>?", [copy])], greedy(3))
    assert images == [1, 1]
    assert (made.stats.image_cache_hits, made.stats.image_cache_misses) == (2, 2)
    [again] = made.generate([Prompt("<image>\n<image> Same?", [path, path])], greedy(3))
    assert again.token_ids == answers[0].token_ids


def test_a_picture_is_the_one_that_was_prepared(small: Pair, tmp_path: Path) -> None:
    """Also where its features were known then, are forgotten since, and the caller's image has changed."""
    image = Image.open(tmp_path / picture(tmp_path, "a.png", 90, 60)).convert("RGB")
    prompt = Prompt("<image>\nWhat is it?", [image])
    made = engine(small, prefix_cache=False)
    [before] = made.generate([prompt], greedy(6))
    request = made.prepare(prompt, greedy(6))
    assert request.images[0].patches is None
    made.image_cache = ImageCache(0)
    image.paste((0, 255, 0), (0, 0, 90, 60))
    made.submit(request)
    [after] = [event.generation for event in drive(made) if event.generation]
    assert after.token_ids == before.token_ids


def test_patches_are_dropped_when_the_features_are_known(small: Pair, prompts: list[Prompt]) -> None:
    """Of every request that asked about the picture before the tower had read it."""
    made = engine(small)
    requests = [made.prepare(prompt, greedy(2)) for prompt in prompts[1:3]]
    assert all(request.images[0].patches is not None for request in requests)
    for request in requests:
        made.submit(request)
        list(drive(made))
    assert all(request.images[0].patches is None for request in requests)


def test_pages_under_different_pictures_are_not_mixed_up(small: Pair, tmp_path: Path) -> None:
    """The same question about pictures of the same size: only what lies in front of them is shared."""
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for n, path in enumerate(paths):
        Image.new("RGB", (70, 70), (200 * n, 10, 10)).save(path)
    asked = [Prompt("<image>\n" + "What do you see there? " * 8, [path]) for path in paths]
    alone = [recomputed(small, prompt, 6)[0] for prompt in asked]
    assert alone[0] != alone[1]
    made = engine(small, page_size=16, max_running=1)
    assert ids(made.generate(asked, greedy(6))) == alone
    [again] = made.generate(asked[1:], greedy(6))
    assert again.token_ids == alone[1]
    assert again.cached_tokens >= again.prompt_tokens - 16, "all but the last page"


def test_a_conversation_goes_on_where_it_was(small: Pair) -> None:
    """The answer's own pages are known to the next turn."""
    made = engine(small, page_size=16)
    [first] = made.generate([Prompt("Tell me all about foxes.")], greedy(40))
    prompt = made.prepare(first.prompt, greedy(2))
    known = torch.cat([prompt.token_ids, torch.tensor(first.token_ids)])
    made.submit(dataclasses.replace(prompt, token_ids=torch.cat([known, torch.tensor([5, 6, 7])])))
    [second] = [event.generation for event in drive(made) if event.generation]
    assert second.cached_tokens == (len(known) - 1) // 16 * 16 > first.prompt_tokens


WARM: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.2, "seed": 11}


@pytest.mark.parametrize("name", ["as it is", "chunks of 7", "a full cache, overlapped", "seven drafts", "all at once"])
def test_sampled_tokens_depend_on_the_seed_alone(small: Pair, prompts: list[Prompt], name: str) -> None:
    alone = [engine(small, speculate=0).generate([p], warm(seed=WARM["seed"] + n)) for n, p in enumerate(prompts)]
    made = engine(small, **FEATURES[name])
    assert ids(made.generate(prompts, warm())) == [a[0].token_ids for a in alone]
    assert alone[0][0].token_ids != alone[-1][0].token_ids, "the same prompt with another seed"


def test_greedy_requests_beside_sampled_ones(small: Pair, prompts: list[Prompt], expected: list[list[int]]) -> None:
    made = engine(small)
    numbers = [made.submit(p, warm() if n % 2 else greedy()) for n, p in enumerate(prompts)]
    over = {event.request_id: event.generation for event in drive(made) if event.generation}
    for n in range(0, len(prompts), 2):
        assert over[numbers[n]].token_ids == expected[n]


def test_the_repetition_penalty_counts_prompt_and_answer(small: Pair) -> None:
    """Against the definition, step by step; drafts included."""
    prompt, penalty = Prompt("What is 17 times 23?", mode="think"), 1.3
    model, processor = small
    sample, tokens = processor.encode(prompt), []
    with torch.inference_mode():
        for _ in range(COUNT):
            logits = model(pack([sample]))[-1]
            seen = sample.input_ids.unique()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            tokens.append(int(logits.argmax()))
            sample = dataclasses.replace(sample, input_ids=torch.cat([sample.input_ids, torch.tensor(tokens[-1:])]))
    params = greedy(repetition_penalty=penalty)
    for speculate in (0, 4):
        [made] = engine(small, speculate=speculate).generate([prompt], params)
        assert made.token_ids == tokens


def test_drafts_from_under_an_image(small: Pair, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    """What followed the latest tokens when they stood there before may be no token; the penalty counts tokens."""
    params = warm(5)
    [alone] = engine(small, speculate=0).generate(prompts[1:2], params)
    guess = lambda history, num_tokens, count: history.new_full((len(num_tokens), count), IMAGE_PLACEHOLDER)  # noqa: E731
    monkeypatch.setattr("infer.engine.model_runner.propose_draft", guess)
    assert ids(engine(small).generate(prompts[1:2], params)) == [alone.token_ids]


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_thought_over_its_budget_is_ended(small: Pair, prompts: list[Prompt], speculate: int, budget: int) -> None:
    end = small[1].tokenizer.token_to_id(THINK_END)
    made = engine(small, speculate=speculate)
    thinking = [p for p in prompts if p.mode == "think"]
    free = ids(made.generate(thinking, greedy()))
    assert not any(end in tokens[: budget + 1] for tokens in free)
    for tokens, cut in zip(free, ids(made.generate(thinking, greedy(max_thinking_tokens=budget))), strict=True):
        assert cut[: budget + 1] == [*tokens[:budget], end]
        assert len(cut) == COUNT
    direct = [p for p in prompts if p.mode == "nothink"]
    assert ids(made.generate(direct, greedy(max_thinking_tokens=budget))) == ids(made.generate(direct, greedy()))


@pytest.mark.parametrize("mode", ["auto", "nothink"])
@pytest.mark.parametrize("preempted", [False, True])
def test_a_thought_that_the_model_begins_itself(
    small: Pair, monkeypatch: pytest.MonkeyPatch, mode: str, preempted: bool
) -> None:
    """The tag that opens it is not counted; without it there is no thought to end. Computed again at every step too."""
    start, end = (small[1].tokenizer.token_to_id(tag) for tag in (THINK, THINK_END))
    for opening, over in ((start, [start, 7, 7, end, 7]), (8, [8, 7, 7, 7, 7])):
        made = engine(small, speculate=0)
        token = lambda indices, logits, seen, index, opening=opening: torch.where(index == 0, opening, 7)  # noqa: E731
        monkeypatch.setattr(made.input_batch, "_sample_one", token)
        made.submit(Prompt("Hi", mode=mode), greedy(5, max_thinking_tokens=2))
        events = made.step()
        while made.has_unfinished_requests:
            if preempted and made.scheduler.running:
                with torch.inference_mode():
                    made.input_batch.remove_request(made.scheduler.running[-1].req_index)
                made.scheduler.preempt()
            events += made.step()
        assert events[-1].generation is not None
        assert events[-1].generation.token_ids == over


def test_log_probabilities_are_the_models_own(small: Pair, prompts: list[Prompt]) -> None:
    """Beside others that ask for none, with drafts, whatever the sampling does."""
    made = engine(small)
    tokens, logits = recomputed(small, prompts[6])
    right = logits.log_softmax(1)
    for params in ({}, {"temperature": 3.0, "top_k": 1}):
        numbers = [made.submit(p, greedy()) for p in prompts[:3]]
        asked = made.submit(prompts[6], greedy(logprobs=3, **params))
        events = list(drive(made))
        [generation] = [e.generation for e in events if e.request_id == asked and e.generation]
        assert generation.token_ids == [p.token_id for p in generation.logprobs] == tokens
        told = [p for e in events if e.request_id == asked for p in e.logprobs]
        assert told == generation.logprobs
        for n, p in enumerate(told):
            best = right[n].topk(3)
            assert p.logprob == pytest.approx(float(right[n, tokens[n]]), abs=1e-4)
            assert [i for i, _ in p.top] == best.indices.tolist()
            assert [v for _, v in p.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert all(not e.logprobs for e in events if e.request_id in numbers)


def test_logprobs_of_none_beside_the_chosen(small: Pair) -> None:
    [made] = engine(small).generate([Prompt("Hi")], greedy(3, logprobs=0))
    assert [p.top for p in made.logprobs] == [(), (), ()]
    assert all(p.logprob < 0 for p in made.logprobs)


def test_fp8_keys_and_values(small: Pair, prompts: list[Prompt]) -> None:
    """Half of the memory, and log-probabilities of the best token that stay near: e4m3 keeps 4 bits."""
    exact, short = engine(small), engine(small, cache_dtype="fp8", page_size=16, chunk_tokens=16)
    assert short.kv_cache.keys.element_size() == 1
    far = 0.0
    for prompt in prompts:
        a, b = (e.generate([prompt], greedy(1, logprobs=0))[0].logprobs[0] for e in (exact, short))
        if a.token_id == b.token_id:
            far = max(far, abs(a.logprob - b.logprob))
    assert 0 < far < 0.05
    together = ids(short.generate(prompts, greedy()))
    assert together == ids(engine(small, cache_dtype="fp8", page_size=16, speculate=0).generate(prompts, greedy()))


def test_stop_strings_end_an_answer(small: Pair, prompts: list[Prompt], expected: list[list[int]]) -> None:
    processor = small[1]
    text = processor.decode(expected[1])
    stop = text[len(text) // 2 :][:4]
    [made] = engine(small).generate([prompts[1]], greedy(stop=("never said", stop)))
    assert made.finish_reason == "stop"
    assert made.text == text[: text.index(stop)].strip()
    assert made.token_ids == expected[1][: len(made.token_ids)]


def test_the_stream_is_the_answer(small: Pair, prompts: list[Prompt], expected: list[list[int]]) -> None:
    made = engine(small)
    for prompt, tokens in zip(prompts, expected, strict=True):
        events = list(made.stream(prompt, greedy()))
        last = events[-1].generation
        assert last is not None and all(e.generation is None for e in events[:-1])
        assert list(itertools.chain.from_iterable(e.token_ids for e in events)) == tokens
        assert "".join(e.text for e in events) == last.text
        assert "".join(e.thinking for e in events) == (last.thinking or "")
        assert len(events) > 2


def test_leaving_a_stream_cancels_it(small: Pair) -> None:
    made = engine(small)
    for event in made.stream(Prompt("Hi"), greedy(100)):
        if event.token_ids:
            break
    assert not made.has_unfinished_requests
    assert made.stats.finished == {"cancelled": 1}
    assert made.stats.pages_used == 0


def test_times_are_in_order(small: Pair, prompts: list[Prompt]) -> None:
    for made in engine(small, max_running=2).generate(prompts, greedy(4)):
        assert 0 <= made.queue_seconds <= made.first_token_seconds <= made.total_seconds


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"graphs": True}, "graphs: need a GPU"),
        ({"max_running": 0}, "--max-running: 0 must be 1 or more"),
        ({"cache_tokens": 100}, "--cache-tokens: 100 must be at least 320, the model's window"),
        ({"page_size": 20}, "--page-size: 20 must be 16, 32"),
        ({"cache_dtype": "int3"}, "--cache-dtype: int3 must be fp8"),
        ({"speculate": 8}, "--speculate: 8 must be 0 to 7"),
        ({"chunk_tokens": 0}, "--chunk-tokens: 0 must be"),
    ],
)
def test_a_config_that_cannot_be(small: Pair, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        engine(small, **config)


@pytest.mark.parametrize("free", [1 << 30, 7 << 30])
def test_a_gpu_without_room_for_one_window(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    published = (phi4rv.Config(), torch.bfloat16, torch.device("cuda"))
    room = max(0, int((free - ACTIVATION_BYTES) * GPU_MEMORY_UTILIZATION)) // PagedKVCache.bytes_per_token(
        *published[:2]
    )
    with pytest.raises(UserError, match=f"--cache-tokens: the GPU has room for {room}, the model's window is 16384"):
        cache_capacity(*published, EngineConfig())


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"stop": ("",)}, "--stop: an empty string"),
        ({"logprobs": 21}, "--logprobs: 21 must be 0 to 20"),
        ({"max_thinking_tokens": -1}, "--max-thinking-tokens: -1 must be"),
        ({"json_schema": "{"}, "--json-schema: not JSON"),
        ({"json_schema": {}, "regex": "a"}, "--regex: give it or --json-schema"),
    ],
)
def test_params_that_cannot_be(params: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SamplingParams(**params)


def test_a_prompt_that_cannot_be_asked_ends_the_call_and_leaves_nothing(small: Pair) -> None:
    made = engine(small)
    with pytest.raises(UserError, match="prompt 3 has"):
        made.generate([Prompt("Hi"), Prompt("Ho"), Prompt("word " * 400)], greedy())
    made.step()
    assert not made.has_unfinished_requests
    assert made.stats.pages_used == 0
