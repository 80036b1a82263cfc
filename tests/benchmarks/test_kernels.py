"""The kernel benchmarks: what is measured and compared, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.kernels import timing
from benchmarks.kernels.case import Case, Draw
from benchmarks.kernels.measure import empty_record, goal_time, measure, relative_error, verdict
from benchmarks.kernels.report import COLOURS, GOAL, LABEL, ROW, TOP, chart, table

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
        "compiled": torch.compile(clock.takes(4)),
        "infinite": lambda x: x / 0,
        "other": lambda x: 3 * x,
        "good": clock.takes(3),
    }
    order = ["gone", "broken", "long", "compiled", "infinite", "good", "other"]
    made = record(clock.takes(2), {name: peers[name] for name in order}, clock)["peers"]
    assert made["gone"] == {"reason": "No module named 'gone'"}
    assert made["broken"] == {"reason": "RuntimeError: first line"}
    assert len(made["long"]["reason"]) <= 100
    assert made["compiled"]["ratio"] == 2 and made["compiled"]["error"] == 0
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
        sets = timing.num_input_sets(size, "cuda")
        assert sets * size >= 2 * (50 << 20) and (sets - 1) * size < 3 * (50 << 20)
    assert timing.num_input_sets(1, "cuda") == timing.MAX_SETS and timing.num_input_sets(1, "cpu") == 1


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
        empty_record({**head, "shape": "third"}, "failed", "RuntimeError: " + "y" * 200),
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


class FakeGraph:
    """Stands in for a CUDA graph: replays what was called while it was captured."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock, self.ms = clock, 0.0

    def replay(self) -> None:
        self.clock.now += self.ms


def fake_cuda(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    """As much of torch.cuda as ``timing`` uses, by the fake clock; events read it when they are recorded."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    @contextmanager
    def capture(graph: FakeGraph, pool: Any, stream: Any) -> Iterator[None]:
        begun = clock.now
        yield
        graph.ms, clock.now = clock.now - begun, begun

    fakes = {
        "Event": Event, "CUDAGraph": lambda: FakeGraph(clock), "graph": capture, "graph_pool_handle": lambda: None,
        "synchronize": lambda: None, "current_stream": lambda: 1, "default_stream": lambda: 0, "_sleep": lambda n: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_graphs_go_round_over_the_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls fill a run together, long ones go once over the sets."""
    clock, sets = FakeClock(), []
    fake_cuda(monkeypatch, clock)

    def numbered(i: int) -> None:
        sets.append(i)
        clock.now += 0.01

    made = timing.milliseconds({"short": numbered, "long": clock.takes(7.0, lambda i: i)}, 3, seconds=0.01)
    assert set(sets) == {0, 1, 2} and sets[:6] == [0, 1, 2, 0, 1, 2]
    assert made["short"].ms == pytest.approx(0.01) and made["long"].ms == pytest.approx(7.0)
    assert made["short"].method == made["long"].method == "graph"
    short = timing.prepare(numbered, 3, "cuda")
    assert short.calls % 3 == 0 and short.calls * 0.01 >= timing.RUN_MS
    assert timing.prepare(clock.takes(7.0, lambda i: i), 3, "cuda").calls == 3


def test_what_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    fake_cuda(monkeypatch, clock)

    @contextmanager
    def refused(graph: FakeGraph, pool: Any, stream: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    made = timing.milliseconds({"waits": clock.takes(4.0, lambda i: i)}, 2, seconds=0.01)["waits"]
    assert made.method == "events" and made.ms == pytest.approx(4.0)
