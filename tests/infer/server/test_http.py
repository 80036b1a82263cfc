"""The server's statuses and limits, with an engine that does as it is told."""

import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from infer.server.connections import Timeouts
from infer.server.routes import ServerLimits
from phi4rv import Processor
from tests import small
from tests.fake_engine import FakeEngine
from tests.serving import CLOSE, Served, chat_bytes, read_all, serving, until

LIMITS = ServerLimits(max_body_bytes=1 << 20, max_new_tokens=50)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small.small_model()[1]


@pytest.fixture(scope="module")
def served(processor: Processor) -> Iterator[Served]:
    with serving(FakeEngine(processor, max_running=2), limits=LIMITS) as served:
        yield served


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/tiny", 200),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/files/file-1", 404),
        ("DELETE", "/v1/files/file-1", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/files/file-1", 405),
        ("PATCH", "/", 405),
        ("BREW", "/", 400),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("GET", "/v1/completions", 404),
        ("GET", "/%00", 404),
        ("GET", "/../../etc/passwd", 404),
        ("POST", "/v1/chat/completions", 415),
        ("POST", "/v1/files", 415),
    ],
)
def test_routes(served: Served, method: str, path: str, status: int) -> None:
    got, body = served.call(method, path)
    assert got == status
    assert (body is None or "error" in body) == (status != 200 or method == "HEAD")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[]", 400),
        (b"3", 400),
        (b"null", 400),
        (b'{"messages": NaN}', 400),
        (b"[" * 100_000, 400),
        (b"9" * 5000, 400),
        (b"[" + b"{}," * 600_000 + b"0]", 413),
        (b'"' + b"a" * (1 << 20) + b'"', 413),
    ],
)
def test_bodies_that_are_no_request(processor: Processor, body: bytes, status: int) -> None:
    limits = ServerLimits(max_body_bytes=(2 << 20) if body.startswith(b"[{") else 1 << 20)
    with serving(FakeEngine(processor), limits=limits) as served:
        got, told = served.call("POST", "/v1/chat/completions", body, Content_Type="application/json")
        assert got == status and told["error"]["message"]


def test_other_types_and_encodings_of_bodies(served: Served) -> None:
    body = zlib.compress(b"{}")
    for headers in ({"Content_Type": "text/plain"}, {"Content_Type": "application/json", "Content_Encoding": "gzip"}):
        assert served.call("POST", "/v1/chat/completions", body, **headers)[0] == 415


def test_a_large_body_is_refused_before_it_comes(served: Served) -> None:
    """100 MB are announced; not one byte is read before the answer."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    )
    with served.connect() as connection:
        connection.sendall(head + b"Content-Length: 100000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_large_body_of_unknown_length_is_cut(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        for _ in range(32):
            connection.sendall(piece)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_expect_continue_is_answered(served: Served) -> None:
    head, _, body = chat_bytes("echo Hi.").partition(b"\r\n\r\n")
    with served.connect() as connection:
        connection.sendall(head + b"\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA b: c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 9000 + b"\r\n\r\n", 431),
        (b"GET /" + b"b" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(70)) + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
def test_what_is_not_http(served: Served, head: bytes, status: int) -> None:
    answer = served.send(head)
    assert int(answer.split()[1]) == status
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_header_floods_end(served: Served) -> None:
    """Headers without end: the connection is closed long before they are."""
    with served.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):
            for number in range(200_000):
                connection.sendall(b"A%d: b\r\n" % number)


def test_slow_headers_slow_bodies_and_idle_connections(processor: Processor) -> None:
    with serving(
        FakeEngine(processor), timeouts=Timeouts(headers=0.2, body=0.2, keepalive=0.4, lingering=0.1)
    ) as served:
        assert served.send(b"GET / HTTP/1.1\r\nA: b\r\n").startswith(b"HTTP/1.1 408 ")
        assert served.send(b"").startswith(b"HTTP/1.1 408 ")
        assert served.send(chat_bytes("echo Hi.")[:-1]).startswith(b"HTTP/1.1 408 ")
        # The second request's headers have no end.
        answer = served.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nA: b\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1") == 1
        until(lambda: not served.app.num_open)


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    answer = served.send(
        chat_bytes("echo first") + chat_bytes("echo second") + b"GET /nothing HTTP/1.1\r\n%s\r\n" % CLOSE
    )
    assert answer.index(b'"first"') < answer.index(b'"second"') < answer.index(b"404 Not Found")


def test_a_streamed_answer(served: Served) -> None:
    answer = served.send(chat_bytes("echo one two", last=True, stream=True))
    events = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "one two"


def test_an_error_before_the_stream_has_its_own_status(served: Served) -> None:
    assert served.ask(stream=True, temperature=-1)[0] == 400
    assert code(served.ask("a " * 40_000, stream=True)) == (400, "context_length_exceeded")


def test_system_messages_that_the_template_drops(served: Served) -> None:
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "echo Hi."}]
    status, told = served.call("POST", "/v1/chat/completions", {"messages": turns})
    assert status == 400 and "ignores system messages" in told["error"]["message"]
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi."}]
    assert served.call("POST", "/v1/chat/completions", {"messages": turns})[0] == 400


def test_long_prompts(processor: Processor) -> None:
    """The small model's window holds 1024 tokens."""
    with serving(FakeEngine(processor), limits=ServerLimits(max_prompt_tokens=100)) as served:
        longest = max(map(len, processor.tokenizer.get_vocab()))
        for text in ("a " * 10**6, "a" * 1024 * longest):  # known by their lengths, and by their first pieces
            assert code(served.ask(text)) == (400, "context_length_exceeded")
            many = [{"role": "user", "content": [{"type": "text", "text": text[::100]}] * 100}]
            assert code(served.call("POST", "/v1/chat/completions", {"messages": many}))[0] == 400
        assert not served.app.engine.seen
        assert code(served.ask(" a b" * 600)) == (400, "context_length_exceeded")
        assert code(served.ask(" a b" * 100)) == (413, "prompt_too_large")
        assert served.ask(" a b" * 10)[0] == 200


def test_the_key(processor: Processor) -> None:
    with serving(FakeEngine(processor), api_key="s3cret") as served:
        for given in (None, "", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Bearer \xe9"):
            headers = {} if given is None else {"Authorization": given}
            status, told = served.call("GET", "/v1/models", **headers)
            assert (status, told["error"]["code"]) == (401, "invalid_api_key")
        assert served.call("GET", "/v1/models", Authorization="Bearer s3cret")[0] == 200
        assert served.call("GET", "/health")[0] == 200
        assert served.call("GET", "/v1/nothing")[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("10.0.0.1:8000", 403),
        ("", 403),
    ],
)
def test_a_name_that_is_made_to_point_here_is_not_answered(processor: Processor, host: str, status: int) -> None:
    """DNS rebinding: a page from elsewhere would ask under its own name."""
    with serving(FakeEngine(processor), local=True) as served:
        assert served.call("GET", "/v1/models", Host=host)[0] == status


def test_the_page_runs_its_own_script_alone(served: Served) -> None:
    answer = served.send(b"GET / HTTP/1.1\r\n%s\r\n" % CLOSE).decode()
    head, _, page = answer.partition("\r\n\r\n")
    policy = next(line for line in head.splitlines() if line.startswith("Content-Security-Policy: "))
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    assert "innerHTML" not in page and "http://" not in page and "https://" not in page
    assert " style=" not in page and " onclick=" not in page
