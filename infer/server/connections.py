"""HTTP below the routes: connections that must be quick to ask, bodies of limited size, errors and streams as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from typing import Any, NoReturn

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from infer.server.errors import ApiError

MOST_HEADERS = 64
LONGEST_LINE = 8190
MOST_VALUES = 1 << 20
MOST_PARTS = 16
JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Seconds:
    """How long a client may take: for the headers, for a body, with nothing asked, to take what it is sent; and how
    long the rest of a refused body is read, so that the client is told why instead of finding the connection closed."""

    headers: float = 15.0
    body: float = 60.0
    idle: float = 75.0
    stall: float = 30.0
    linger: float = 10.0


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def encoded(value: Any) -> bytes:
    # Half of a surrogate pair, in an error that repeats a field's name, is written as JSON escapes it.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=encoded(value), status=status, content_type=JSON_TYPE)


def error_response(error: ApiError) -> web.Response:
    response = json_response(error.body(), error.status)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        response.headers["Retry-After"] = "2"
    if error.status in (408, 413, 503):  # what is left of the body need not be read, nor the client be kept
        response.force_close()
    return response


class Connection(web.RequestHandler):
    """One connection. A first request whose headers are not there in time gets 408: aiohttp's own limit
    (``keepalive_timeout``) counts from the end of an answer. What aiohttp refuses by itself gets a JSON body."""

    __slots__ = ("_timer", "asked", "seconds")

    def __init__(self, manager: web.Server, seconds: Seconds):
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=seconds.idle,
            lingering_time=seconds.linger,
            access_log=None,  # type: ignore[arg-type]
            max_headers=MOST_HEADERS,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
            auto_decompress=False,  # a compressed body would be larger than it looks
        )
        self.asked, self.seconds = False, seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._timer = asyncio.get_running_loop().call_later(self.seconds.headers, self._too_slow)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _too_slow(self) -> None:
        if self.asked or self.transport is None:
            return
        body = encoded(ApiError(408, f"the headers did not come in {self.seconds.headers:g} s").body())
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: {JSON_TYPE}\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        self.asked = True
        if isinstance(exc, ConnectionError):
            raise exc  # the client is gone
        if isinstance(exc, LineTooLong) or (message or "").startswith("Too many headers"):
            status = 431
        if status == 500:
            self.log_exception("a request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; nothing else can be sent")
        told = {
            431: "the request line and headers are too large or too many",
            500: "the server failed; its log says why",
        }
        response = error_response(ApiError(status, told.get(status, "not HTTP that can be read")))
        response.force_close()
        return response


class Server(web.Server):
    """Makes a Connection for each client; a handler is cancelled when its client goes."""

    def __init__(self, handler: Handler, seconds: Seconds):
        async def asked(request: web.BaseRequest) -> web.StreamResponse:
            request.protocol.asked = True  # type: ignore[attr-defined]
            return await handler(request)

        super().__init__(asked, handler_cancellation=True)
        self._seconds = seconds

    def __call__(self) -> Connection:
        return Connection(self, self._seconds)


class Bodies:
    """Reads bodies: each at most ``largest`` bytes and in ``seconds``, all that are held at most ``most`` bytes."""

    def __init__(self, largest: int, most: int, seconds: float):
        self.largest, self.most, self.seconds, self.held = largest, most, seconds, 0

    @asynccontextmanager
    async def of(self, request: web.BaseRequest) -> AsyncIterator[bytearray]:
        """The body, which counts as held until this is left. ApiError 408, 413, 415 or 429."""
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ApiError(415, "Content-Encoding: compressed bodies are not accepted")
        self._check(request.content_length or 0)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body, size = bytearray(), 0
        try:
            await self._fill(body, request)
            size = len(body)
            yield body
        finally:
            self.held -= size or len(body)

    async def _fill(self, body: bytearray, request: web.BaseRequest) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                while piece := await request.content.readany():
                    body += piece
                    self.held += len(piece)
                    self._check(len(body))
        except TimeoutError:
            raise ApiError(408, f"the body did not come in {self.seconds:g} s") from None
        except web.RequestPayloadError:
            raise ApiError(400, "the body is not what its headers say") from None

    def _check(self, size: int) -> None:
        if size > self.largest:
            raise ApiError(413, f"the body has more than {self.largest} bytes", code="body_too_large")
        if self.held > self.most:
            raise ApiError(429, "too many bytes are being received; try again later", code="busy")


def read_json(request: web.BaseRequest, body: bytearray) -> Any:
    """The value of a JSON body. ApiError 415 for another type of content, 400 for what is not JSON."""
    if request.content_type != JSON_TYPE:
        raise ApiError(415, f"Content-Type: {request.content_type[:60]!r} must be {JSON_TYPE}")
    # A value takes up to twenty times its three characters.
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ApiError(413, f"the body has more than {MOST_VALUES} values", code="body_too_large")
    try:
        return json.loads(body.decode(), parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({str(error)[:100]})", code="invalid_json") from None


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


@dataclass(frozen=True)
class FormPart:
    filename: str | None
    content: bytes


def read_form(request: web.BaseRequest, body: bytearray) -> dict[str, FormPart]:
    """The parts of a multipart/form-data body (RFC 7578) by their names. ApiError 415 or 400."""
    head = Message()
    head["Content-Type"] = request.headers.get("Content-Type", "")
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise ApiError(415, "Content-Type: must be multipart/form-data with a boundary")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(errors="replace"), MOST_PARTS + 1)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise ApiError(400, f"the body is not a form of at most {MOST_PARTS} parts that ends with its boundary")
    form = {}
    for piece in pieces[1:-1]:
        lines, blank, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        part = message_from_bytes(bytes(lines[:LONGEST_LINE]))
        name = part.get_param("name", header="content-disposition")
        if not blank or not isinstance(name, str):
            raise ApiError(400, "the form has a part without a name")
        form[name] = FormPart(part.get_filename(), bytes(content))
    return form


class EventStream:
    """Server-sent events; the response begins with the first, so that what goes wrong before has its own status."""

    def __init__(self, request: web.BaseRequest, stall_seconds: float):
        self.request, self.stall_seconds = request, stall_seconds
        self.response: web.StreamResponse | None = None

    async def send(self, *values: Any) -> None:
        """One event for each value. ConnectionError if the client is gone or takes nothing for ``stall_seconds``."""
        await self._write(b"".join(b"data: " + encoded(value) + b"\n\n" for value in values))

    async def end(self, *values: Any) -> None:
        """The last events, and the mark that there are no more."""
        await self._write(b"".join(b"data: " + encoded(value) + b"\n\n" for value in values) + b"data: [DONE]\n\n")

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self.stall_seconds):
                if self.response is None:
                    headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
                    self.response = web.StreamResponse(headers=headers | {"X-Accel-Buffering": "no"})
                    await self.response.prepare(self.request)
                await self.response.write(data)
        except TimeoutError:
            self.abort()
            raise ConnectionResetError("the client reads too slowly") from None

    def abort(self) -> None:
        if self.request.transport is not None:
            self.request.transport.abort()
