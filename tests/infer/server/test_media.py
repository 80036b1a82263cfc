"""Images of requests: inline, uploaded and from other servers, good and bad ones."""

import base64
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from infer.server.routes import ServerLimits
from phi4rv import Processor
from tests import small
from tests.fake_engine import FakeEngine
from tests.serving import Served, serving

LIMITS = ServerLimits(
    max_body_bytes=1 << 20, file_store_bytes=8192, max_image_pixels=10_000, max_new_tokens=50, max_waiting=4
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small.small_model()[1]


@pytest.fixture(scope="module")
def served(processor: Processor) -> Iterator[Served]:
    with serving(FakeEngine(processor, max_running=2), limits=LIMITS, hosts=("127.0.0.1",)) as served:
        yield served


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


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


def form(boundary: str, *parts: tuple[str, bytes]) -> bytes:
    made = b"".join(b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary.encode(), head.encode(), body) for head, body in parts)
    return made + f"--{boundary}--\r\n".encode()


def send_file(served: Served, content: bytes) -> tuple[int, Any]:
    head = 'Content-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png'
    body = form("xyz", ('Content-Disposition: form-data; name="purpose"', b"vision"), (head, content))
    return served.call("POST", "/v1/files", body, Content_Type="multipart/form-data; boundary=xyz")


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
def test_images(served: Served, content: bytes, status: int) -> None:
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
    store = served.app.files
    assert store.size == sum(file.size for file in store.files.values()) <= 8192
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
    with serving(FakeEngine(processor), hosts=hosts, limits=ServerLimits(max_body_bytes=1 << 20)) as served:
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
