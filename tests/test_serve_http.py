"""The server's statuses, limits and manners, with an engine that does as it is told."""

import base64
import io
import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import small
from fake_engine import FakeEngine
from PIL import Image
from serving import CLOSE, Served, chat_bytes, read_all, serving, until

from infer.server import ServerLimits
from infer.web import Seconds
from phi4rv import Processor

LIMITS = ServerLimits(body=1 << 20, uploads=8192, pixels=10_000, new_tokens=50, waiting=4)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small.small_model()[1]


@pytest.fixture(scope="module")
def served(processor: Processor) -> Iterator[Served]:
    with serving(FakeEngine(processor, max_running=2), limits=LIMITS, hosts=("127.0.0.1",)) as served:
        yield served


def png(width: int = 8, height: int = 8, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


def noise() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 90.0).save(file, "PNG")
    return file.getvalue()


def image(content: bytes, kind: str = "image/png") -> list[dict[str, Any]]:
    url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "echo Seen."}]


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


def form(boundary: str, *parts: tuple[str, bytes]) -> bytes:
    made = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary.encode(), head.encode(), body) for head, body in parts)
    return made + f"--{boundary}--\r\n".encode()


def send_file(served: Served, content: bytes) -> tuple[int, Any]:
    head = 'Content-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png'
    body = form("xyz", ('Content-Disposition: form-data; name="purpose"', b"vision"), (head, content))
    return served.call("POST", "/v1/files", body, Content_Type="multipart/form-data; boundary=xyz")


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
    limits = ServerLimits(body=(2 << 20) if body.startswith(b"[{") else 1 << 20)
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
    with serving(FakeEngine(processor), seconds=Seconds(headers=0.2, body=0.2, idle=0.4, linger=0.1)) as served:
        assert served.send(b"GET / HTTP/1.1\r\nA: b\r\n").startswith(b"HTTP/1.1 408 ")
        assert served.send(b"").startswith(b"HTTP/1.1 408 ")
        assert served.send(chat_bytes("echo Hi.")[:-1]).startswith(b"HTTP/1.1 408 ")
        # The second request's headers have no end.
        answer = served.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nA: b\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1") == 1
        until(lambda: not served.app.open)


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
    with serving(FakeEngine(processor), limits=ServerLimits(prompt_tokens=100)) as served:
        longest = max(map(len, processor.tokenizer.get_vocab()))
        for text in ("a " * 10**6, "a" * 1024 * longest):  # known by their lengths, and by their first pieces
            assert code(served.ask(text)) == (400, "context_length_exceeded")
            many = [{"role": "user", "content": [{"type": "text", "text": text[::100]}] * 100}]
            assert code(served.call("POST", "/v1/chat/completions", {"messages": many}))[0] == 400
        assert not served.app.engine.seen
        assert code(served.ask(" a b" * 600)) == (400, "context_length_exceeded")
        assert code(served.ask(" a b" * 100)) == (413, "prompt_too_large")
        assert served.ask(" a b" * 10)[0] == 200


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims ``width`` x ``height`` pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (png(), 200),
        (png(kind="JPEG"), 200),
        (png(kind="WEBP"), 200),
        (png(kind="GIF"), 200),
        (png(kind="BMP"), 200),
        (png(kind="TIFF"), 415),
        (png(kind="ICO"), 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415),
        (b"", 415),
        (png()[:30], 400),
        (noise()[:400], 400),
        (png(200, 100), 413),
        (bomb(60_000, 60_000), 413),
        (bomb(2**31 - 1, 2**31 - 1), 413),
        (bomb(0, 5), 400),
    ],
)
def test_pictures(served: Served, content: bytes, status: int) -> None:
    assert served.ask(image(content))[0] == status
    if status != 200 and len(content) != 400:  # a file's pixels are decoded when it is asked about
        assert send_file(served, content)[0] == status


def test_what_is_no_picture_at_all(served: Served) -> None:
    for url, status in (
        ("data:image/png;base64,???", 400),
        ("data:image/png,abc", 400),
        ("data:", 400),
        ("", 400),
        ("/etc/passwd", 400),
        ("file:///etc/passwd", 400),
        ("file-0", 404),
        ("http://example.com/a.png", 400),
        ("http://[", 400),
    ):
        assert served.ask([{"type": "image_url", "image_url": {"url": url}}])[0] == status, url


def test_uploads_are_asked_about_and_displaced(served: Served) -> None:
    status, first = send_file(served, png(16, 16))
    assert (status, first["object"], first["filename"], first["purpose"]) == (200, "file", "a.png", "vision")
    part = {"type": "file", "file": {"file_id": first["id"]}}
    url = {"type": "image_url", "image_url": {"url": first["id"]}}
    assert served.ask([part, url, {"type": "text", "text": "echo Hi."}])[0] == 200
    prompt = served.app.engine.seen[-1][0]
    assert prompt.images == [png(16, 16)] * 2 and prompt.text[0].content == "<image>\n<image>\necho Hi."
    assert served.call("GET", f"/v1/files/{first['id']}")[1] == first
    others = [send_file(served, png(16, 17 + i))[1]["id"] for i in range(8)]
    assert served.call("GET", f"/v1/files/{first['id']}")[0] == 404
    assert served.ask([part])[0] == 404
    assert served.call("DELETE", f"/v1/files/{others[-1]}")[1]["deleted"]
    assert served.call("GET", f"/v1/files/{others[-1]}")[0] == 404
    held = served.app.uploads
    assert held.size == sum(one.size for one in held.held.values()) <= 8192
    assert send_file(served, b"BM" + os.urandom(9000))[0] in (400, 413)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--xyz",
        b"--xyz--",
        form("xyz"),
        form("xyz", ("Content-Disposition: form-data", b"a")),
        form("xyz", ('Content-Disposition: form-data; name="other"', b"a")),
        form("xyz", *[('Content-Disposition: form-data; name="file"', png())] * 40),
        form("xyz", ('Content-Disposition: form-data; name="file"', png()))[:-6],
    ],
)
def test_forms_that_are_none(served: Served, body: bytes) -> None:
    assert served.call("POST", "/v1/files", body, Content_Type="multipart/form-data; boundary=xyz")[0] == 400


def test_the_key(processor: Processor) -> None:
    with serving(FakeEngine(processor), api_key="s3cret") as served:
        for given in (None, "", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Bearer \xe9"):
            headers = {} if given is None else {"Authorization": given}
            status, told = served.call("GET", "/v1/models", **headers)
            assert (status, told["error"]["code"]) == (401, "invalid_api_key")
        assert served.call("GET", "/v1/models", Authorization="Bearer s3cret")[0] == 200
        assert served.call("GET", "/health")[0] == 200
        assert served.call("GET", "/v1/nothing")[0] == 404


class Elsewhere(BaseHTTPRequestHandler):
    """Another web server."""

    def do_GET(self) -> None:
        self.send_response(302 if self.path.startswith("/to/") else 200 if self.path != "/gone" else 404)
        if self.path.startswith("/to/"):
            self.send_header("Location", self.path.removeprefix("/to/"))
        self.end_headers()
        self.wfile.write(b"\x89PNG" * (1 << 19) if self.path == "/large" else png())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_of_listed_hosts(processor: Processor, elsewhere: int) -> None:
    place = f"127.0.0.1:{elsewhere}"
    hosts = (place, f"localhost:{elsewhere}", "other.example")
    with serving(FakeEngine(processor), hosts=hosts, limits=ServerLimits(body=1 << 20)) as served:
        for path, status in (
            (f"http://{place}/a.png", 200),
            (f"http://{place}/to//a.png", 200),
            (f"http://{place}/to/http://{place}/a.png", 200),
            (f"http://{place}/to/http://127.0.0.1:1/a.png", 400),  # leads to a port that is not listed
            (f"http://{place}/to/file:///etc/passwd", 400),
            (f"http://{place}/to//to//to//to//a.png", 400),
            (f"http://{place}/gone", 400),
            (f"http://{place}/large", 413),
            (f"http://me:pass@{place}/a.png", 400),
            (f"http://localhost:{elsewhere}/a.png", 400),  # listed, but its address is private and is not
            (f"http://127.1:{elsewhere}/a.png", 400),
            (f"http://127.0.0.1.:{elsewhere}/a.png", 400),
            ("http://127.0.0.1/a.png", 400),
            (f"ftp://{place}/a.png", 400),
        ):
            content = [{"type": "image_url", "image_url": {"url": path}}, {"type": "text", "text": "echo Hi."}]
            assert served.ask(content)[0] == status, path


def test_a_full_queue_and_a_slow_answer(processor: Processor) -> None:
    engine = FakeEngine(processor, max_running=1, seconds=0.01)
    with serving(engine, limits=ServerLimits(waiting=1, request_seconds=1)) as served:
        answers: list[tuple[int, str]] = []
        clients = [threading.Thread(target=lambda: answers.append(code(served.ask("endless small")))) for _ in range(2)]
        for client in clients:
            client.start()
        until(lambda: served.app.background.active == 2)
        answer = served.send(chat_bytes("echo Hi.", last=True))
        assert answer.startswith(b"HTTP/1.1 429 ") and b"Retry-After: " in answer
        for client in clients:
            client.join()
        assert answers == [(504, "timeout")] * 2
        until(lambda: not engine.open and not served.app.background.active)
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
        until(lambda: not engine.open and not served.app.open and not served.app.background.active)


def test_a_client_that_does_not_read_is_cancelled(processor: Processor, caplog: pytest.LogCaptureFixture) -> None:
    """Too much unread, and too long nothing taken: each ends the answer, and the other client never waits for it."""
    for most_unread, stall in ((20, 60.0), (10**9, 0.2)):
        engine = FakeEngine(processor, seconds=0.001)
        with serving(engine, seconds=Seconds(stall=stall)) as served, served.connect() as connection:
            served.app.background._most_unread = most_unread
            connection.sendall(chat_bytes("endless", stream=True))
            until(lambda engine=engine: engine.open)
            assert served.ask("echo Hi.")[0] == 200
            until(lambda engine=engine: engine.cancelled)
            if most_unread == 20:
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
    import asyncio

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


def test_the_page_runs_its_own_script_alone(served: Served) -> None:
    answer = served.send(b"GET / HTTP/1.1\r\n%s\r\n" % CLOSE).decode()
    head, _, page = answer.partition("\r\n\r\n")
    policy = next(line for line in head.splitlines() if line.startswith("Content-Security-Policy: "))
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    assert "innerHTML" not in page and "http://" not in page and "https://" not in page
    assert " style=" not in page and " onclick=" not in page


def test_all_that_is_held_at_once_is_limited(processor: Processor) -> None:
    with serving(FakeEngine(processor)) as served:
        bodies = served.app.bodies
        bodies.most = 100_000
        with served.connect() as connection:
            connection.sendall(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 90000\r\n\r\n" + bytes(80_000))
            until(lambda: bodies.held == 80_000)
            assert code(served.call("POST", "/v1/files", bytes(30_000))) == (429, "busy")
        until(lambda: bodies.held == 0)
