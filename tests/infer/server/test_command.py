"""``python -m infer.serve`` as a process."""

import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infer import serve
from tests import processes, small
from tests.serving import until


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.small_checkpoint(tmp_path_factory.mktemp("model"), context=4096)


class Running:
    """A server process. ``log``: what it has printed."""

    def __init__(self, log: Path, checkpoint: Path, *options: str):
        self.log = log
        argv = ["--checkpoint", str(checkpoint), "--port", "0", "--cache-tokens", "8000", *options]
        self.process = processes.start(1, log, argv, work=serve.main)[0]
        until(lambda: "http://" in self.told or not self.process.is_alive(), 60)
        self.url = self.told.split()[-1]

    @property
    def told(self) -> str:
        path = self.log.parent / f"{self.log.name}-0"
        return path.read_text() if path.exists() else ""

    def ask(self, **fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "Count."}], "reasoning_effort": "none", **fields}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=20) as response:
            return response.read().decode()

    def end(self, number: int = signal.SIGTERM) -> int | None:
        os.kill(self.process.pid, number)
        return processes.finish([self.process], 30)[0]


@pytest.fixture
def running(checkpoint: Path, tmp_path: Path) -> Iterator[Running]:
    server = Running(tmp_path / "log", checkpoint, "--model-name", "mine")
    yield server
    processes.finish([server.process], 0 if server.process.is_alive() else 5)


def test_sigterm_lets_the_running_answers_end(running: Running) -> None:
    """Of several, some still waiting; and nothing new is taken."""
    assert json.loads(running.get("/health")) == {"status": "ok", "model": "mine"}
    right = running.ask(max_tokens=250)
    answers: list[dict[str, Any]] = []
    clients = [threading.Thread(target=lambda: answers.append(running.ask(max_tokens=250))) for _ in range(5)]
    for client in clients:
        client.start()
    until(lambda: "phi4rv_active_requests 5.0" in running.get("/metrics"))
    assert running.end() == 0
    for client in clients:
        client.join()
    assert [a["choices"] for a in answers] == [right["choices"]] * 5
    assert right["choices"][0]["finish_reason"] == "length" or right["usage"]["completion_tokens"] > 100
    assert running.told.endswith("stopping\n") and "Traceback" not in running.told


def test_the_grace_is_over_at_its_end(checkpoint: Path, tmp_path: Path) -> None:
    server = Running(tmp_path / "log", checkpoint, "--grace", "0")
    failed: list[Exception] = []

    def ask() -> None:
        try:
            server.ask(max_tokens=3000)
        except OSError as error:
            failed.append(error)

    client = threading.Thread(target=ask)
    client.start()
    until(lambda: "phi4rv_active_requests 1.0" in server.get("/metrics"))
    assert server.end(signal.SIGINT) == 0
    client.join()
    assert len(failed) == 1 and "Traceback" not in server.told


def test_what_is_wrong_with_the_command_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve.bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        (tmp_path / "empty").write_text("\n")
        for options, told in (
            (["--port", port], f"error: --port: cannot listen on 127.0.0.1 port {port} (Address already in use)"),
            (["--port", "70000"], "error: --port: 70000 must be 0 to 65535"),
            (["--host", "no.such.host.invalid"], "error: --port: cannot listen on no.such.host.invalid port"),
            (["--max-queue", "-1"], "error: --max-queue: -1 must be 0 to 10^9"),
            (["--max-running", "0"], "error: --max-running: 0 must be 1 to 10^9"),
            (["--api-key-file", str(tmp_path / "none")], f"error: --api-key-file {tmp_path / 'none'}: cannot be read"),
            (["--api-key-file", str(tmp_path / "empty")], f"error: --api-key-file {tmp_path / 'empty'}: is empty"),
        ):
            argv = ["--checkpoint", str(checkpoint), *options]
            assert serve.main(argv) == 2
            error = capsys.readouterr().err
            assert error.startswith(told) and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "aiohttp" else name)
    assert serve.main(["--checkpoint", str(checkpoint)]) == 2
    assert capsys.readouterr().err == "error: infer.serve needs aiohttp: pip install aiohttp\n"


def test_it_listens_on_localhost_and_takes_a_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = serve.make_parser().parse_args(["--checkpoint", "x"])
    assert (args.host, args.allow_urls) == ("127.0.0.1", [])
    monkeypatch.setenv("PHI4RV_API_KEY", "abc")
    assert serve.api_key(args) == "abc"
    (tmp_path / "key").write_text("def\n")
    assert (
        serve.api_key(serve.make_parser().parse_args(["--checkpoint", "x", "--api-key-file", str(tmp_path / "key")]))
        == "def"
    )
    monkeypatch.delenv("PHI4RV_API_KEY")
    assert serve.api_key(args) is None
