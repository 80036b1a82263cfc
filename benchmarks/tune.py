"""Finds the fastest configuration of every kernel on this GPU: ``python -m benchmarks.tune [--only NAME …]``.

At each shape of ``kernels/cases`` every candidate of every kernel that runs there is forced in turn, held to the
results of the first candidate and timed. What is fastest over all shapes of a case goes to
``triton_kernels/tuned.json`` under the GPU's name; what is not measured now stays as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import operation_names
from benchmarks.kernels.case import Case, Draw, differentiable_outputs
from benchmarks.options import only_option, seconds_option
from phi4rv.command_line import Parser, exit_status
from phi4rv.errors import UserError
from triton_kernels.common.tuning import TABLE, Config, SearchSpace

# A candidate must save this much: less is noise, and a table that changes with every run tells nothing.
MIN_GAIN = 0.01
# By how much of the largest value candidates may differ, who add in different orders: units in its last place, and
# what a long sum in float32 needs.
MAX_ULPS, SUM_TOLERANCE = 2, 1e-5

Results = list[Tensor]
# Builds a function and its inputs; what is timed is a call of it.
MakeCall = Callable[[], Callable[[], Results]]
Timer = Callable[[MakeCall], float]


@dataclass
class Candidate:
    """One candidate of one case of a space. ``ms``: by shape; ``error``: why it cannot be chosen."""

    config: Config
    ms: dict[str, float] = field(default_factory=dict)
    error: str | None = None


# Candidates, the first the default, by (space, case).
Candidates = dict[tuple[str, str], list[Candidate]]


def milliseconds(make: MakeCall) -> float:
    """Median of replays of CUDA graphs."""
    from benchmarks.kernels.timing import median_ms

    return median_ms(make)


def prepare(case: Case, device: str) -> MakeCall:
    """What the benchmark times: our operator, or the gradient of its result. The inputs are always the same."""

    def make() -> Callable[[], Results]:
        torch.manual_seed(0)
        draw = Draw(device)
        inputs = case.inputs(draw)
        if not case.backward:
            return lambda: _tensors(case.ours(*inputs)) or _tensors(inputs)  # an operator may work in place
        outputs = differentiable_outputs(case.ours(*inputs))
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        cotangents = [draw.normal(*out.shape, dtype=out.dtype) for out in outputs]
        return lambda: _tensors(torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True))

    return make


def _tensors(values: Any) -> Results:
    values = values if isinstance(values, tuple | list) else (values,)
    return [x.detach() for x in values if isinstance(x, Tensor)]


def mismatch(ours: Results, expected: Results) -> str | None:
    """How far results are from those expected, if that is further than rounding."""
    for got, right in zip(ours, expected, strict=True):
        if got.shape != right.shape or got.dtype != right.dtype:
            return "other shapes"
        if not right.numel():
            continue
        largest = float(right.double().abs().max())
        error = float((got.double() - right.double()).abs().max())
        allowed = max(MAX_ULPS * torch.finfo(right.dtype).eps, SUM_TOLERANCE) if right.is_floating_point() else 0.0
        if not error <= allowed * largest:  # also a NaN
            return f"differs by {error:.2g} of {largest:.2g}"
    return None


def tune(cases: Sequence[Case], device: str, timer: Timer = milliseconds, deadline: float = math.inf) -> Candidates:
    """Times every candidate at every shape. No shape is begun after ``deadline`` (time.monotonic)."""
    found: Candidates = {}
    for case in cases:
        if time.monotonic() > deadline:
            break
        for space, key in _spaces_used(case, device):
            mine = found.setdefault((space.name, key), [Candidate(config) for config in space.cases[key]])
            if len(mine) > 1:
                _measure(case, device, space, mine, timer)
                print(f"{case.operation} {case.shape}: {space.name} {key}", file=sys.stderr, flush=True)
    return found


def _spaces_used(case: Case, device: str) -> list[tuple[SearchSpace, str]]:
    """The spaces that what is timed picks from, and their cases."""
    function = prepare(case, device)()
    SearchSpace.picked.clear()
    function()
    return [(space, key) for space in SearchSpace.all for key in space.cases if (space.name, key) in SearchSpace.picked]


def _measure(case: Case, device: str, space: SearchSpace, candidates: list[Candidate], timer: Timer) -> None:
    """Adds this shape's time to every candidate that is right so far."""
    make, expected = prepare(case, device), None
    for candidate in candidates:
        if candidate.error:
            continue
        with space.forced(candidate.config):
            try:
                results = [x.clone() for x in make()()]
                if expected is None:
                    expected = results
                candidate.error = mismatch(results, expected)
                if not candidate.error:
                    candidate.ms[f"{case.operation} {case.shape}"] = timer(make)
            except Exception as error:  # whatever a compiler or a driver says of a configuration
                candidate.error = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        if expected is None:  # nothing to hold the others to
            return


def fastest_candidate(candidates: list[Candidate]) -> Candidate | None:
    """The best by the mean logarithm over all shapes; the default unless ``MIN_GAIN`` is saved; None if it failed."""
    default = candidates[0]
    if default.error or not default.ms:
        return None
    right = [candidate for candidate in candidates if not candidate.error and candidate.ms.keys() == default.ms.keys()]
    best = min(right, key=_time)
    return best if _time(best) < _time(default) * (1 - MIN_GAIN) else default


def _time(candidate: Candidate) -> float:
    """Geometric mean over the shapes."""
    return math.exp(sum(math.log(ms) for ms in candidate.ms.values()) / len(candidate.ms))


def write(found: Candidates, device: str, file: Path = TABLE) -> None:
    """Puts the fastest of each case into the table, a configuration a line."""
    table = json.loads(file.read_text())
    for (space, key), candidates in found.items():
        if best := fastest_candidate(candidates):
            table.setdefault(device, {}).setdefault(space, {})[key] = best.config
    text = json.dumps(table, indent=2, sort_keys=True)
    file.write_text(re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n")


def report_lines(found: Candidates) -> Iterator[str]:
    """Lines of the table: every candidate's time over that of the default, the chosen one marked."""
    for (space, key), candidates in found.items():
        default, best = candidates[0], fastest_candidate(candidates)
        yield f"{space} {key}: {', '.join(f'{name} {ms:.4g} ms' for name, ms in default.ms.items())}"
        for candidate in candidates:
            timed = default.ms and candidate.ms.keys() == default.ms.keys() and not candidate.error
            figure = f"{_time(candidate) / _time(default):6.3f}" if timed else f"{'-':>6}"
            settings = " ".join(f"{name}={value}" for name, value in candidate.config.items())
            error = f"  ({candidate.error})" if candidate.error else ""
            yield f"  {'*' if candidate is best else ' '} {figure}  {settings}{error}"


def make_parser() -> Parser:
    parser = Parser("benchmarks.tune", "Finds the fastest configuration of each kernel on the GPU at hand.")
    only_option(parser.add, operation_names(), "operations")
    seconds_option(parser.add, "no shape begins after it")
    return parser


def command(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("benchmarks.tune: no GPU is here; timings of another device mean nothing")
    deadline = time.monotonic() + args.seconds
    modules = [importlib.import_module(f"benchmarks.kernels.cases.{name}") for name in args.only or operation_names()]
    found = tune([case for module in modules for case in module.cases(tiny=False)], "cuda", deadline=deadline)
    write(found, torch.cuda.get_device_name())
    print("\n".join(report_lines(found)))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
