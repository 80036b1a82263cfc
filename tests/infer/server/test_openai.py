"""The openai client, unchanged, against the server and the engine."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import phi4rv
from infer import Engine, EngineConfig, SamplingParams
from infer.server.routes import ServerLimits
from phi4rv import Message, Prompt
from tests import small
from tests.fake_engine import FakeEngine
from tests.serving import Served, serving, until

QUESTION = "Where is the red button?"


@pytest.fixture(scope="module")
def engine(tiny: tuple[phi4rv.Phi4RV, phi4rv.Processor]) -> Engine:
    return Engine(tiny, config=EngineConfig(cache_tokens=40_000, max_running=8))


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine, limits=ServerLimits(max_new_tokens=64)) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, content: Any = QUESTION, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 24, **fields})


def picture_part(checkpoint: Any, name: str) -> dict[str, Any]:
    content = base64.b64encode((checkpoint / "images" / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def expected(engine: Engine, tiny: Any, prompt: Prompt, params: SamplingParams) -> Any:
    """The answer of another engine on the same weights, asked without a server."""
    return Engine(tiny, config=EngineConfig(cache_tokens=40_000, max_running=1)).generate([prompt], params)[0]


def test_an_answer_is_the_engines(client: openai.OpenAI, engine: Engine, tiny: Any) -> None:
    for effort, mode in (("none", "nothink"), ("high", "think")):
        right = expected(engine, tiny, Prompt(QUESTION, mode=mode), SamplingParams(max_new_tokens=24))
        got = ask(client, reasoning_effort=effort)
        message = got.choices[0].message
        assert (message.content, message.reasoning_content) == (right.text, right.thinking)
        assert got.choices[0].finish_reason == right.finish_reason
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (right.prompt_tokens, len(right.token_ids))
        assert message.content or message.reasoning_content


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    for effort in ("none", "high"):
        fields: dict[str, Any] = {"reasoning_effort": effort, "temperature": 1, "seed": 3, "n": 2}
        whole = ask(client, **fields)
        chunks = list(ask(client, **fields, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
        assert whole.choices[0].message != whole.choices[1].message
        for index, choice in enumerate(whole.choices):
            pieces = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
            assert "".join(p.delta.content or "" for p in pieces) == choice.message.content
            thought = "".join(getattr(p.delta, "reasoning_content", "") or "" for p in pieces)
            assert thought == (choice.message.reasoning_content or "")
            assert pieces[-1].finish_reason == choice.finish_reason


def test_images_inline_and_uploaded_in_several_turns(
    client: openai.OpenAI, engine: Engine, tiny: Any, checkpoint: Any
) -> None:
    names = ("1_0.png", "2_0.png")
    files = [checkpoint / "images" / name for name in names]
    uploaded = client.files.create(file=files[1].open("rb"), purpose="vision")
    assert client.files.retrieve(uploaded.id).bytes == files[1].stat().st_size
    text = {"type": "text", "text": QUESTION}
    messages: Any = [
        {"role": "user", "content": [picture_part(checkpoint, names[0]), text]},
        {"role": "assistant", "content": "There.", "reasoning_content": "A thought that is not repeated."},
        {"role": "user", "content": [{"type": "file", "file": {"file_id": uploaded.id}}, text]},
    ]
    got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, reasoning_effort="none")
    turns = [Message("user", f"<image>\n{QUESTION}"), Message("assistant", "There.")]
    prompt = Prompt([*turns, Message("user", f"<image>\n{QUESTION}")], files, "nothink")
    right = expected(engine, tiny, prompt, SamplingParams(max_new_tokens=24))
    assert (got.choices[0].message.content, got.usage.prompt_tokens) == (right.text, right.prompt_tokens)
    assert got.usage.prompt_tokens_details.image_tokens == right.image_tokens > 0
    assert client.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(uploaded.id)


def test_sampling_and_log_probabilities(client: openai.OpenAI, engine: Engine, tiny: Any) -> None:
    drawn = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 11}
    params = SamplingParams(**drawn, max_new_tokens=12, logprobs=3)
    right = expected(engine, tiny, Prompt(QUESTION, mode="nothink"), params)
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "chat_template_kwargs": {"mode": "nothink"}}
    fields: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 11, "logprobs": True, "top_logprobs": 3}
    got = ask(client, max_tokens=12, extra_body=extra, **fields)
    assert got.choices[0].message.content == right.text
    told = got.choices[0].logprobs.content
    assert [t.logprob for t in told] == pytest.approx([t.logprob for t in right.logprobs], abs=1e-3)
    assert [len(t.top_logprobs) for t in told] == [3] * len(right.logprobs)
    chunks = list(ask(client, max_tokens=12, extra_body=extra, stream=True, **fields))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in told]


def test_an_answer_of_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    formats: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    got = ask(client, reasoning_effort="none", response_format=formats, max_tokens=60)
    assert json.loads(got.choices[0].message.content)["a"] in (1, 2)
    got = ask(client, reasoning_effort="none", extra_body={"guided_regex": "(yes|no)!"})
    assert got.choices[0].message.content in ("yes!", "no!")
    for wrong in (
        {"guided_regex": "("},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
    ):
        with pytest.raises(openai.BadRequestError):
            ask(client, extra_body=wrong)
    endless: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    with pytest.raises(openai.BadRequestError):  # found out while it is answered
        ask(client, response_format=endless, reasoning_effort="none")
    with pytest.raises(openai.APIError, match="json_schema"):
        list(ask(client, response_format=endless, reasoning_effort="none", stream=True))


def test_async_clients_get_their_own_answers(served: Served, engine: Engine) -> None:
    questions = [f"What is {n} and {n * n}?" for n in range(6)]
    right = engine_answers(engine, questions)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:

            async def one(question: str) -> str:
                text = ""
                messages: Any = [{"role": "user", "content": question}]
                async for chunk in await client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=16, reasoning_effort="none", stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*map(one, questions))

    assert asyncio.run(all_of_them()) == right


def engine_answers(engine: Engine, questions: list[str]) -> list[str]:
    alone = Engine((engine.model, engine.processor), config=EngineConfig(cache_tokens=40_000, max_running=1))
    params = SamplingParams(max_new_tokens=16)
    return [g.text for g in alone.generate([Prompt(q, mode="nothink") for q in questions], params)]


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "phi4rv"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi."}])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=-2)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "word " * 40_000)
    assert long.value.code == "context_length_exceeded"


def test_errors_within_a_stream_are_raised(engine: Engine) -> None:
    fake = FakeEngine(engine.processor, seconds=0.01)
    with (
        serving(fake, limits=ServerLimits(request_timeout=0.5)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIError, match=r"longer than 0\.5 s"):
            list(ask(client, "endless small", stream=True))
        with pytest.raises(openai.InternalServerError):
            ask(client, "endless small")


def test_leaving_a_stream_frees_the_request(client: openai.OpenAI, served: Served) -> None:
    with ask(client, stream=True, max_tokens=64, reasoning_effort="high") as stream:
        next(iter(stream))
    until(lambda: not served.app.async_engine.num_active and not served.app.engine.has_unfinished_requests)
    assert served.app.engine.stats.pages_used == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2**31 - 1},
        {"temperature": 5e-324},
        {"temperature": 1, "top_p": 5e-324, "top_k": 2**31 - 1, "min_p": 1, "seed": 2**200},
        {"repetition_penalty": 2**31 - 1},
        {"repetition_penalty": 1e-30, "temperature": 2},
        {"stop": ["e", " ", "\N{SNOWMAN}"], "max_thinking_tokens": 0, "n": 8},
        {"logprobs": True, "top_logprobs": 20, "temperature": 1e-30, "repetition_penalty": 1e-30},
    ],
)
def test_options_at_their_edges_are_answered(served: Served, fields: dict[str, Any]) -> None:
    status, told = served.ask(QUESTION, max_tokens=4, reasoning_effort="low", **fields)
    assert status == 200 and len(told["choices"]) == fields.get("n", 1)
    assert "NaN" not in json.dumps(told)


def test_the_key() -> None:
    with serving(FakeEngine(small.small_model()[1]), api_key="right") as served:
        for key, error in (("wrong", openai.AuthenticationError), ("right", None)):
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0) as client:
                if error:
                    with pytest.raises(error):
                        ask(client)
                else:
                    assert ask(client, "echo Hi.").choices[0].message.content == "Hi."
