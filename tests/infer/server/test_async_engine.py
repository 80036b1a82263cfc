"""Answers in progress: full queues, clients that go or do not read, an engine that breaks, the end."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from infer.server.connections import Timeouts
from infer.server.routes import ServerLimits
from phi4rv import Processor
from tests import small
from tests.fake_engine import FakeEngine
from tests.serving import CLOSE, Served, chat_bytes, read_all, serving, until


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small.small_model()[1]


@pytest.fixture(scope="module")
def served(processor: Processor) -> Iterator[Served]:
    with serving(FakeEngine(processor, max_running=2)) as served:
        yield served


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


def test_a_full_queue_and_a_slow_answer(processor: Processor) -> None:
    engine = FakeEngine(processor, max_running=1, seconds=0.01)
    with serving(engine, limits=ServerLimits(max_waiting=1, request_timeout=1)) as served:
        answers: list[tuple[int, str]] = []
        clients = [threading.Thread(target=lambda: answers.append(code(served.ask("endless small")))) for _ in range(2)]
        for client in clients:
            client.start()
        until(lambda: served.app.async_engine.num_active == 2)
        answer = served.send(chat_bytes("echo Hi.", last=True))
        assert answer.startswith(b"HTTP/1.1 429 ") and b"Retry-After: " in answer
        for client in clients:
            client.join()
        assert answers == [(504, "timeout")] * 2
        until(lambda: not engine.open and not served.app.async_engine.num_active)
        assert served.ask("echo Hi.")[0] == 200
        stream = served.send(chat_bytes("endless small", last=True, stream=True))
        assert stream.startswith(b"HTTP/1.1 200 ") and b'"code":"timeout"' in stream and b"[DONE]" not in stream
        assert code(served.ask("echo Hi.", n=3)) == (429, "queue_full")


def test_a_client_that_goes_frees_its_place(served: Served) -> None:
    engine = served.app.engine
    for stream in (True, False):
        with served.connect() as connection:
            connection.sendall(chat_bytes("endless small", stream=stream, n=2))
            until(lambda: len(engine.open) == 2)
            assert not stream or connection.recv(10)
        until(lambda: not engine.open and not served.app.num_open and not served.app.async_engine.num_active)


def test_a_client_that_does_not_read_is_cancelled(processor: Processor, caplog: pytest.LogCaptureFixture) -> None:
    """Too much unread, and too long nothing taken: each ends the answer, and the other client never waits for it."""
    for max_unread, send in ((20, 60.0), (10**9, 0.2)):
        engine = FakeEngine(processor, seconds=0.001)
        with serving(engine, timeouts=Timeouts(send=send)) as served, served.connect() as connection:
            served.app.async_engine._max_unread = max_unread
            connection.sendall(chat_bytes("endless", stream=True))
            until(lambda engine=engine: engine.open)
            assert served.ask("echo Hi.")[0] == 200
            until(lambda engine=engine: engine.cancelled)
            if max_unread == 20:
                assert b'"code":"slow_reader"' in read_all_but_open(connection)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def read_all_but_open(connection: Any) -> bytes:
    received = b""
    while b"slow_reader" not in received:
        piece = connection.recv(1 << 16)
        assert piece
        received = received[-1000:] + piece
    return received


def test_a_broken_engine_is_told(processor: Processor, caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine(processor, seconds=0.01)) as served, served.connect() as connection:
        connection.sendall(chat_bytes("endless small", stream=True))
        assert connection.recv(10)
        assert code(served.ask("break")) == (500, "engine_failed")
        assert b'"code":"engine_failed"' in read_all_of_stream(connection)
        assert code(served.call("GET", "/health")) == (500, "engine_failed")
        assert code(served.ask("echo Hi.")) == (500, "engine_failed")
    assert "broken on purpose" in caplog.text


def read_all_of_stream(connection: Any) -> bytes:
    received = b""
    while b"0\r\n\r\n" not in received[-5:]:
        received += connection.recv(1 << 16)
    return received


def test_stopping_finishes_what_runs(processor: Processor) -> None:
    engine = FakeEngine(processor, seconds=0.02)
    with serving(engine) as served, served.connect() as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
        words = "echo " + "word " * 30
        answers: list[Any] = []
        client = threading.Thread(target=lambda: answers.append(served.ask(words)))
        client.start()
        until(lambda: engine.open)
        stopped = asyncio.run_coroutine_threadsafe(served.app.drain(20), served.loop)
        until(lambda: served.app.stopping)
        assert code(served.ask("echo Hi.")) == (503, "stopping")
        assert served.call("GET", "/health")[0] == 503
        assert not stopped.done()
        stopped.result(20)
        client.join()
        assert answers[0][0] == 200 and answers[0][1]["choices"][0]["message"]["content"] == words[5:]


def test_one_thread_drives_the_engine(served: Served) -> None:
    clients = [threading.Thread(target=served.ask) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert len(served.app.engine.threads) == 1


def test_metrics(processor: Processor) -> None:
    with serving(FakeEngine(processor)) as served:
        served.ask("echo one two three")
        served.ask("echo one", temperature=-1)
        served.call("GET", "/nothing")
        with served.connect() as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n%s\r\n" % CLOSE)
            text = read_all(connection).decode()
        assert "\r\nContent-Type: text/plain; version=" in text
        for line in (
            "phi4rv_generated_tokens_total 3.0",
            'phi4rv_finished_total{reason="stop"} 1.0',
            "phi4rv_time_to_first_token_seconds_count 1.0",
            'phi4rv_http_responses_total{route="/v1/chat/completions",status="200"} 1.0',
            'phi4rv_http_responses_total{route="/v1/chat/completions",status="400"} 1.0',
            'phi4rv_http_responses_total{route="other",status="404"} 1.0',
            "phi4rv_active_requests 0.0",
        ):
            assert f"\n{line}\n" in text
        shown = [line.split()[0].split("{")[0] for line in text.partition("\r\n\r\n")[2].splitlines() if line[0] != "#"]
        assert all(name.startswith("phi4rv_") for name in shown)


def test_all_that_is_held_at_once_is_limited(processor: Processor) -> None:
    with serving(FakeEngine(processor)) as served:
        reader = served.app.body_reader
        reader.max_total_bytes = 100_000
        with served.connect() as connection:
            connection.sendall(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + bytes(80_000))
            until(lambda: reader.bytes_in_use == 80_000)
            assert code(served.call("POST", "/v1/files", bytes(30_000))) == (429, "busy")
        until(lambda: reader.bytes_in_use == 0)
