"""``python -m infer.serve --checkpoint DIR``: an OpenAI-compatible server, with a page at ``/``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from infer.engine.engine import Engine
from infer.engine_arguments import engine_config_of, engine_options, load_model, model_options
from phi4rv.command_line import MAX_NEW_TOKENS, MOST, Number, Parser, exit_status
from phi4rv.errors import UserError

if TYPE_CHECKING:
    from infer.server.routes import App

KEY_VARIABLE = "PHI4RV_API_KEY"
BACKLOG = 1024


def make_parser() -> Parser:
    parser = Parser("infer.serve", "Serves a checkpoint over HTTP, in OpenAI's protocol, with a page at /.")
    model_options(parser.section("model"))
    _address_options(parser.section("address and access"))
    engine_options(parser.section("engine"))
    _limit_options(parser.section("limits of requests"))
    return parser


def _address_options(add: Callable[..., None]) -> None:
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every one of the machine's")
    add("--port", kind=Number(int, 0, 65535), default=8000, help="port to listen on; 0: one that is free")
    add("--model-name", metavar="NAME", help="what requests call the model", unset="the checkpoint folder's name")
    add(
        "--api-key-file",
        metavar="FILE",
        help="file with the key that /v1 asks for",
        unset=f"{KEY_VARIABLE}, else no key",
    )
    add(
        "--allow-urls",
        nargs="+",
        default=[],
        metavar="HOST",
        help="hosts, or host:port, that URLs of images may name",
        unset="none, images come with the request",
    )


def _limit_options(add: Callable[..., None]) -> None:
    positive = Number(int, 1, MOST)
    add("--max-queue", kind=Number(int, 0, MOST), default=1024, help="requests that may wait; others get 429")
    add("--max-body-mb", kind=positive, default=32, help="MiB of a request's body, at most")
    add("--max-files-mb", kind=positive, default=256, help="MiB of uploaded files that are kept, in all")
    add("--max-image-megapixels", kind=positive, default=40, help="millions of pixels of an image, at most")
    add(
        "--max-prompt-tokens",
        kind=positive,
        help="tokens of a prompt, its images included, at most; longer ones get 413",
        unset="the model's window",
    )
    add("--max-new-tokens", kind=positive, default=4096, help=f"{MAX_NEW_TOKENS}; the largest max_tokens of a request")
    add(
        "--request-timeout",
        kind=positive,
        default=600,
        metavar="SECONDS",
        help="seconds that a whole answer may take",
    )
    add(
        "--grace",
        kind=Number(int, 0, MOST),
        default=30,
        metavar="SECONDS",
        help="seconds that running answers have after SIGTERM",
    )


def api_key(args: argparse.Namespace) -> str | None:
    """The key of the file or the environment; None where neither is given. UserError for an empty one."""
    if not args.api_key_file:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(args.api_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {args.api_key_file}: cannot be read ({error})") from None
    if not key:
        raise UserError(f"--api-key-file {args.api_key_file}: is empty; write the key in it")
    return key


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet, so that a taken port is told before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UserError(f"--port: cannot listen on {host} port {port} ({error.strerror}); give another") from None
    return made


async def serve(app: App, listener: socket.socket, grace: float) -> None:
    """Serves until SIGTERM or SIGINT; then takes nothing new, and ends when what runs has, or after ``grace`` s."""
    from aiohttp import web

    from infer.server.connections import Server

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.ServerRunner(Server(app.handle, app.timeouts), shutdown_timeout=1.0)
    await runner.setup()
    site = web.SockSite(runner, listener, backlog=BACKLOG)
    await site.start()
    host, port = listener.getsockname()[:2]
    print(f"{app.model} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    await site.stop()
    await app.drain(grace)
    await runner.cleanup()
    await app.async_engine.close()


def allow_many_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def run(args: argparse.Namespace) -> None:
    missing = [name for name in ("aiohttp", "prometheus-client") if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise UserError(f"infer.serve needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from infer.server.routes import App, ServerLimits

    engine_config = engine_config_of(args)
    key = api_key(args)
    listener = bound_socket(args.host, args.port)
    engine = Engine(load_model(args), config=engine_config)
    engine.warm_up()
    limits = ServerLimits(
        max_body_bytes=args.max_body_mb << 20,
        file_store_bytes=args.max_files_mb << 20,
        max_image_pixels=args.max_image_megapixels * 1_000_000,
        max_prompt_tokens=args.max_prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        max_waiting=args.max_queue,
        request_timeout=args.request_timeout,
    )
    name = args.model_name or Path(args.checkpoint).resolve().name

    async def main() -> None:
        local = key is None and ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
        app = App(engine, name, limits, key, tuple(args.allow_urls), local=local)
        await serve(app, listener, args.grace)

    allow_many_connections()
    asyncio.run(main())


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
