"""Whatever comes in gets a right answer or an error of the client's, and the server goes on."""

import copy
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infer.server.connections import Timeouts, encode_json
from infer.server.errors import ApiError
from infer.server.protocol import ChatCompletionRequest, ChatRequestParser
from infer.server.routes import ServerLimits
from phi4rv import Processor
from tests import small
from tests.fake_engine import FakeEngine
from tests.serving import Served, chat_bytes, serving, until

FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
FULL: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file-0", "detail": "low"}}]},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}, {"type": "file", "file": {"file_id": "file-0"}}]},
        {"role": "user", "content": "echo Hi."},
    ],
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "repetition_penalty": 1.5,
    "seed": 5,
    "stop": ["a", "b"],
    "n": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "max_thinking_tokens": 5,
    "reasoning_effort": "high",
    "chat_template_kwargs": {"mode": "think", "thinking": True},
    "tools": [],
    "user": "me",
}
SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 1.5, 1e999, -0.0]),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.sampled_from(
        ["<image>", "<|im_end|>", "data:image/png;base64,AAAA", "file-0", "http://a/", "think", "user", ""]
    ),
)
JSON = st.recursive(
    SIMPLE,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)
HEADERS = (
    *("Host: x", "Content-Length: ", "Transfer-Encoding: chunked", "Connection: close", "Expect: 100-continue"),
    *("Connection: upgrade\r\nUpgrade: websocket", "Content-Encoding: gzip", "Content-Type: application/json"),
    *("Content-Type: multipart/form-data; boundary=x", "Authorization: Bearer ", "\N{SNOWMAN}: x", "A: " + "a" * 9000),
)
WORDS = (
    "GET",
    "POST",
    " ",
    "/",
    "/v1/files",
    " HTTP/1.1\r\n",
    "\r\n",
    "\n",
    "\0",
    "5",
    "9" * 20,
    "0\r\n\r\n",
    "--x",
    "{",
)
REQUESTS = (chat_bytes("echo Hi."), chat_bytes("echo Hi.", stream=True, n=2), b"\x16\x03\x01")
TOKEN = st.sampled_from((*(f"{line}\r\n".encode() for line in HEADERS), *(w.encode() for w in WORDS), *REQUESTS))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within ``value``, itself left out."""
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [found for key in keys for found in [(*path, key), *places(value[key], (*path, key))]]


@st.composite
def spoiled(draw: st.DrawFn) -> dict[str, Any]:
    """A full request of which some fields are gone, and some are anything."""
    body = copy.deepcopy(FULL)
    for key in draw(st.sets(st.sampled_from(sorted(FULL)))):
        del body[key]
    for _ in range(draw(st.integers(0, 2))):
        found = places(body)
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        place = body
        for key in path:
            place = place[key]
        place[last] = draw(JSON)  # type: ignore[index]
    return body


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small.small_model()[1]


@pytest.fixture(scope="module")
def served(processor: Processor) -> Iterator[Served]:
    timeouts = Timeouts(headers=0.3, body=0.3, keepalive=0.3, send=1.0, lingering=0.1)
    with serving(FakeEngine(processor), limits=ServerLimits(max_body_bytes=1 << 20), timeouts=timeouts) as served:
        yield served
        until(lambda: not served.app.num_open)
        assert served.app.async_engine.num_active == 0 and served.app.body_reader.bytes_in_use == 0
        assert not served.app.async_engine._collectors and not served.app.engine.open


@settings(FIXED, max_examples=250)
@given(st.one_of(spoiled(), JSON))
def test_any_json_is_read_or_refused(processor: Processor, body: Any) -> None:
    try:
        chat = ChatRequestParser(processor, "tiny", 50).parse(body)
    except ApiError as error:
        assert error.status in (400, 404)
        assert json.loads(encode_json(error.body()))
        return
    assert isinstance(chat, ChatCompletionRequest) and chat.sampling_params
    for message in chat.messages:
        message.content.encode()
    assert sum(m.content.count("<image>") for m in chat.messages) == len(chat.images)


@settings(FIXED, max_examples=100)
@given(spoiled())
def test_any_request_is_answered(served: Served, body: Any) -> None:
    content = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    answer = served.send(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    status = int(answer.split()[1])
    assert status == 200 or 400 <= status < 500, answer
    if status != 200:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


@settings(FIXED, max_examples=60)
@given(st.lists(TOKEN | st.binary(max_size=30), max_size=12).map(b"".join))
def test_any_bytes_are_survived(served: Served, data: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except ConnectionError:
            pass  # refused while it was still being sent
    for line in received.split(b"\r\n"):
        if line.startswith(b"HTTP/1."):
            assert int(line.split()[1]) < 500, received


@settings(FIXED, max_examples=60)
@given(st.lists(TOKEN | st.binary(max_size=30), max_size=8).map(b"".join))
def test_any_form_is_survived(served: Served, data: bytes) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + data + b"\r\n--x--\r\n"
    assert 400 <= served.call("POST", "/v1/files", body, Content_Type="multipart/form-data; boundary=x")[0] < 500


def test_clients_that_go_at_any_moment(served: Served) -> None:
    """At every point of the request, and after any part of the answer."""
    chance = random.Random(0)
    request = chat_bytes("echo " + "word " * 20, stream=True)
    for end in [*range(0, len(request), 17), len(request)]:
        with served.connect() as connection:
            connection.sendall(request[:end])
            if end == len(request):
                connection.recv(chance.randrange(1, 2000))
    until(lambda: not served.app.num_open and not served.app.engine.open)
    assert served.ask()[0] == 200
