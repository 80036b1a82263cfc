"""The benchmark harness: what it measures, what it makes of failures, and that nothing stops the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels import sanitize
from PIL import Image
from torch import Tensor

from benchmarks import gpu, parts, run
from benchmarks.kernels import operations, suite, timing
from benchmarks.kernels.case import Case, Draw
from benchmarks.kernels.measure import goal_time, measure, relative_error, unmeasured, verdict
from benchmarks.kernels.report import COLOURS, GOAL, LABEL, ROW, TOP, chart, table
from benchmarks.parts import Part, python, run_parts
from benchmarks.records import environment, file_for

ROOT = Path(__file__).parents[1]
RATES = {"copy": 1e9, "product": 1e12}


class FakeClock:
    """Time passes only where a function says so; what says nothing takes 1 ms."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, run: Callable[[], Any]) -> float:
        begun = self.now
        run()
        return self.now - begun or 1.0

    def takes(self, ms: float, function: Callable[..., Any] = lambda x: 2 * x) -> Callable[..., Any]:
        """``function``, which takes ``ms``."""

        def timed(*inputs: Any) -> Any:
            self.now += ms
            return function(*inputs)

        return timed


def draw_one(draw: Draw) -> tuple[Any, ...]:
    return (draw.normal(4, 8, grad=True),)


def raises(error: Exception) -> Callable[..., Any]:
    def function(*inputs: Any) -> Any:
        raise error

    return function


def record(ours: Callable[..., Any], peers: dict[str, Any], clock: FakeClock, **case: Any) -> dict[str, Any]:
    made = measure(Case("fake", "4x8", draw_one, ours, peers, **case), "cpu", RATES, clock=clock, seconds=0.001)
    json.dumps(made, allow_nan=False)
    return made


def test_figures() -> None:
    clock = FakeClock()
    peers = {"slow": clock.takes(5), "fast": clock.takes(3)}
    made = record(clock.takes(2), peers, clock, bytes=10**6, flops=10**8, goal=("peer", 1.2))
    assert made["status"] == "ok" and made["ms"] == 2 and made["spread"] == 0 and made["error"] == 0
    assert made["gbs"] == pytest.approx(0.5) and made["tflops"] == pytest.approx(0.05)
    assert made["ceiling"] == "copy" and made["share"] == pytest.approx(0.5)
    assert made["best_peer"] == "fast"
    assert {name: peer["ratio"] for name, peer in made["peers"].items()} == {"slow": 2.5, "fast": 1.5}
    assert made["goal_share"] == pytest.approx(1 / (3 / 1.2))
    assert made["verdict"] == "not measured"  # a CPU's times say nothing


def test_the_ceiling_is_the_one_that_binds() -> None:
    clock = FakeClock()
    made = record(clock.takes(2), {}, clock, bytes=10**5, flops=10**9)
    assert made["ceiling"] == "product" and made["share"] == pytest.approx(0.5)
    assert made["error"] is None and made["best_peer"] is None and made["verdict"] is None


@pytest.mark.parametrize(
    ("goal", "ms", "expected"),
    [
        (("peer", 1.0), 4.0, "met"),
        (("peer", 1.0), 4.1, "missed"),
        (("peer", 0.8), 5.0, "met"),
        (("copy", 0.5), 2.0, "met"),
        (("copy", 0.5), 2.1, "missed"),
        (("product", 0.5), 6.0, "met"),
        (("named", 2.0), 3.5, "met"),
        (("named", 2.0), 3.6, "missed"),
        (("absent", 1.0), 1.0, "not measured"),
        (("peer", 1.0), None, "not measured"),
        (None, 1.0, None),
    ],
)
def test_goals(goal: tuple[str, float] | None, ms: float | None, expected: str | None) -> None:
    against = {"peer": 4.0, "named": 7.0, "copy": 1.0, "product": 3.0}
    assert verdict(goal, goal_time(goal, against), ms) == expected


def test_peers_that_fail_say_why() -> None:
    clock = FakeClock()
    peers = {
        "gone": raises(ImportError("No module named 'gone'")),
        "broken": raises(RuntimeError("first line\nsecond " + "x" * 500)),
        "long": raises(RuntimeError("x" * 500)),
        "compiled": torch.compile(lambda x: 2 * x),
        "infinite": lambda x: x / 0,
        "other": lambda x: 3 * x,
        "good": clock.takes(3),
    }
    order = ["gone", "broken", "long", "compiled", "infinite", "good", "other"]
    made = record(clock.takes(2), {name: peers[name] for name in order}, clock)["peers"]
    assert made["gone"] == {"reason": "No module named 'gone'"}
    assert made["broken"] == {"reason": "RuntimeError: first line"}
    assert len(made["long"]["reason"]) <= 100
    assert made["compiled"] == {"reason": "torch.compile: not on a CPU"}
    assert "NaN" in made["infinite"]["reason"]
    assert "against ours" in made["other"]["reason"]
    assert made["good"]["ratio"] == 1.5


def test_ours_failing_is_reported() -> None:
    made = record(raises(ValueError("wrong head dim")), {"good": lambda x: x}, FakeClock(), goal=("peer", 1.0))
    assert made["status"] == "failed" and made["reason"] == "ValueError: wrong head dim"
    assert made["ms"] is None and made["verdict"] == "not measured"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: 2.1 * x,
        lambda x: 2 * x + float("nan"),
        lambda x: (2 * x)[:, :7],
        lambda x: (2 * x, x),
        lambda x: 0 * x,
    ],
)
def test_a_wrong_kernel_has_no_time(wrong: Callable[..., Any]) -> None:
    peers = {"gone": raises(ImportError("gone")), "good": lambda x: 2 * x}
    made = record(wrong, peers, FakeClock(), goal=("peer", 1.0))
    assert made["status"] == "wrong" and "against good" in made["reason"]
    assert made["ms"] is None and made["share"] is None and made["verdict"] == "not measured"


def test_rounding_is_no_error() -> None:
    made = record(lambda x: 2.02 * x, {"good": lambda x: 2 * x}, FakeClock())
    assert made["status"] == "ok" and made["error"] == pytest.approx(0.01, rel=1e-3)


class Scaled(torch.autograd.Function):
    """2 x, whose gradient has a factor and a time of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, clock: FakeClock) -> Tensor:
        ctx.factor, ctx.clock = factor, clock
        clock.now += 100
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.now += 7
        return grad * ctx.factor, None, None


@pytest.mark.parametrize(("factor", "status"), [(2.0, "ok"), (2.1, "wrong"), (float("nan"), "wrong")])
def test_backward_times_and_compares_the_gradient_alone(factor: float, status: str) -> None:
    clock = FakeClock()
    made = record(lambda x: Scaled.apply(x, factor, clock), {"good": lambda x: 2 * x}, clock, backward=True)
    assert made["status"] == status
    assert made["ms"] == (7 if status == "ok" else None)


def test_bounds_are_timed_but_not_compared() -> None:
    clock = FakeClock()
    peers = {"bare": clock.takes(1, lambda x: x), "good": clock.takes(3)}
    made = record(clock.takes(2), peers, clock, bytes=10**5, goal=("bare", 0.25), bounds=("bare",))
    assert made["status"] == "ok" and made["best_peer"] == "good" and made["peers"]["bare"]["ratio"] == 0.5
    assert made["goal_share"] == pytest.approx(0.1 / 4)


def test_a_peer_that_writes_to_its_inputs_has_its_own() -> None:
    seen: list[float] = []

    def ours(x: Tensor) -> Tensor:
        seen.append(float(x.detach().sum()))
        return 2 * x

    def in_place(x: Tensor) -> Tensor:
        return x.detach().mul_(2)

    made = record(ours, {"in place": in_place}, FakeClock())
    assert made["status"] == "ok" and "ratio" in made["peers"]["in place"]
    assert len(set(seen)) == 1


def test_results_written_to_the_inputs_are_compared() -> None:
    def step(factor: float) -> Callable[[Tensor], None]:
        def scale(x: Tensor) -> None:
            x.detach().mul_(factor)

        return scale

    assert record(step(2), {"good": step(2)}, FakeClock())["status"] == "ok"
    assert record(step(2), {"good": step(3)}, FakeClock())["status"] == "wrong"
    assert record(lambda x: None, {}, FakeClock())["status"] == "failed"


def test_relative_error() -> None:
    a, zero = torch.ones(3), torch.zeros(3)
    assert relative_error([a, None], [a, zero]) == 0
    assert relative_error([1.5 * a, a], [a, a]) == 0.5
    assert relative_error([zero], [zero]) == 0 and relative_error([zero.int()], [zero.int()]) == 0
    for theirs in ([None], [a, a], [a[:2]], [a * float("nan")]):
        assert not relative_error([a], theirs) < 1


def test_interleaved_rounds() -> None:
    """Every round runs each variant once and times are of one call; slow drift hits all alike."""
    clock, order = FakeClock(), []

    def variant(name: str, ms: float) -> timing.Prepared:
        def run() -> None:
            order.append(name)
            clock.now += ms * (1 + len(order) / 100)

        return timing.Prepared(run, 4, "clock")

    made = timing.interleaved({"a": variant("a", 4), "b": variant("b", 8)}, clock, 0.1)
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert made["a"].rounds == made["b"].rounds and 5 <= made["a"].rounds < timing.MAX_ROUNDS
    assert made["b"].ms / made["a"].ms == pytest.approx(2, rel=0.05) and made["a"].spread > 0
    assert timing.interleaved({"a": variant("a", 100)}, clock, 0.1)["a"].rounds == timing.MIN_ROUNDS
    assert timing.interleaved({"a": variant("a", 10**6)}, clock, 0.1)["a"].rounds == timing.FEW_ROUNDS
    assert timing.interleaved({}, clock, 0.1) == {}


def test_sets_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=50 << 20))
    for size in (1 << 20, 16 << 20, 40 << 20, 1 << 30):
        sets = timing.sets_for(size, "cuda")
        assert sets * size >= 2 * (50 << 20) and (sets - 1) * size < 3 * (50 << 20)
    assert timing.sets_for(1, "cuda") == timing.MAX_SETS and timing.sets_for(1, "cpu") == 1


def test_median_ms_makes_and_calls() -> None:
    made = []

    def make() -> Callable[[], Any]:
        made.append(torch.ones(10))
        return lambda: made[0] + 1

    assert timing.median_ms(make, "cpu", 0.01) > 0 and len(made) == 1


def result() -> dict[str, Any]:
    """Two rows with figures, one that failed."""
    head = {"operation": "packed_attention", "backward": False, "goal": ["peer", 0.85]}
    peer = {"ms": 2.0, "spread": 0.01, "ratio": 1.25, "error": 1e-3}
    peers = {f"implementation {i}": peer for i in range(6)} | {"gone": {"reason": "No module named 'gone'"}}
    row = {
        "status": "ok", "reason": None, "ms": 1.6, "spread": 0.01, "tflops": 512.3, "gbs": 2345.6, "ceiling": "product",
        "share": 0.6, "error": 1e-3, "extra_bytes": 1 << 33, "peers": peers, "best_peer": "implementation 1",
    }  # fmt: skip
    rows = [
        {**head, **row, "shape": "x" * 80, "goal_share": 0.5, "verdict": "met"},
        {**head, **row, "shape": "short", "goal_share": 0.75, "verdict": "missed"},
        unmeasured({**head, "shape": "third"}, "failed", "RuntimeError: " + "y" * 200),
    ]
    return {"device": "cuda", "ceilings": {"copy": 3e12, "product": 8e14}, "rows": rows}


def test_table_fits_a_terminal() -> None:
    text = table(result())
    assert max(map(len, text.splitlines())) <= 140
    for part in (
        "60.0% prod",
        "peer 0.85",
        "met",
        "missed",
        "implementation 5 1.25x",
        "failed: packed_attention third",
    ):
        assert part in text
    assert "no time for gone in 2 rows: No module named 'gone'" in text
    unchecked = {**result(), "rows": [{**result()["rows"][1], "error": None}]}
    assert "not compared" in table(unchecked) and "not compared" not in text
    assert text.endswith("3 rows: 1 failed, 2 ok; goals: 1 met, 1 missed, 1 not measured")
    assert "the times say nothing" in table({**result(), "device": "cpu"})
    assert table({"device": "cpu", "ceilings": {}, "rows": []})


def test_chart_shows_share_and_goal(tmp_path: Path) -> None:
    chart(result(), "a device", tmp_path / "new" / "chart.png")
    image = Image.open(tmp_path / "new" / "chart.png").convert("RGB")

    def pixel(share: float, row: int) -> str:
        x, y = int(LABEL + (image.width - LABEL - 370) * share), TOP + row * ROW + ROW // 2
        return "#{:02x}{:02x}{:02x}".format(*image.getpixel((x, y)))

    assert [pixel(share, 0) for share in (0.3, 0.5, 0.58, 0.65)] == [COLOURS["met"], GOAL, COLOURS["met"], "#ffffff"]
    assert [pixel(share, 1) for share in (0.58, 0.65, 0.75)] == [COLOURS["missed"], "#ffffff", GOAL]
    assert not {pixel(share / 20, 2) for share in range(20)} & {*COLOURS.values()}


def test_command_line(tmp_path: Path) -> None:
    file, picture = tmp_path / "out" / "records.json", tmp_path / "chart.png"
    command = python("benchmarks.kernels", "--only", "rms_norm", "--json", str(file), "--chart", str(picture))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rms_norm" in done.stdout and "2 rows: 2 ok" in done.stdout
    written = json.loads(file.read_text())
    assert {"device", "date", "commit", "torch", "triton"} <= written.keys()
    rows = written["results"]["kernels"]["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[1]["backward"]
    assert all(row["error"] < 1e-5 and row["ms"] > 0 and row["peers"]["torch"]["ms"] > 0 for row in rows)
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5


FAKES = """
import os, threading
from benchmarks.kernels.case import Case

def double(x):
    return 2 * x

def die(x):
    os._exit(9)

def hang(x):
    threading.Event().wait()

def case(shape, ours, **peers):
    return Case("fakes", shape, lambda draw: (draw.normal(3),), ours, {**peers, "good": double})

def cases(tiny):
    return [
        case("dies", die), case("peer dies", double, bad=die), case("hangs", hang), case("fine", double),
    ]
"""


def test_nothing_stops_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that ends its process, a peer that does, one that hangs, a file that cannot be read."""
    package = tmp_path / "fakekernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "fakes.py").write_text(FAKES)
    (package / "unreadable.py").write_text("def cases(tiny):\n    raise KeyError('no shapes')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = suite.run(["unreadable", "fakes"], package="fakekernels", patience=3)["rows"]
    assert [(row["operation"], row["shape"], row["status"]) for row in rows] == [
        ("unreadable", "", "failed"),
        ("fakes", "dies", "failed"),
        ("fakes", "peer dies", "ok"),
        ("fakes", "hangs", "failed"),
        ("fakes", "fine", "ok"),
    ]
    assert rows[0]["reason"] == "KeyError: 'no shapes'"
    assert rows[1]["reason"] == "the process ended with 9" and rows[3]["reason"] == "no answer for 3 s"
    assert rows[2]["peers"]["bad"] == {"reason": "the process ended with 9"} and "ratio" in rows[2]["peers"]["good"]
    late = suite.run(["fakes"], 0.0, package="fakekernels")
    assert [(row["status"], row["reason"]) for row in late["rows"]] == [("not measured", "out of time")]
    capsys.readouterr()


def test_every_operation_is_found() -> None:
    assert "rms_norm" in operations()
    assert not {"case", "timing", "measure", "__init__", "__main__"} & set(operations())


def shell(script: str) -> Callable[[Path, float], list[str]]:
    return lambda file, seconds: ["/bin/sh", "-c", f"FILE={file}; SECONDS_LEFT={seconds:.0f}; {script}"]


RECORDS = """echo '{"results": {"images": []}}' > $FILE"""


def test_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pid = tmp_path / "pid"
    fakes = [
        Part("good", 60, shell(f"echo fine; {RECORDS}")),
        Part("bad", 60, shell("echo oh dear; exit 3")),
        Part("slow", 0.5, shell(f"echo begun; {RECORDS}; sleep 600 & echo $! > {pid}; wait")),
        Part("absent", 60, shell(f"echo no tool; exit {parts.SKIPPED}")),
        Part("needs a GPU", 60, shell("exit 4"), gpu=True),
        Part("no such", 60, lambda file, seconds: ["/no/such/command"]),
        Part("last", 60, shell("echo still here, $SECONDS_LEFT")),
    ]
    outcomes, results = run_parts(fakes, tmp_path / "logs", have_gpu=False)
    states = {name: outcome["state"] for name, outcome in outcomes.items()}
    assert states == {
        "good": "passed", "bad": "failed", "slow": "out of time", "absent": "skipped", "needs a GPU": "skipped",
        "no such": "failed", "last": "passed",
    }  # fmt: skip
    assert results == {"images": []} and outcomes["bad"]["exit"] == 3
    assert outcomes["last"]["last"] == "still here, 54"
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "oh dear" in capsys.readouterr().out


def test_gpu_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts by name, one file for all calls, exit status by the worst."""
    writes = """echo '{"results": {"images": []}}' > $FILE"""
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu, "PARTS", [Part("tests", 60, shell("exit 1")), Part("images", 60, shell(writes))])
    folder = ["--json", str(tmp_path / "results")]
    assert gpu.main(["images", *folder]) == 0
    assert gpu.main(["tests", *folder, "--seconds", "30"]) == 1
    file = file_for(environment(), tmp_path / "results")
    written = json.loads(file.read_text())
    assert {name: part["state"] for name, part in written["parts"].items()} == {"images": "passed", "tests": "failed"}
    assert written["results"] == {"images": []}
    assert gpu.main(folder) == 1
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["kernel", *folder])
    assert stopped.value.code == 2 and "no part kernel" in capsys.readouterr().err


def test_the_limits_fit_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu.PARTS) <= 470
    assert {part.name for part in gpu.PARTS} >= {"tests", "sanitizer", *run.MODULES}
    for part in gpu.PARTS:
        assert part.command(Path("file.json"), 10.0)[0] == sys.executable


def test_results_lie_by_device_date_and_commit() -> None:
    about = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-24", "commit": "abc1234"}
    assert file_for(about, Path("r")) == Path("r/nvidia-h100-80gb-hbm3/2026-11-24-abc1234.json")
    for file in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert file == file_for(json.loads(file.read_text()))


def tool(folder: Path, script: str) -> str:
    """A stand-in for compute-sanitizer; the PATH that finds it."""
    folder.mkdir()
    (folder / "compute-sanitizer").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "compute-sanitizer").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main([]) == parts.SKIPPED and "not on the PATH" in capsys.readouterr().out
    monkeypatch.undo()
    only_run = 'while [ "$1" != "-m" ]; do last="$1"; shift; done; exec "$last" "$@"'
    monkeypatch.setenv("PATH", tool(tmp_path / "runs", only_run))
    assert sanitize.main(["rms_norm", "case"]) == 1
    printed = capsys.readouterr().out
    assert "ok rms_norm" in printed and "memcheck: failed: case" in printed
    monkeypatch.undo()
    dies = 'while [ "$1" != "--inside" ]; do shift; done; echo "begin $2"; exit 1'
    monkeypatch.setenv("PATH", tool(tmp_path / "dies", dies))
    assert sanitize.main(["a", "b", "c"]) == 1
    assert "memcheck: failed: a, b, c" in capsys.readouterr().out
