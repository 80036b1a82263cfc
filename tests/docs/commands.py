"""Command lines of the pages: what they say, whether it exists, and running them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser

from phi4rv.errors import UserError
from tests import processes

ROOT = Path(__file__).parents[2]
PACKAGES = ("phi4rv", "train", "infer", "benchmarks", "csrc", "tests", "triton_kernels")
# Commands without a parser, and all that they take.
PLAIN: dict[str, set[str]] = {"csrc.build": {"--emulated"}, "tests.parity": set()}
# Programs that are not this project's: nothing but their place in this list is checked.
FOREIGN = {".", "cd", "curl", "git", "mkdir"}


class Wrong(AssertionError):
    """Something on a page does not exist, or does not work; one line that says what."""


@dataclass(frozen=True)
class Command:
    """One line, taken apart: the environment in front of it, a program, its arguments.

    module: the Python module that runs, if any. world: how many processes of it.
    """

    program: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    module: str | None = None
    world: int = 1


def commands(text: str) -> list[Command]:
    """Of a block of shell: a line each, with those that ``\\`` continues, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [command(words) for line in lines if (words := shlex.split(line, comments=True))]


def command(words: Sequence[str]) -> Command:
    environment: dict[str, str] = {}
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        name, _, environment[name] = words[0].partition("=")
        words = words[1:]
    program, *arguments = words or [""]
    if program in ("python", ".venv/bin/python") and arguments[:1] == ["-m"]:
        return Command("python", tuple(arguments[2:]), environment, arguments[1])
    if program in ("python", ".venv/bin/python") and arguments:
        return Command("python", tuple(arguments[1:]), environment, module_of(arguments[0]))
    if program == "torchrun":
        args = parsed(get_args_parser(), arguments)
        script, rest = args.training_script, tuple(args.training_script_args)
        return Command("torchrun", rest, environment, module_of(script), int(args.nproc_per_node))
    return Command(program, tuple(arguments), environment)


def module_of(script: str) -> str:
    """``train/main.py`` -> ``train.main``."""
    return script.removesuffix(".py").replace("/", ".")


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


# --- what exists ---


def check(said: Command) -> None:
    """Wrong unless the program, the module and every option exist, and a command has all that it needs."""
    if said.module is not None:
        _check_module(said.module, said.arguments)
    elif said.program == "make":
        _check_make(said.arguments)
    elif said.program not in FOREIGN:
        raise Wrong(f"{said.program}: not a program that these pages know")


def _check_module(name: str, arguments: Sequence[str]) -> None:
    if not exists(name):
        raise Wrong(f"{name}: there is no such module")
    if name in PLAIN:
        if unknown := set(arguments) - PLAIN[name]:
            raise Wrong(f"{name}: has no {', '.join(unknown)}")
    elif name.partition(".")[0] in PACKAGES:
        parsed(parser_of(name), arguments)


def _check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        variable, sign, _ = word.partition("=")
        if sign and f"$({variable})" not in makefile:
            raise Wrong(f"make has no {variable}")
        if not sign and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            raise Wrong(f"make {word}: there is no such target")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(list(arguments))
    except (UserError, SystemExit) as error:
        raise Wrong(f"{parser.prog}: does not take {' '.join(arguments)} ({error})") from None


class _Made(BaseException):
    """Carries a command's parser out of its ``main``. Not an Exception: no command handles it."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that ``python -m name`` takes its arguments with: its ``main`` is stopped where it begins to parse."""
    main, takes = main_of(name)
    kind = argparse.ArgumentParser
    usual = kind.parse_args, kind.parse_known_args

    def made(self: argparse.ArgumentParser, *args: Any, **more: Any) -> Any:
        raise _Made(self)

    kind.parse_args = kind.parse_known_args = made  # type: ignore[method-assign,assignment]
    try:
        main([]) if takes else main()
    except _Made as found:
        return found.parser
    finally:
        kind.parse_args, kind.parse_known_args = usual  # type: ignore[method-assign]
    raise Wrong(f"{name}: parses no arguments")


def main_of(name: str) -> tuple[Callable[..., Any], bool]:
    """A command's ``main``, of a package its ``__main__``'s; and whether it takes the arguments."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if not hasattr(module, "main"):
        raise Wrong(f"{name}: is no command")
    return module.main, bool(inspect.signature(module.main).parameters)


def has_option(word: str) -> bool:
    """Whether any command of this project, or torchrun, takes this option."""
    return any(word in options for options in _options())


def _options() -> Iterator[set[str]]:
    """The options of one command after another, so that most words are found before all commands are imported."""
    for folder in ("train", "infer", "phi4rv", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if 'if __name__ == "__main__":' in path.read_text():
                yield set(parser_of(module_of(path.relative_to(ROOT).as_posix()))._option_string_actions)
    yield set(get_args_parser()._option_string_actions).union(*PLAIN.values())


# --- running ---


def run(said: Command, folder: Path) -> None:
    """Runs a command of this project, in this process where one is enough. Wrong unless it ends well."""
    if said.module is None or said.environment:
        raise Wrong(f"{said.program}: only this project's commands are run, in the usual environment")
    log = folder / f"{said.module}.log"
    if said.world > 1:
        statuses = processes.run(said.world, log, said.arguments)
    else:
        statuses = [_run_here(said.module, said.arguments)]
    if any(statuses):
        told = f": {processes.read_log(log)}" if said.world > 1 else ""
        raise Wrong(f"{said.module} ends with exit status {', '.join(map(str, statuses))}{told}")


def _run_here(name: str, arguments: Sequence[str]) -> int | None:
    main, takes = main_of(name)
    with _arguments(name, arguments):
        status: int | None = main(list(arguments)) if takes else main()
    return status


@contextmanager
def _arguments(module: str, given: Sequence[str]) -> Iterator[None]:
    """For a ``main`` that reads them itself."""
    before, sys.argv = sys.argv, [module, *given]
    try:
        yield
    finally:
        sys.argv = before
