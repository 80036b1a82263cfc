"""What the command lines share: how options are declared, bad arguments, a device, and failures as one line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

import phi4rv
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.ops.registry import ENV_VAR, KERNELS


@dataclass(frozen=True)
class Number:
    """The numbers that an option takes: from ``low`` or above ``above``, one of which is given, to ``high`` or below
    ``below``. NaN is never one of them, infinity only where ``infinite``.

    Called with a text it is an argparse ``type``; its str() is the range.
    """

    kind: type[int] | type[float]
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def __post_init__(self) -> None:
        assert (self.low is None) != (self.above is None), "a range begins somewhere"

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            noun = "integer" if self.kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {noun}, must be {self}") from None
        if said := self.fault(value):
            raise argparse.ArgumentTypeError(said)
        return value

    def fault(self, value: float) -> str | None:
        """What is wrong with ``value`` and what would be right; None if nothing is wrong."""
        fits = (
            not math.isnan(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if fits and self.kind is float and math.isinf(value) and not self.infinite:
            return f"{value} must be a finite number, {self}"
        return None if fits else f"{value} must be {self}"

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{_figure(self.low)} to {_figure(self.high)}"
        if self.low is not None and self.below is not None:
            return f"at least {_figure(self.low)} and below {_figure(self.below)}"
        if self.above is not None and self.high is not None:
            return f"above {_figure(self.above)} and at most {_figure(self.high)}"
        return f"above {_figure(self.above)}" if self.above is not None else f"{_figure(self.low or 0)} or more"


@dataclass(frozen=True)
class OneOf:
    """The words (or integers) that an option takes; otherwise as Number."""

    choices: tuple[Any, ...]

    def __call__(self, text: str) -> Any:
        found = [choice for choice in self.choices if str(choice) == text]
        if not found:
            raise argparse.ArgumentTypeError(str(self.fault(text)))
        return found[0]

    def fault(self, value: Any) -> str | None:
        return None if value in self.choices else f"{value!r} is unknown, must be {self}"

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}"


Kind = Number | OneOf | type[str] | type[Path]


@dataclass(frozen=True)
class Option:
    """One option as ``--help`` and docs/command-reference.md show it.

    ``meaning`` begins with what the name means in every command; what is particular to this one follows a semicolon.
    """

    names: tuple[str, ...]
    metavar: str
    meaning: str
    kind: Kind | None  # None: a flag
    default: str  # "required", or what holds where the option is left out
    section: str

    @property
    def allowed(self) -> str:
        """What it takes; empty where that is any text or path, or nothing."""
        return str(self.kind) if isinstance(self.kind, Number | OneOf) else ""


class Parser(argparse.ArgumentParser):
    """The command ``python -m module``. Every option is declared with ``add``, so ``--help`` tells all of it.

    A bad argument is reported as every other error is: one line, without the usage above it.
    """

    def __init__(self, module: str, description: str) -> None:
        script = Path(sys.argv[0]).name
        super().__init__(
            prog=script if script.startswith("phi4rv-") else f"python -m {module}", description=description
        )
        self.options: list[Option] = []
        self.usage = self.usage_line()
        self.add_argument(
            "--version", action="version", version=f"phi4rv {phi4rv.__version__}", help="print the version, and exit"
        )

    def add(
        self,
        *names: str,
        help: str,
        kind: Kind = str,
        default: Any = None,
        unset: str = "",
        metavar: str = "",
        required: bool = False,
        section: argparse._ArgumentGroup | None = None,
        **more: Any,
    ) -> None:
        """Declares an option, or a positional argument.

        ``help``: its meaning, with the unit, and what 0 means; see ``Option``. ``unset``: what holds where it is left
        out, if ``default`` does not say it. ``more``: as argparse's ``action="store_true"`` and ``nargs``.
        """
        flag = more.get("action") == "store_true"
        needed = required or not (names[0].startswith("-") or more.get("nargs") == "*")
        assert help.strip(), f"{names[0]}: an option without a help text"
        assert needed or flag or unset or default not in (None, []), f"{names[0]}: say what holds without it"
        told = "required" if needed else "off" if flag else unset or _listed(default)
        metavar = metavar or ("NAME" if not isinstance(kind, Number) else "N" if kind.kind is int else "X")
        title = str(section.title) if section else ""
        option = Option(names, "" if flag else metavar, help, None if flag else kind, told, title)
        self.options.append(option)
        if not flag:
            more |= {"type": kind, "metavar": metavar, "default": default}
        if required:
            more["required"] = True
        notes = "; ".join(filter(None, (option.allowed, told if needed else "" if flag else f"default: {told}")))
        (section or self).add_argument(
            *names, help=(help + (f" [{notes}]" if notes else "")).replace("%", "%%"), **more
        )
        self.usage = self.usage_line()

    def section(self, title: str) -> Callable[..., None]:
        """``add``, for options that are to stand together under ``title``."""
        return partial(self.add, section=self.add_argument_group(title))

    def usage_line(self) -> str:
        """The command with what it cannot do without; ``--help`` lists the other options."""
        needed = [
            " ".join([*[n for n in option.names[:1] if n.startswith("-")], option.metavar])
            for option in self.options
            if option.default == "required"
        ]
        return " ".join([self.prog, *needed, "[OPTION …]"])

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument ").replace("\n", "\\n"))


def _figure(value: float) -> str:
    """``9223372036854775808`` -> ``2^63``, ``1000000000`` -> ``10^9``."""
    if isinstance(value, float):
        return f"{value:g}"
    if value > 65536 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    zeros = len(str(value)) - 1
    return f"10^{zeros}" if value == 10**zeros and zeros > 5 else str(value)


def _listed(default: Any) -> str:
    values = default if isinstance(default, Sequence) and not isinstance(default, str) else [default]
    return ", ".join(_figure(value) if isinstance(value, int | float) else str(value) for value in values)


# Where a number of things has no other end: what is more overflows somewhere, or never ends.
MOST = 10**9

# What an option of this name means in every command.
CHECKPOINT = "folder that the model is read from"
ADAPTER = "LoRA adapter in PEFT's layout, merged into the weights as they are read"
WEIGHTS = "formats to quantise the layers to: int8, fp8, int4 or int4_zero, by part: int4,head=fp8,tower=int8"
OUTPUT = "where the result is written"
HELDOUT = "JSONL records that no training has seen, to measure on"
SAMPLES = "records that are taken, at most"
MAX_NEW_TOKENS = "tokens that an answer may have at most, its thought included"
JSON = "the result as JSON"
CHART = "chart that is drawn"
SEED = "seed of all that is drawn at random"


def device_options(add: Callable[..., None], dtype: str, dtype_unset: str) -> None:
    """``--dtype``, ``--device`` and ``--kernels``, as every command that runs a model has them."""
    dtype_option(add, dtype, dtype_unset)
    add(
        "--device", help="device that the model runs on, as PyTorch names it: cpu, cuda, cuda:1", unset="cuda, else cpu"
    )
    kernels_option(add)


def dtype_option(add: Callable[..., None], what: str, unset: str) -> None:
    add("--dtype", kind=OneOf(tuple(DTYPES)), help=f"floating-point type of the model; {what}", unset=unset)


def kernels_option(add: Callable[..., None]) -> None:
    kinds = ", ".join(KERNELS)
    add(
        "--kernels",
        metavar="KIND",
        help=f"kernels of the model: one of {kinds}, and exceptions by operation behind it: triton,adamw=torch",
        unset=f"{ENV_VAR}, else auto",
    )


def usable_device(name: str) -> torch.device:
    """The device of this name. UserError if there is none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def exit_status(program: Callable[[], int | None], interrupted: str = "stopped") -> int:
    """Runs ``program``: what it returns, or 0; 2 after one line ``error: …``; 130 after ``interrupted`` for Ctrl-C."""
    try:
        return program() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # That a CPU's memory is not enough has no class of its own.
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        said = str(error).splitlines()[0].rpartition("DefaultCPUAllocator: ")[2]
        print(f"error: --device: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
