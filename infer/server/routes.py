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
from infer.requests.outputs import Generation, StreamEvent
from infer.server.async_engine import AsyncEngine
from infer.server.connections import (
    BodyReader,
    EventStream,
    Timeouts,
    error_response,
    json_response,
    read_form,
    read_json,
)
from infer.server.errors import ApiError, from_user_error
from infer.server.media import FileStore, MediaConnector, check_image
from infer.server.metrics import Metrics
from infer.server.protocol import ChatCompletionRequest, ChatRequestParser
from infer.server.responses import ChatCompletion
from phi4rv.errors import UserError
from phi4rv.processing.processor import Prompt

PAGE = Path(__file__).with_name("page.html")
Batches = AsyncGenerator[list[tuple[int, StreamEvent]], None]


@dataclass(frozen=True)
class ServerLimits:
    """``file_store_bytes``: of all uploaded files together; ``request_timeout``: seconds."""

    max_body_bytes: int = 32 << 20
    file_store_bytes: int = 256 << 20
    max_image_pixels: int = 40_000_000
    max_prompt_tokens: int | None = None  # None: the model's context window
    max_new_tokens: int = 4096
    max_waiting: int = 1024
    request_timeout: float = 600.0


LIMITS, TIMEOUTS = ServerLimits(), Timeouts()


class App:
    """Serves an engine over HTTP. ``model``: its name in requests. ``hosts``: those that image URLs may name.
    ``local``: only requests to this machine's own names are answered, not those of a foreign page whose name is made to
    resolve to this machine (DNS rebinding).
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        limits: ServerLimits = LIMITS,
        api_key: str | None = None,
        hosts: tuple[str, ...] = (),
        timeouts: Timeouts = TIMEOUTS,
        local: bool = False,
    ):
        self.engine, self.model, self.limits, self.timeouts = engine, model, limits, timeouts
        self._local = local
        self._key = hashlib.sha256(api_key.encode()).digest() if api_key else None
        self.async_engine = AsyncEngine(engine, limits.max_waiting)
        self.metrics = Metrics(engine.stats, lambda: self.async_engine.num_active)
        self.files = FileStore(limits.file_store_bytes)
        self.media = MediaConnector(hosts, self.files, limits.max_body_bytes, limits.max_image_pixels)
        self.parser = ChatRequestParser(engine.processor, model, limits.max_new_tokens)
        self.body_reader = BodyReader(limits.max_body_bytes, 64 * limits.max_body_bytes, timeouts.body)
        self.stopping, self.num_open = False, 0
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
        """Any request's response, counted by route and status (499: the client disconnected)."""
        route, status = "other", 499
        self.num_open += 1
        try:
            route, name = self._route(request.path)
            response = await self._dispatch(request, route, name)
            status = response.status
        except ApiError as error:
            response = error_response(error)
            status = error.status
        except ConnectionError:
            raise
        except Exception:
            status = 500
            raise  # the connection responds and logs
        finally:
            self.num_open -= 1
            self.metrics.responses.labels(route, status).inc()
        if self.stopping:
            response.force_close()
        return response

    async def drain(self, seconds: float) -> None:
        """Accepts nothing new from now on; returns when all requests have been answered, or after ``seconds``."""
        self.stopping = True
        end = time.monotonic() + seconds
        while self.num_open and time.monotonic() < end:
            await asyncio.sleep(0.05)

    def _route(self, path: str) -> tuple[str, str]:
        """The route of a path, and what follows a route that ends in a slash."""
        if path in self._routes and (path == "/" or not path.endswith("/")):
            return path, ""
        for route in ("/v1/models/", "/v1/files/"):
            if path.startswith(route) and path != route:
                return route, path.removeprefix(route)
        raise ApiError(404, f"there is nothing at {path[:100]!r}")

    async def _dispatch(self, request: web.BaseRequest, route: str, name: str) -> web.StreamResponse:
        if self._local and not _is_this_machine(request.host):
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
        # Digests have equal length and are compared in constant time: timing reveals nothing about the key.
        digest = hashlib.sha256(given.encode(errors="surrogateescape")).digest()
        if not hmac.compare_digest(digest, self._key):
            raise ApiError(401, "Authorization: needs Bearer and the right API key", code="invalid_api_key")

    async def page(self, request: web.BaseRequest, name: str) -> web.Response:
        headers = {"Content-Security-Policy": self._policy, "Referrer-Policy": "no-referrer"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=headers)

    async def health(self, request: web.BaseRequest, name: str) -> web.Response:
        self.async_engine.check_alive()
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        return json_response({"status": "ok", "model": self.model})

    async def show_metrics(self, request: web.BaseRequest, name: str) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": self.metrics.content_type})

    async def models(self, request: web.BaseRequest, name: str) -> web.Response:
        return json_response({"object": "list", "data": [self._model_json()]})

    async def one_model(self, request: web.BaseRequest, name: str) -> web.Response:
        if name != self.model:
            raise ApiError(404, f"model: there is no {name[:100]!r} here", "model", "model_not_found")
        return json_response(self._model_json())

    def _model_json(self) -> dict[str, Any]:
        context = self.engine.model_config.context
        return {"id": self.model, "object": "model", "created": 0, "owned_by": "phi4rv", "max_model_len": context}

    async def upload(self, request: web.BaseRequest, name: str) -> web.Response:
        async with self.body_reader.read(request) as body:
            form = read_form(request, body)
        if "file" not in form:
            raise ApiError(400, "file: missing; give the picture as the form's part of this name", "file")
        file = form["file"]
        check_image(file.content, self.limits.max_image_pixels, "file")
        purpose = form["purpose"].content.decode(errors="replace")[:64] if "purpose" in form else "vision"
        added = self.files.add((file.filename or "picture")[:200], file.content, purpose)
        return json_response(added.to_json())

    async def one_file(self, request: web.BaseRequest, name: str) -> web.Response:
        return json_response(self.files.get(name, "file_id").to_json())

    async def remove_file(self, request: web.BaseRequest, name: str) -> web.Response:
        self.files.remove(name)
        return json_response({"id": name, "object": "file", "deleted": True})

    async def chat(self, request: web.BaseRequest, name: str) -> web.StreamResponse:
        arrived = time.monotonic()
        self.async_engine.check_capacity()
        stream = EventStream(request, self.timeouts.send)
        try:
            async with self.body_reader.read(request) as body:
                chat = self.parser.parse(read_json(request, body))
                body.clear()  # its images go on counting as in use
                async with asyncio.timeout(self.limits.request_timeout):
                    return await self._answer(chat, stream, arrived)
        except TimeoutError:
            error = ApiError(504, f"the answer took longer than {self.limits.request_timeout:g} s", code="timeout")
        except ApiError as raised:
            error = raised
        if stream.response is None:
            raise error
        await stream.send(error.body())
        return stream.response

    async def _answer(self, chat: ChatCompletionRequest, stream: EventStream, arrived: float) -> web.StreamResponse:
        completion = ChatCompletion(self.model, self.engine.processor)
        finished: dict[int, Generation] = {}
        images = [await self.media.fetch_image(source, "image_url") for source in chat.images]
        prompt = Prompt(chat.messages, images, chat.mode)
        async with self.async_engine.admit(len(chat.sampling_params)) as admission:
            requests = [await self.async_engine.prepare(prompt, params) for params in chat.sampling_params]
            self._check_tokens(requests[0].prompt_tokens)
            generated = self._observed(self.async_engine.generate(requests, admission), arrived)
            async with aclosing(generated) as batches:
                async for batch in batches:
                    finished |= {choice: event.generation for choice, event in batch if event.generation}
                    failed = next((generation.error for generation in finished.values() if generation.error), None)
                    if failed:  # a grammar turned out too complex
                        raise from_user_error(UserError(failed))
                    if chat.stream:
                        first = (
                            [completion.first_chunk(i) for i in range(len(requests))] if stream.response is None else []
                        )
                        await stream.send(*first, *completion.chunks(batch))
        generations = [finished[i] for i in range(len(requests))]
        if stream.response is None:
            return json_response(completion.response(generations))
        await stream.end(*[completion.usage_chunk(generations)] if chat.include_usage else [])
        return stream.response

    def _check_tokens(self, tokens: int) -> None:
        limit = self.limits.max_prompt_tokens
        if limit is not None and tokens > limit:
            message = f"messages: {tokens} tokens; at most {limit} are accepted"
            raise ApiError(413, message, "messages", "prompt_too_large")

    async def _observed(self, generated: Batches, arrived: float) -> Batches:
        """Passes the events on and records the times of their tokens."""
        last: dict[int, float] = {}
        async with aclosing(generated) as batches:
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


def _is_this_machine(host: str) -> bool:
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
