"""Times functions beside each other, and the ceilings that their times are held to.

On a GPU each variant is captured in a CUDA graph of several calls that go round over its input sets, which together
exceed the L2, and the graphs of all variants are replayed in turn, so that drift of the clocks hits all alike. On a
CPU ``perf_counter`` stands around the calls.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# Milliseconds that one run of a variant fills, so that what surrounds it does not count.
RUN_MS = 2.0
GRAPH_CALLS, GRAPH_MS = 20, 5.0
MIN_ROUNDS, MAX_ROUNDS = 5, 200
# Rounds that take so many times the time they should: fewer do.
SLOW, FEW_ROUNDS = 20, 2
# Data that is twice the L2 has left it before its next turn; no case needs more sets than MAX_SETS.
L2_MULTIPLE, MAX_SETS = 3, 256
SPIN_CYCLES = 100_000  # some 50 µs

# Milliseconds that a run takes.
Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call; spread: the middle half of the rounds, its width over the median."""

    ms: float
    spread: float
    rounds: int
    method: str


@dataclass(frozen=True)
class Prepared:
    """A variant ready to be timed: ``run`` does ``calls`` calls. method: graph, events or clock."""

    run: Callable[[], Any]
    calls: int
    method: str


def milliseconds(
    functions: dict[str, Callable[[int], Any]],
    sets: int = 1,
    device: str = "cuda",
    seconds: float = 0.5,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Times ``function(i)`` over the input sets i = 0 … sets - 1, all functions in turn, for about ``seconds``."""
    with side_stream(device):
        pool = graph_pool(device)
        prepared = {name: prepare(function, sets, device, pool) for name, function in functions.items()}
        return interleaved(prepared, clock or clock_for(device), seconds)


def median_ms(make: Callable[[], Callable[[], Any]], device: str = "cuda", seconds: float = 0.1) -> float:
    """Median milliseconds of the callable that ``make()`` builds.

    ``make`` draws its own inputs and is called as often as it takes for them to exceed the L2 together.
    """
    with side_stream(device):
        before = allocated_bytes(device)
        calls = [make()]
        calls += [make() for _ in range(num_input_sets(allocated_bytes(device) - before, device) - 1)]
        return milliseconds({"": lambda i: calls[i]()}, len(calls), device, seconds)[""].ms


def prepare(function: Callable[[int], Any], sets: int, device: str, pool: Any = None) -> Prepared:
    """Warms up and, on a GPU, captures; where capture fails the calls are launched one by one ("events")."""

    def every() -> None:
        for i in range(sets):
            function(i)

    every()
    if device != "cuda":
        return Prepared(every, sets, "clock")
    every()
    single = cuda_clock(every) / sets
    passes = max(1, math.ceil(min(GRAPH_CALLS, GRAPH_MS / single) / sets))

    def several() -> None:
        for _ in range(passes):
            every()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            several()
        replay, method = graph.replay, "graph"
    except Exception:  # whatever a peer raises when it may not wait for the GPU
        torch.cuda.synchronize()  # raises if more broke than the capture
        replay, method = several, "events"
    replay()
    replays = max(1, math.ceil(RUN_MS / cuda_clock(replay)))

    def run() -> None:
        for _ in range(replays):
            replay()

    return Prepared(run, replays * passes * sets, method)


def interleaved(prepared: dict[str, Prepared], clock: Clock, seconds: float) -> dict[str, Timing]:
    """Runs each variant once a round, every other round in reverse order, until ``seconds`` are spent."""
    times: dict[str, list[float]] = {name: [] for name in prepared}
    names, spent, rounds = list(prepared), 0.0, 0
    while names and rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or spent < seconds * 1e3):
        if rounds >= FEW_ROUNDS and spent > SLOW * seconds * 1e3:
            break
        for name in names:
            took = clock(prepared[name].run)
            spent += took
            times[name].append(took / prepared[name].calls)
        names.reverse()
        rounds += 1
    return {name: _summary(values, prepared[name].method) for name, values in times.items()}


def _summary(values: list[float], method: str) -> Timing:
    return Timing(statistics.median(values), relative_iqr(values) or 0.0, len(values), method)


def relative_iqr(values: Sequence[float]) -> float | None:
    """The width of the middle half over the median; None of less than two values."""
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle if middle else 0.0


def clock_for(device: str) -> Clock:
    """The clock of a kind of device."""
    return cuda_clock if device == "cuda" else cpu_clock


def cpu_clock(run: Callable[[], Any]) -> float:
    """By ``perf_counter``."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def cuda_clock(run: Callable[[], Any]) -> float:
    """By events around it. The GPU spins first, so that the queue is full when it comes to the first event."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Everything inside runs on one stream that is not the default one, which cannot be captured."""
    if device != "cuda" or torch.cuda.current_stream() != torch.cuda.default_stream():
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


def graph_pool(device: str) -> Any:
    """Memory for graphs that run one after another and whose results nobody keeps."""
    return torch.cuda.graph_pool_handle() if device == "cuda" else None


def allocated_bytes(device: str) -> int:
    """Bytes that tensors hold on the GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def num_input_sets(size: int, device: str) -> int:
    """How many sets of ``size`` bytes the L2 does not hold; 1 on a CPU, whose times say nothing."""
    if device != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 50 << 20)
    return min(max(math.ceil(L2_MULTIPLE * cache / max(size, 1)), 1), MAX_SETS)


def ceilings(device: str) -> dict[str, float]:
    """Measured: ``copy``, bytes/s read and written by a copy on the device; ``product``, FLOP/s of a bf16 product.

    1 GiB and 8192³; on a CPU 1 MiB and 128³ in float32.
    """
    elements, n, dtype = (1 << 29, 8192, torch.bfloat16) if device == "cuda" else (1 << 18, 128, torch.float32)
    with side_stream(device):
        source = torch.randn(elements, dtype=dtype, device=device)
        target = torch.empty_like(source)
        a, b = torch.randn(2, n, n, dtype=dtype, device=device)
        out = torch.empty_like(a)
        times = milliseconds({"copy": lambda i: target.copy_(source)}, device=device)
        times |= milliseconds({"product": lambda i: torch.mm(a, b, out=out)}, device=device)
    moved = 2 * source.numel() * source.element_size()
    return {"copy": moved / times["copy"].ms * 1e3, "product": 2 * n**3 / times["product"].ms * 1e3}
