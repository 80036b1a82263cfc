"""The server under many clients: ``python -m benchmarks.server_load [--clients 500] [--requests 10000]``, and options
of ``infer.serve``.

Starts ``infer.serve`` on a checkpoint (the tests' tiny one unless given) as a process of its own, asks each of
QUESTIONS once, alone, and then lets so many clients stream answers at once, each asking the next question as soon as
its last answer has ended. Told are requests that were dropped (no answer, or one that breaks off), answers that differ
from the one given alone, times to the first token and to the last, and the process's memory after every tenth of the
requests. Then SIGTERM, while every client waits for an answer: those must come, and the process must end with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import infer.serve
from benchmarks.options import json_option
from benchmarks.report.result_files import write_results
from benchmarks.report.rows import Row
from phi4rv.command_line import CHECKPOINT, MOST, Number, Parser, exit_status
from phi4rv.errors import UserError

if TYPE_CHECKING:
    import aiohttp

TINY = Path(__file__).parent.parent / "tests" / "data" / "tiny-checkpoint"
QUESTIONS = 50
TOKENS = 8
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class LoadStats:
    """What has been seen. Seconds from a request's sending; memory in MB by the number of answers there were."""

    requests: int
    asked: int = 0
    answered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    different: int = 0
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    memory: dict[int, float] = field(default_factory=dict)


def request_body(number: int) -> dict[str, Any]:
    """Question ``number``: greedy or drawn, with and without thought."""
    text = f"What is number {number}? " + "Think well. " * (number % 7)
    sampling = {"temperature": float(number % 2), "seed": number, "max_tokens": TOKENS}
    effort = "high" if number % 3 else "none"
    return {"messages": [{"role": "user", "content": text}], "stream": True, "reasoning_effort": effort, **sampling}


async def ask(session: aiohttp.ClientSession, number: int, load: LoadStats | None = None) -> str:
    """The answer to a question, thought and text. ConnectionError if it breaks off or is refused."""
    began, first, said = time.monotonic(), 0.0, ""
    async with session.post("/v1/chat/completions", json=request_body(number)) as response:
        if response.status != 200:
            raise ConnectionError(f"status {response.status}")
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            first = first or time.monotonic()
            if line.startswith(b"data: [DONE]"):
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise ConnectionError(event["error"]["code"])
            delta = event["choices"][0]["delta"]
            said += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
        else:
            raise ConnectionError("broken off")
    if load is not None:
        load.first.append(first - began)
        load.total.append(time.monotonic() - began)
    return said


def resident_memory_mb(process: int) -> float:
    """The process's memory in MB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE / 1e6


async def client(session: aiohttp.ClientSession, load: LoadStats, right: list[str], process: int) -> None:
    """Asks until all requests have been asked."""
    import aiohttp

    while load.asked < load.requests:
        number = load.asked % QUESTIONS
        load.asked += 1
        try:
            load.different += await ask(session, number, load) != right[number]
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            load.dropped[str(error) or type(error).__name__] += 1
        load.answered += 1
        if load.answered % max(1, load.requests // 10) == 0:
            load.memory[load.answered] = round(resident_memory_mb(process), 1)


async def measure(url: str, clients: int, load: LoadStats, process: int) -> tuple[float, int]:
    """Fills ``load``. Seconds it took, and how many of the last answers, asked before SIGTERM, did not come."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    limit = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=limit) as session:
        right = [await ask(session, number) for number in range(QUESTIONS)]
        load.memory[0] = round(resident_memory_mb(process), 1)
        began = time.monotonic()
        await asyncio.gather(*(client(session, load, right, process) for _ in range(clients)))
        seconds = time.monotonic() - began
        last = [asyncio.create_task(ask(session, number % QUESTIONS)) for number in range(clients)]
        while await active(session) < clients and not all(task.done() for task in last):
            await asyncio.sleep(0.01)
        os.kill(process, signal.SIGTERM)
        answers = await asyncio.gather(*last, return_exceptions=True)
        return seconds, sum(answer != right[number % QUESTIONS] for number, answer in enumerate(answers))


async def active(session: aiohttp.ClientSession) -> int:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("phi4rv_active_requests "))))


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3), "max": round(max(seconds, default=0.0), 3)}


def run(args: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "infer.serve", "--checkpoint", str(args.checkpoint), "--port", "0"]
    command += ["--dtype", "float32", "--max-queue", str(2 * args.clients), "--grace", "120", *others]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        words = server.stdout.readline().split()
        if not words:
            raise UserError("infer.serve did not start")
        url = words[-1]
        load = LoadStats(args.requests)
        seconds, unfinished = asyncio.run(measure(url, args.clients, load, server.pid))
        status = server.wait(180)
    finally:
        server.kill()
    return {
        "clients": args.clients,
        "requests": args.requests,
        "seconds": round(seconds, 1),
        "requests_per_second": round(args.requests / seconds, 1),
        "dropped": dict(load.dropped),
        "different": load.different,
        "seconds_to_first_token": quantiles(load.first),
        "seconds_to_last_token": quantiles(load.total),
        "memory_mb_after_requests": load.memory,
        "exit_status_after_sigterm": status,
        "answers_lost_by_sigterm": unfinished,
    }


def table_rows(made: dict[str, Any]) -> list[Row]:
    """Of a run that dropped nothing and gave every answer its own text."""
    size = f"{made['clients']} clients, {made['requests']} requests"
    wrong = sum(made["dropped"].values()) + made["different"] + made["answers_lost_by_sigterm"]
    return [
        Row(
            "server_load",
            f"requests/s, {size}",
            made["requests_per_second"],
            "requests/s",
            lower_is_better=False,
            headline=True,
        ),
        *(
            Row("server_load", f"first token, {q}, {size}", made["seconds_to_first_token"][q], "s", headline=True)
            for q in ("p50", "p99")
        ),
        Row("server_load", f"dropped or wrong, {size}", float(wrong), "answers", noise=0.0, headline=True),
    ]


def make_parser() -> Parser:
    parser = Parser("benchmarks.server_load", "Loads the server with many clients. Other options are infer.serve's.")
    add, count = parser.add, Number(int, 1, MOST)
    add(
        "--checkpoint",
        kind=Path,
        default=TINY,
        metavar="DIR",
        help=f"{CHECKPOINT}; in the Hugging Face layout",
        unset="the tests' tiny one",
    )
    add("--clients", kind=count, default=500, help="clients that stream answers at once")
    add("--requests", kind=count, default=10_000, help="questions that are asked, in all")
    json_option(add)
    return parser


def command(argv: Sequence[str] | None) -> None:
    args, others = make_parser().parse_known_args(argv)
    infer.serve.make_parser().parse_args(["--checkpoint", str(args.checkpoint), *others])  # what is wrong is told here
    if find_spec("aiohttp") is None:
        raise UserError("benchmarks.server_load needs aiohttp: pip install 'phi4rv[serve]'")
    made = run(args, others)
    print(json.dumps(made, indent=2))
    if args.json:
        write_results(args.json, {"server_load": made})


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(argv))


if __name__ == "__main__":
    sys.exit(main())
