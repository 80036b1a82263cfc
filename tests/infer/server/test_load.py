"""Many clients at once on the engine: nobody is dropped, nobody gets another's answer, nothing is left behind."""

import asyncio
import base64
import io
import json
from typing import Any

import aiohttp
from PIL import Image

from infer import Engine, EngineConfig, SamplingParams
from infer.server.routes import ServerLimits
from phi4rv import Prompt
from tests import small
from tests.serving import Served, serving, until

CLIENTS = 60
TOKENS = 12


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((32 + number % 3 * 16, 48)).rotate(90 * (number % 4)).save(file, "PNG")
    return file.getvalue()


def question(number: int) -> tuple[str, list[bytes]]:
    """Of various lengths, every third with a picture."""
    return f"What is number {number}? " + "Think well. " * (number % 9), [picture(number)] * (number % 3 == 0)


def body(number: int) -> dict[str, Any]:
    text, images = question(number)
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": TOKENS,
        "temperature": 1.0,
        "seed": number,
        "stream": number % 5 != 0,
        "reasoning_effort": "high" if number % 2 else "none",
    }


def right_answers(engine: Engine) -> list[tuple[str, str]]:
    """By another engine, one after the other."""
    alone = Engine((engine.model, engine.processor), config=EngineConfig(max_running=1, cache_tokens=2000))
    answers = []
    for number in range(CLIENTS):
        text, images = question(number)
        prompt = Prompt("<image>\n" * len(images) + text, images, "think" if number % 2 else "nothink")
        params = SamplingParams(temperature=1.0, seed=number, max_new_tokens=TOKENS)
        made = alone.generate([prompt], params)[0]
        answers.append((made.thinking or "", made.text))
    return answers


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> tuple[str, str]:
    async with session.post(f"{url}/v1/chat/completions", json=body(number)) as response:
        assert response.status == 200, await response.text()
        if response.content_type == "application/json":
            message = (await response.json())["choices"][0]["message"]
            return message["reasoning_content"] or "", message["content"]
        lines = (await response.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
    thinking, text = ("".join(delta.get(key) or "" for delta in deltas) for key in ("reasoning_content", "content"))
    return thinking, text


async def go_away(session: aiohttp.ClientSession, url: str, number: int) -> None:
    """Reads a little of a long answer."""
    async with session.post(
        f"{url}/v1/chat/completions", json=body(number) | {"max_tokens": 500, "stream": True}
    ) as got:
        await got.content.read(10)


async def all_at_once(url: str) -> list[Any]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as session:
        stays = [ask(session, url, number) for number in range(CLIENTS)]
        goes = [go_away(session, url, number) for number in range(0, CLIENTS, 6)]
        return (await asyncio.gather(*stays, *goes))[:CLIENTS]


def test_sixty_clients_get_their_own_answers() -> None:
    """With fewer slots, pages and places than clients, and some that leave; twice, the second time from the caches."""
    model, processor = small.small_model(context=1024)
    engine = Engine((model, processor), config=EngineConfig(max_running=6, cache_tokens=1500))
    right = right_answers(engine)
    assert len(set(right)) > CLIENTS // 2
    with serving(engine, limits=ServerLimits(max_new_tokens=500, max_waiting=100)) as served:
        for _ in range(2):
            assert asyncio.run(all_at_once(served.url)) == right
            assert_nothing_is_left(served)


def assert_nothing_is_left(served: Served) -> None:
    until(lambda: not served.app.num_open and not served.app.engine.has_unfinished_requests)
    app = served.app
    assert (app.async_engine.num_active, app.body_reader.bytes_in_use, app.engine.stats.pages_used) == (0, 0, 0)
    assert not app.async_engine._collectors and not app.async_engine._by_request_id
    assert app.async_engine._permits._value == 12
    app.engine.check()
