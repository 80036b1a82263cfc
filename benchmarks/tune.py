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

from benchmarks.kernels.case import Case, Draw, differentiable
from benchmarks.options import only_option, seconds_option
from phi4rv.command_line import Parser, exit_status
from phi4rv.errors import UserError
from triton_kernels.common.tuning import TABLE, Config, Space

FOLDER = Path(__file__).parent / "kernels" / "cases"
# A candidate must save this much: less is noise, and a table that changes with every run tells nothing.
GAIN = 0.01
# By how much of the largest value candidates may differ, who add in different orders: units in its last place, and
# what a long sum in float32 needs.
UNITS, SUM = 2, 1e-5

Results = list[Tensor]
# Builds a function and its inputs; what is timed is a call of it.
Make = Callable[[], Callable[[], Results]]
Timer = Callable[[Make], float]


@dataclass
class Trial:
    """One candidate of one case of a space. ``ms``: by shape; ``fault``: why it cannot be chosen."""

    config: Config
    ms: dict[str, float] = field(default_factory=dict)
    fault: str | None = None


# Candidates, the first the default, by (space, case).
Trials = dict[tuple[str, str], list[Trial]]


def milliseconds(make: Make) -> float:
    """Median of replays of CUDA graphs."""
    from benchmarks.kernels.timing import median_ms

    return median_ms(make)


def operations() -> list[str]:
    """The files of ``benchmarks/kernels/cases`` that have cases."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if "\ndef cases(" in file.read_text())


def prepare(case: Case, device: str) -> Make:
    """What the benchmark times: our operator, or the gradient of its result. The inputs are always the same."""

    def make() -> Callable[[], Results]:
        torch.manual_seed(0)
        draw = Draw(device)
        inputs = case.inputs(draw)
        if not case.backward:
            return lambda: _tensors(case.ours(*inputs)) or _tensors(inputs)  # an operator may work in place
        outputs = differentiable(case.ours(*inputs))
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        cotangents = [draw.normal(*out.shape, dtype=out.dtype) for out in outputs]
        return lambda: _tensors(torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True, allow_unused=True))

    return make


def _tensors(values: Any) -> Results:
    values = values if isinstance(values, tuple | list) else (values,)
    return [x.detach() for x in values if isinstance(x, Tensor)]


def differ(ours: Results, expected: Results) -> str | None:
    """How far results are from those expected, if that is further than rounding."""
    for got, right in zip(ours, expected, strict=True):
        if got.shape != right.shape or got.dtype != right.dtype:
            return "other shapes"
        if not right.numel():
            continue
        largest = float(right.double().abs().max())
        error = float((got.double() - right.double()).abs().max())
        allowed = max(UNITS * torch.finfo(right.dtype).eps, SUM) if right.is_floating_point() else 0.0
        if not error <= allowed * largest:  # also a NaN
            return f"differs by {error:.2g} of {largest:.2g}"
    return None


def tune(cases: Sequence[Case], device: str, timer: Timer = milliseconds, deadline: float = math.inf) -> Trials:
    """Times every candidate at every shape. No shape is begun after ``deadline`` (time.monotonic)."""
    trials: Trials = {}
    for case in cases:
        if time.monotonic() > deadline:
            break
        for space, key in _used(case, device):
            mine = trials.setdefault((space.name, key), [Trial(config) for config in space.cases[key]])
            if len(mine) > 1:
                _measure(case, device, space, mine, timer)
                print(f"{case.operation} {case.shape}: {space.name} {key}", file=sys.stderr, flush=True)
    return trials


def _used(case: Case, device: str) -> list[tuple[Space, str]]:
    """The spaces that what is timed picks from, and their cases."""
    function = prepare(case, device)()
    Space.picked.clear()
    function()
    return [(space, key) for space in Space.all for key in space.cases if (space.name, key) in Space.picked]


def _measure(case: Case, device: str, space: Space, trials: list[Trial], timer: Timer) -> None:
    """Adds this shape's time to every trial that is right so far."""
    make, expected = prepare(case, device), None
    for trial in trials:
        if trial.fault:
            continue
        with space.forced(trial.config):
            try:
                results = [x.clone() for x in make()()]
                if expected is None:
                    expected = results
                trial.fault = differ(results, expected)
                if not trial.fault:
                    trial.ms[f"{case.operation} {case.shape}"] = timer(make)
            except Exception as error:  # whatever a compiler or a driver says of a configuration
                trial.fault = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        if expected is None:  # nothing to hold the others to
            return


def fastest(trials: list[Trial]) -> Trial | None:
    """The best by the mean logarithm over all shapes; the default unless ``GAIN`` is saved; None if it failed."""
    default = trials[0]
    if default.fault or not default.ms:
        return None
    right = [trial for trial in trials if not trial.fault and trial.ms.keys() == default.ms.keys()]
    best = min(right, key=_time)
    return best if _time(best) < _time(default) * (1 - GAIN) else default


def _time(trial: Trial) -> float:
    """Geometric mean over the shapes."""
    return math.exp(sum(math.log(ms) for ms in trial.ms.values()) / len(trial.ms))


def write(trials: Trials, device: str, file: Path = TABLE) -> None:
    """Puts the fastest of each case into the table, a configuration a line."""
    table = json.loads(file.read_text())
    for (space, key), candidates in trials.items():
        if best := fastest(candidates):
            table.setdefault(device, {}).setdefault(space, {})[key] = best.config
    text = json.dumps(table, indent=2, sort_keys=True)
    file.write_text(re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n")


def report(trials: Trials) -> Iterator[str]:
    """Lines of the table: every candidate's time over that of the default, the chosen one marked."""
    for (space, key), candidates in trials.items():
        default, best = candidates[0], fastest(candidates)
        yield f"{space} {key}: {', '.join(f'{name} {ms:.4g} ms' for name, ms in default.ms.items())}"
        for trial in candidates:
            timed = default.ms and trial.ms.keys() == default.ms.keys() and not trial.fault
            figure = f"{_time(trial) / _time(default):6.3f}" if timed else f"{'-':>6}"
            settings = " ".join(f"{name}={value}" for name, value in trial.config.items())
            yield f"  {'*' if trial is best else ' '} {figure}  {settings}{f'  ({trial.fault})' if trial.fault else ''}"


def make_parser() -> Parser:
    parser = Parser("benchmarks.tune", "Finds the fastest configuration of each kernel on the GPU at hand.")
    only_option(parser.add, operations(), "operations")
    seconds_option(parser.add, "no shape begins after it")
    return parser


def command(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("benchmarks.tune: no GPU is here; timings of another device mean nothing")
    deadline = time.monotonic() + args.seconds
    modules = [importlib.import_module(f"benchmarks.kernels.cases.{name}") for name in args.only or operations()]
    trials = tune([case for module in modules for case in module.cases(tiny=False)], "cuda", deadline=deadline)
    write(trials, torch.cuda.get_device_name())
    print("\n".join(report(trials)))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
