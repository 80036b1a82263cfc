"""The server's routes: chat completions, models, files, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from aiohttp import web

from infer.engine.engine import Engine
from infer.requests.request import Event, Generation
from infer.server.async_engine import Background
from infer.server.connections import Bodies, EventStream, Seconds, error_response, json_response, read_form, read_json
from infer.server.errors import ApiError, of_user_error
from infer.server.media import Pictures, Uploads, check_picture
from infer.server.metrics import Metrics
from infer.server.protocol import Chat, ChatReader
from infer.server.responses import Reply
from phi4rv.errors import UserError
from phi4rv.processing.processor import Prompt

PAGE = Path(__file__).with_name("page.html")
Batches = AsyncGenerator[list[tuple[int, Event]], None]


@dataclass(frozen=True)
class ServerLimits:
    """Bytes of a body and of all uploads, pixels of an image, tokens, waiting requests, and seconds."""

    body: int = 32 << 20
    uploads: int = 256 << 20
    pixels: int = 40_000_000
    prompt_tokens: int | None = None  # None: the model's window
    new_tokens: int = 4096
    waiting: int = 1024
    request_seconds: float = 600.0


LIMITS, SECONDS = ServerLimits(), Seconds()


class App:
    """Answers HTTP requests by an engine. ``model``: the name it goes by. ``hosts``: those that URLs may name.
    ``local``: only requests to this machine's own names are answered; a page from elsewhere whose name is made to
    point here (DNS rebinding) may not ask.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        limits: ServerLimits = LIMITS,
        api_key: str | None = None,
        hosts: tuple[str, ...] = (),
        seconds: Seconds = SECONDS,
        local: bool = False,
    ):
        self.engine, self.model, self.limits, self.seconds = engine, model, limits, seconds
        self._local = local
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else None
        self.background = Background(engine, limits.waiting)
        self.metrics = Metrics(engine.counters, lambda: self.background.active)
        self.uploads = Uploads(limits.uploads)
        self.pictures = Pictures(hosts, self.uploads, limits.body, limits.pixels)
        self.reader = ChatReader(engine.processor, model, limits.new_tokens)
        self.bodies = Bodies(limits.body, 64 * limits.body, seconds.body)
        self.stopping, self.open = False, 0
        self._page, self._policy = _page()
        self._routes: dict[str, dict[str, Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]]] = {
            "/": {"GET": self.page},
            "/health": {"GET": self.health},
            "/metrics": {"GET": self.show_metrics},
            "/v1/models": {"GET": self.models},
            "/v1/models/": {"GET": self.one_model},
            "/v1/files": {"POST": self.upload},
            "/v1/files/": {"GET": self.one_file, "DELETE": self.remove_file},
            "/v1/chat/completions": {"POST": self.chat},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any request's response, counted by route and status (499: the client went)."""
        route, status = "other", 499
        self.open += 1
        try:
            route, name = self._route(request.path)
            response = await self._checked(request, route, name)
            status = response.status
        except ApiError as error:
            response = error_response(error)
            status = error.status
        except ConnectionError:
            raise
        except Exception:
            status = 500
            raise  # told and logged by the connection
        finally:
            self.open -= 1
            self.metrics.responses.labels(route, status).inc()
        if self.stopping:
            response.force_close()
        return response

    async def drain(self, seconds: float) -> None:
        """Takes nothing new from now on; returns when all requests have been answered, or after ``seconds``."""
        self.stopping = True
        end = time.monotonic() + seconds
        while self.open and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def _route(self, path: str) -> tuple[str, str]:
        """The route of a path, and what follows a route that ends in a slash."""
        if path in self._routes and (path == "/" or not path.endswith("/")):
            return path, ""
        for route in ("/v1/models/", "/v1/files/"):
            if path.startswith(route) and path != route:
                return route, path.removeprefix(route)
        raise ApiError(404, f"there is nothing at {path[:100]!r}")

    async def _checked(self, request: web.BaseRequest, route: str, name: str) -> web.StreamResponse:
        if self._local and not _names_this_machine(request.host):
            raise ApiError(403, f"Host: {request.host[:100]!r} is not this machine; use localhost or set an API key")
        if route.startswith("/v1/"):
            self._check_key(request)
        methods = self._routes[route]
        handler = methods.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            response = error_response(ApiError(405, f"{request.method[:20]}: use {' or '.join(methods)} here"))
            response.headers["Allow"] = ", ".join(methods)
            return response
        if self.stopping and request.method == "POST":
            raise ApiError(503, "the server is stopping", code="stopping")
        return await handler(request, name)

    def _check_key(self, request: web.BaseRequest) -> None:
        if self._key is None:
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # Of equal length, compared in constant time: nothing about the key shows in how long it takes.
        digest = hashlib.sha256(given.encode(errors="surrogateescape")).digest()
        if not hmac.compare_digest(digest, self._key):
            raise ApiError(401, "Authorization: needs Bearer and the right API key", code="invalid_api_key")

    async def page(self, request: web.BaseRequest, name: str) -> web.Response:
        headers = {"Content-Security-Policy": self._policy, "Referrer-Policy": "no-referrer"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=headers)

    async def health(self, request: web.BaseRequest, name: str) -> web.Response:
        self.background.check_alive()
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        return json_response({"status": "ok", "model": self.model})

    async def show_metrics(self, request: web.BaseRequest, name: str) -> web.Response:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": self.metrics.content_type})

    async def models(self, request: web.BaseRequest, name: str) -> web.Response:
        return json_response({"object": "list", "data": [self._described()]})

    async def one_model(self, request: web.BaseRequest, name: str) -> web.Response:
        if name != self.model:
            raise ApiError(404, f"model: there is no {name[:100]!r} here", "model", "model_not_found")
        return json_response(self._described())

    def _described(self) -> dict[str, Any]:
        context = self.engine.config.context
        return {"id": self.model, "object": "model", "created": 0, "owned_by": "phi4rv", "max_model_len": context}

    async def upload(self, request: web.BaseRequest, name: str) -> web.Response:
        async with self.bodies.of(request) as body:
            form = read_form(request, body)
        if "file" not in form:
            raise ApiError(400, "file: missing; give the picture as the form's part of this name", "file")
        file = form["file"]
        check_picture(file.content, self.limits.pixels, "file")
        purpose = form["purpose"].content.decode(errors="replace")[:64] if "purpose" in form else "vision"
        added = self.uploads.add((file.filename or "picture")[:200], file.content, purpose)
        return json_response(added.described())

    async def one_file(self, request: web.BaseRequest, name: str) -> web.Response:
        return json_response(self.uploads.get(name, "file_id").described())

    async def remove_file(self, request: web.BaseRequest, name: str) -> web.Response:
        self.uploads.remove(name)
        return json_response({"id": name, "object": "file", "deleted": True})

    async def chat(self, request: web.BaseRequest, name: str) -> web.StreamResponse:
        arrived = time.monotonic()
        self.background.check_room()
        stream = EventStream(request, self.seconds.stall)
        try:
            async with self.bodies.of(request) as body:
                chat = self.reader.read(read_json(request, body))
                body.clear()  # its pictures go on counting as held
                async with asyncio.timeout(self.limits.request_seconds):
                    return await self._answer(chat, stream, arrived)
        except TimeoutError:
            error = ApiError(504, f"the answer took longer than {self.limits.request_seconds:g} s", code="timeout")
        except ApiError as raised:
            error = raised
        if stream.response is None:
            raise error
        await stream.send(error.body())
        return stream.response

    async def _answer(self, chat: Chat, stream: EventStream, arrived: float) -> web.StreamResponse:
        reply = Reply(self.model, self.engine.processor)
        ended: dict[int, Generation] = {}
        images = [await self.pictures.find(source, "image_url") for source in chat.pictures]
        prompt = Prompt(chat.messages, images, chat.mode)
        async with self.background.admitted(len(chat.options)) as place:
            requests = [await self.background.prepare(prompt, options) for options in chat.options]
            self._check_tokens(requests[0].prompt_tokens)
            async with aclosing(self._timed(self.background.ask(requests, place), arrived)) as batches:
                async for batch in batches:
                    ended |= {choice: event.generation for choice, event in batch if event.generation}
                    failed = next((generation.error for generation in ended.values() if generation.error), None)
                    if failed:  # a constraint turned out too complex
                        raise of_user_error(UserError(failed))
                    if chat.stream:
                        opening = [reply.opening(i) for i in range(len(requests))] if stream.response is None else []
                        await stream.send(*opening, *reply.chunks(batch))
        generations = [ended[i] for i in range(len(requests))]
        if stream.response is None:
            return json_response(reply.whole(generations))
        await stream.end(*[reply.closing(generations)] if chat.include_usage else [])
        return stream.response

    def _check_tokens(self, tokens: int) -> None:
        most = self.limits.prompt_tokens
        if most is not None and tokens > most:
            message = f"messages: {tokens} tokens; at most {most} are accepted"
            raise ApiError(413, message, "messages", "prompt_too_large")

    async def _timed(self, asked: Batches, arrived: float) -> Batches:
        """The batches of the answers, whose times are observed as they pass."""
        last: dict[int, float] = {}
        async with aclosing(asked) as batches:
            async for batch in batches:
                now = time.monotonic()
                tokens: dict[int, int] = {}
                for choice, event in batch:
                    if event.token_ids:
                        tokens[choice] = tokens.get(choice, 0) + len(event.token_ids)
                for choice, count in tokens.items():
                    if choice in last:
                        self.metrics.between_tokens.observe((now - last[choice]) / count)
                    else:
                        self.metrics.first_token.observe(now - arrived)
                    last[choice] = now
                yield batch


def _names_this_machine(host: str) -> bool:
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _page() -> tuple[bytes, str]:
    """The page, and a policy under which it runs its own script and style and nothing else."""
    page = PAGE.read_text()

    def hashes(tag: str) -> str:
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inline]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy
