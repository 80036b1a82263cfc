"""A server in a thread of this process, for tests that talk to it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

from aiohttp import web

from infer.server.connections import Server
from infer.server.routes import App


@dataclass
class Served:
    """A running server, and requests to it."""

    app: App
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of one request; what is not bytes is sent as JSON. ``_`` in a header's name is ``-``."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content_Type", "application/json")
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            content = response.read()
            return response.status, json.loads(content) if content else None
        finally:
            connection.close()

    def ask(self, content: Any = "echo Hi.", **fields: Any) -> tuple[int, Any]:
        return self.call("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def send(self, data: bytes) -> bytes:
        """What comes back for these bytes on a connection of their own, until the server closes it."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)


CLOSE = b"Host: x\r\nConnection: close\r\n"


def chat_bytes(text: str, last: bool = False, **fields: Any) -> bytes:
    """A chat request as it goes over the wire; ``last``: the connection ends with the answer."""
    body = json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "Connection: close\r\n" if last else ""
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    """Waits for it, and fails if it does not come."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionError:
        pass  # closed with something unread: what came before it counts
    return received


@contextmanager
def serving(engine: Any, model: str = "tiny", **options: Any) -> Iterator[Served]:
    """Serves ``engine`` on a free port. ``options``: of ``App``."""
    ready: list[Served] = []
    started, ended = threading.Event(), threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        app = App(engine, model, **options)
        runner = web.ServerRunner(Server(app.handle, app.timeouts), shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        ready.append(Served(app, site.port, asyncio.get_running_loop()))
        started.set()
        await stop.wait()
        await runner.cleanup()
        await app.async_engine.close()

    thread = threading.Thread(target=lambda: (asyncio.run(main()), ended.set()))
    thread.start()
    assert started.wait(20)
    try:
        yield ready[0]
    finally:
        ready[0].loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert ended.is_set(), "the server did not end"
