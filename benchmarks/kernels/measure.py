"""One benchmark case to one record: checked against a peer, timed beside all of them, held to its goal."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import timing
from benchmarks.kernels.case import Case, Draw, differentiable_outputs
from benchmarks.kernels.timing import Clock, Timing

OURS = "ours"
# Largest relative Frobenius error against a peer. Parity proper is the tests' business: this catches a wrong kernel.
TOLERANCE = 2e-2
MAX_REASON = 100  # characters

Record = dict[str, Any]


class GpuBroken(Exception):
    """The GPU accepts nothing more from this process."""


@dataclass
class Variant:
    """Ours or a peer, and what became of it. ``reason``: why it has no time."""

    function: Callable[..., Any]
    reason: str | None = None
    results: list[Tensor | None] = field(default_factory=list)
    extra_bytes: int | None = None
    mutates: bool = False
    error: float | None = None
    time: Timing | None = None


def measure(
    case: Case,
    device: str,
    ceilings: Mapping[str, float],
    excluded: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda variant: None,
    seconds: float = 0.5,
    clock: Clock | None = None,
) -> Record:
    """The case's record. ``excluded``: peers not to try, and why; ``announce`` is told which variant runs next."""
    variants = {OURS: Variant(case.ours), **{name: Variant(peer) for name, peer in case.peers.items()}}
    for name, reason in (excluded or {}).items():
        variants[name].reason = reason
    if device == "cuda":  # what the case before this one left
        gc.collect()
        torch.cuda.empty_cache()
    with timing.side_stream(device), _no_compiling(device):
        wrong = _check(case, variants, device, announce)
        if variants[OURS].reason is None:
            _time(case, variants, device, announce, seconds, clock)
    return _record(case, variants, device, ceilings, wrong)


def _no_compiling(device: str) -> Any:
    """On a CPU torch.compile takes longer than everything else: its functions run eagerly, which proves them right."""
    return nullcontext() if device == "cuda" else torch.compiler.set_stance("force_eager")


def _check(case: Case, variants: dict[str, Variant], device: str, announce: Callable[[str], None]) -> bool:
    """Runs every variant once on the same values and compares; True if ours is not what the first peer gives."""
    ours = variants[OURS]
    for name, variant in variants.items():
        if variant.reason is not None:
            continue
        with _guarded(variant, name, device, announce):
            _first_run(case, variant, device)
            if variant is not ours and ours.reason is None and name not in case.bounds:
                if not all(r is None or _finite(r) for r in variant.results):
                    raise ValueError("gives NaN or infinity")
                variant.error = relative_error(ours.results, variant.results)
                right = variant.error < TOLERANCE  # a NaN is not smaller
                if ours.error is None and not right:
                    ours.reason = f"relative error {variant.error:.2g} against {name}{_shapes(ours, variant)}"
                    return True
                if not right:
                    raise ValueError(f"relative error {variant.error:.2g} against ours")
                if ours.error is None:
                    ours.error = variant.error
        if variant is not ours:
            variant.results = []
    ours.results = []
    return False


def _shapes(ours: Variant, peer: Variant) -> str:
    a, b = ([None if r is None else list(r.shape) for r in variant.results] for variant in (ours, peer))
    return "" if a == b else f": shapes {a}, not {b}"


def _first_run(case: Case, variant: Variant, device: str) -> None:
    """Results on fresh inputs, whether those were written to, and the memory that a second run takes."""
    inputs = _inputs(case, device, 0)
    before = [_bits(x).clone() for x in tensors(inputs)]
    variant.results = _call(case, variant.function, inputs)
    variant.mutates = not all(torch.equal(_bits(x), old) for x, old in zip(tensors(inputs), before, strict=True))
    del before
    if variant.mutates:  # the results may lie in what the next call changes
        written = variant.results or [x.detach() for x in tensors(inputs)]
        variant.results = [None if r is None else r.clone() for r in written]
    if not variant.results:
        raise ValueError("gives no tensor and writes to none")
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        _call(case, variant.function, inputs)
        variant.extra_bytes = torch.cuda.max_memory_allocated() - held


def _inputs(case: Case, device: str, seed: int) -> tuple[Any, ...]:
    """The same for the same seed, also what a case draws by itself."""
    torch.manual_seed(seed)
    return case.inputs(Draw(device, case.dtype, seed))


def _bits(x: Tensor) -> Tensor:
    """What torch.equal can compare: PyTorch compares no float8."""
    x = x.detach()
    return x.view(torch.uint8) if x.is_floating_point() and x.itemsize == 1 else x


def _finite(x: Tensor | None) -> bool:
    return x is None or bool(x.float().isfinite().all())


def _call(case: Case, function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Tensor | None]:
    """The outputs or, for a backward case, the gradients."""
    outputs = function(*inputs)
    if case.backward:
        return list(_gradient(inputs, outputs)())
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [out.detach() for out in outputs if isinstance(out, Tensor)]


def _gradient(inputs: tuple[Any, ...], outputs: Any, repeat: bool = False) -> Callable[[], tuple[Tensor | None, ...]]:
    """What computes the gradient for every input that wants one, from random gradients of the outputs."""
    roots = differentiable_outputs(outputs)
    wanted = [x for x in tensors(inputs) if x.requires_grad]
    draw = Draw(roots[0].device.type, seed=1) if roots else _no_gradient()
    given = [draw.normal(*root.shape, dtype=root.dtype) for root in roots]
    return lambda: torch.autograd.grad(roots, wanted, given, retain_graph=repeat, allow_unused=True)


def _no_gradient() -> Draw:
    raise ValueError("no output has a gradient")


def _time(
    case: Case,
    variants: dict[str, Variant],
    device: str,
    announce: Callable[[str], None],
    seconds: float,
    clock: Clock | None,
) -> None:
    """Fills in ``time`` of every variant that has no reason not to have one."""
    shared = [_inputs(case, device, 0)]
    storages = {x.data_ptr(): x for x in (x.untyped_storage() for x in tensors(shared[0]))}
    sets = timing.num_input_sets(sum(storage.nbytes() for storage in storages.values()), device)
    shared += [_inputs(case, device, i) for i in range(1, sets)]
    pool = timing.graph_pool(device)
    prepared = {}
    for name, variant in variants.items():
        if variant.reason is None:
            with _guarded(variant, name, device, announce):
                # What writes to its inputs must not change those of the others.
                own = [_inputs(case, device, i) for i in range(sets)] if variant.mutates else shared
                prepared[name] = timing.prepare(_numbered(case, variant.function, own), sets, device, pool)
    announce("timing")
    if variants[OURS].reason is None:
        for name, result in timing.interleaved(prepared, clock or timing.clock_for(device), seconds).items():
            variants[name].time = result


def _numbered(case: Case, function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Callable[[int], Any]:
    """``function``, or its gradient, on the i-th of ``sets``."""
    if not case.backward:
        return lambda i: function(*sets[i])
    gradients = [_gradient(inputs, function(*inputs), repeat=True) for inputs in sets]
    return lambda i: gradients[i]()


@contextmanager
def _guarded(variant: Variant, name: str, device: str, announce: Callable[[str], None]) -> Iterator[None]:
    """Announces the variant. An error inside becomes its reason; one that broke the GPU ends this process's work."""
    announce(name)
    try:
        yield
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        variant.reason, variant.results = short_error(error), []
        if gpu_is_broken(device):
            raise GpuBroken(variant.reason) from None


def gpu_is_broken(device: str) -> bool:
    """Whether the GPU accepts nothing more from this process."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def short_error(error: BaseException) -> str:
    """The error in one short line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, tuple | list):
        return []
    return [x for item in value for x in tensors(item)]


def relative_error(ours: list[Tensor | None], theirs: list[Tensor | None]) -> float:
    """Largest ‖ours - theirs‖ / ‖theirs‖ over the results; NaN where there is one or shapes differ.

    None, no gradient, counts as zeros.
    """
    if len(ours) != len(theirs):
        return float("nan")
    return max((_distance(a, b) for a, b in zip(ours, theirs, strict=True)), key=_nan_last, default=0.0)


def _nan_last(error: float) -> float:
    return error if error == error else float("inf")


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        given = b if a is None else a
        return 0.0 if given is None or not bool(given.any()) else float("nan")
    if a.shape != b.shape:
        return float("nan")
    norm = b.float().norm()
    difference = (a.float() - b.float()).norm()
    return float(difference / norm) if norm > 0 else float(difference)


def _record(
    case: Case, variants: dict[str, Variant], device: str, ceilings: Mapping[str, float], wrong: bool
) -> Record:
    """What is known of the case; None where it is not."""
    ours = variants[OURS]
    ms = ours.time.ms if ours.time else None
    peers = {name: _peer(variant, ms) for name, variant in variants.items() if variant is not ours}
    times = {name: peer["ms"] for name, peer in peers.items() if "ms" in peer}
    best = min((name for name in times if name not in case.bounds), key=lambda name: times[name], default=None)
    floors = {"copy": case.bytes / ceilings["copy"] * 1e3, "product": case.flops / ceilings["product"] * 1e3}
    binding = max(floors, key=lambda name: floors[name])
    goal_ms = goal_time(case.goal, {**times, **floors, "peer": times[best] if best else None})
    return {
        **case_key(case),
        "status": "wrong" if wrong else "failed" if ours.reason else "ok",
        "reason": ours.reason,
        **_figures(ours),
        "tflops": case.flops / ms / 1e9 if ms and case.flops else None,
        "gbs": case.bytes / ms / 1e6 if ms and case.bytes else None,
        "ceiling": binding if floors[binding] else None,
        "share": floors[binding] / ms if ms and floors[binding] else None,
        "error": ours.error,
        "peers": peers,
        "best_peer": best,
        "goal_share": floors[binding] / goal_ms if goal_ms and floors[binding] else None,
        # an unchecked time meets nothing, and a time on a CPU says nothing
        "verdict": verdict(case.goal, goal_ms, ms if device == "cuda" and ours.error is not None else None),
    }


def case_key(case: Case) -> Record:
    """Which row it is."""
    goal = list(case.goal) if case.goal else None
    return {"operation": case.operation, "shape": case.shape, "backward": case.backward, "goal": goal}


def empty_record(head: Record, status: str, reason: str) -> Record:
    """The record of a case that gave none: ``status`` "failed" or "not measured"."""
    names = ("ms", "tflops", "gbs", "ceiling", "share", "error", "best_peer", "goal_share")
    none = dict.fromkeys(names)
    return {
        **head,
        "status": status,
        "reason": reason,
        **none,
        "peers": {},
        "verdict": verdict(head["goal"], None, None),
    }


def _figures(variant: Variant) -> Record:
    time = variant.time
    if time is None:
        return {"ms": None}
    figures = {"ms": time.ms, "spread": time.spread, "rounds": time.rounds, "method": time.method}
    return {**figures, "extra_bytes": variant.extra_bytes}


def _peer(variant: Variant, ms: float | None) -> Record:
    """Its figures and its time over ours, or the reason why there are none."""
    if variant.time is None or ms is None:
        return {"reason": variant.reason or "ours has no time"}
    return {**_figures(variant), "ratio": variant.time.ms / ms, "error": variant.error}


def goal_time(goal: tuple[str, float] | None, against: Mapping[str, float | None]) -> float | None:
    """Milliseconds that meet the goal: those of what it names, over its number; None without either."""
    named = against.get(goal[0]) if goal else None
    return named / goal[1] if goal and named else None


def verdict(goal: Any, goal_ms: float | None, ms: float | None) -> str | None:
    """met, missed or not measured; None where there is no goal."""
    if goal is None:
        return None
    if goal_ms is None or ms is None:
        return "not measured"
    return "met" if ms <= goal_ms else "missed"
