"""HTTP below the routes: connections with timeouts, bodies of limited size, errors and event streams as JSON."""

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

MAX_HEADERS = 64
MAX_LINE_BYTES = 8190
MAX_JSON_VALUES = 1 << 20
MAX_FORM_PARTS = 16
JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a client may take: to send the headers, to send a body, between requests (keepalive), to receive
    what it is sent (send). lingering: how long the rest of a refused body is read, so that the client sees the error
    instead of a closed connection."""

    headers: float = 15.0
    body: float = 60.0
    keepalive: float = 75.0
    send: float = 30.0
    lingering: float = 10.0


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def encode_json(value: Any) -> bytes:
    # Half of a surrogate pair, in an error that repeats a field's name, is written as JSON escapes it.
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=encode_json(value), status=status, content_type=JSON_TYPE)


def error_response(error: ApiError) -> web.Response:
    response = json_response(error.body(), error.status)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        response.headers["Retry-After"] = "2"
    if error.status in (408, 413, 503):  # the rest of the body need not be read
        response.force_close()
    return response


class Connection(web.RequestHandler):
    """One connection. A first request whose headers are not there in time gets 408: aiohttp's own limit
    (``keepalive_timeout``) counts from the end of a response. What aiohttp itself refuses gets a JSON body."""

    __slots__ = ("_timer", "headers_received", "timeouts")

    def __init__(self, manager: web.Server, timeouts: Timeouts):
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=timeouts.keepalive,
            lingering_time=timeouts.lingering,
            access_log=None,  # type: ignore[arg-type]
            max_headers=MAX_HEADERS,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
            auto_decompress=False,  # a compressed body would be larger than it looks
        )
        self.headers_received, self.timeouts = False, timeouts
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._timer = asyncio.get_running_loop().call_later(self.timeouts.headers, self._headers_timed_out)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _headers_timed_out(self) -> None:
        if self.headers_received or self.transport is None:
            return
        body = encode_json(ApiError(408, f"the headers did not come in {self.timeouts.headers:g} s").body())
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
        self.headers_received = True
        if isinstance(exc, ConnectionError):
            raise exc  # the client is gone
        if isinstance(exc, LineTooLong) or (message or "").startswith("Too many headers"):
            status = 431
        if status == 500:
            self.log_exception("a request failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun; nothing else can be sent")
        messages = {
            431: "the request line and headers are too large or too many",
            500: "the server failed; its log says why",
        }
        response = error_response(ApiError(status, messages.get(status, "not HTTP that can be read")))
        response.force_close()
        return response


class Server(web.Server):
    """Makes a Connection for each client; a handler is cancelled when its client disconnects."""

    def __init__(self, handler: Handler, timeouts: Timeouts):
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            request.protocol.headers_received = True  # type: ignore[attr-defined]
            return await handler(request)

        super().__init__(handle, handler_cancellation=True)
        self._timeouts = timeouts

    def __call__(self) -> Connection:
        return Connection(self, self._timeouts)


class BodyReader:
    """Reads bodies: each of at most ``max_bytes`` and within ``timeout`` seconds, all in use of ``max_total_bytes``."""

    def __init__(self, max_bytes: int, max_total_bytes: int, timeout: float):
        self.max_bytes, self.max_total_bytes, self.timeout, self.bytes_in_use = max_bytes, max_total_bytes, timeout, 0

    @asynccontextmanager
    async def read(self, request: web.BaseRequest) -> AsyncIterator[bytearray]:
        """The body, which counts as in use until the context is left. ApiError 408, 413, 415 or 429."""
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ApiError(415, "Content-Encoding: compressed bodies are not accepted")
        self._check_size(request.content_length or 0)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body, size = bytearray(), 0
        try:
            await self._receive(body, request)
            size = len(body)
            yield body
        finally:
            self.bytes_in_use -= size or len(body)

    async def _receive(self, body: bytearray, request: web.BaseRequest) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                while piece := await request.content.readany():
                    body += piece
                    self.bytes_in_use += len(piece)
                    self._check_size(len(body))
        except TimeoutError:
            raise ApiError(408, f"the body did not come in {self.timeout:g} s") from None
        except web.RequestPayloadError:
            raise ApiError(400, "the body is not what its headers say") from None

    def _check_size(self, size: int) -> None:
        if size > self.max_bytes:
            raise ApiError(413, f"the body has more than {self.max_bytes} bytes", code="body_too_large")
        if self.bytes_in_use > self.max_total_bytes:
            raise ApiError(429, "too many bytes are being received; try again later", code="busy")


def read_json(request: web.BaseRequest, body: bytearray) -> Any:
    """The value of a JSON body. ApiError 415 for another type of content, 400 for what is not JSON."""
    if request.content_type != JSON_TYPE:
        raise ApiError(415, f"Content-Type: {request.content_type[:60]!r} must be {JSON_TYPE}")
    # A parsed value takes up to twenty times the memory of its three characters.
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ApiError(413, f"the body has more than {MAX_JSON_VALUES} values", code="body_too_large")
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
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(errors="replace"), MAX_FORM_PARTS + 1)
    if len(pieces) < 2 or not pieces[-1].startswith(b"--"):
        raise ApiError(400, f"the body is not a form of at most {MAX_FORM_PARTS} parts that ends with its boundary")
    form = {}
    for piece in pieces[1:-1]:
        lines, blank, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        part = message_from_bytes(bytes(lines[:MAX_LINE_BYTES]))
        name = part.get_param("name", header="content-disposition")
        if not blank or not isinstance(name, str):
            raise ApiError(400, "the form has a part without a name")
        form[name] = FormPart(part.get_filename(), bytes(content))
    return form


class EventStream:
    """Server-sent events; the response begins with the first, so that an error before it has its own status."""

    def __init__(self, request: web.BaseRequest, send_timeout: float):
        self.request, self.send_timeout = request, send_timeout
        self.response: web.StreamResponse | None = None

    async def send(self, *values: Any) -> None:
        """One event for each value. ConnectionError if the client is gone or too slow to receive."""
        await self._write(b"".join(b"data: " + encode_json(value) + b"\n\n" for value in values))

    async def end(self, *values: Any) -> None:
        """The last events, and the ``[DONE]`` mark."""
        await self._write(b"".join(b"data: " + encode_json(value) + b"\n\n" for value in values) + b"data: [DONE]\n\n")

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self.send_timeout):
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
