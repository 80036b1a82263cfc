"""Reads the documentation's pages, and checks and runs what they tell the reader to do.

Comments, which a rendered page does not show, say what becomes of a block. In front of each block of commands or
Python stands one of

- ``<!-- run -->``: run with the others of its page, in order, in a folder that holds what the page is given;
- ``<!-- not run: reason -->``: only checked: its commands, options and names exist.

``<!-- file: NAME -->`` writes the block to a file of that folder instead, and ``<!-- given: checkpoint DIR, picture FILE
-->`` says what the folder holds at the start.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch.distributed.run import get_args_parser

from phi4rv.errors import UserError
from tests import processes

ROOT = Path(__file__).parents[2]
PACKAGES = ("phi4rv", "train", "infer", "benchmarks", "csrc", "tests", "triton_kernels")
FENCE = re.compile(r"^```(\w*)$")
MARK = re.compile(r"^<!-- (run|not run|file|given)(?:: (.+))? -->$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
# Commands without a parser, and all that they take.
PLAIN: dict[str, set[str]] = {"csrc.build": {"--emulated"}, "tests.parity": set()}
# Programs that are not this project's: nothing but their place in this list is checked.
FOREIGN = {".", "cd", "curl", "git", "mkdir"}


class Wrong(AssertionError):
    """``page:line: what is wrong``."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language and text, and the comment in front of it."""

    place: str
    language: str
    text: str
    mark: str = ""
    reason: str = ""


@dataclass
class Page:
    """prose: line number and text of what is outside the blocks. given: kind and name of what the page needs."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    prose: list[tuple[int, str]] = field(default_factory=list)
    given: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name


def read(path: Path) -> Page:
    page, mark, reason = Page(path), "", ""
    opened, language, lines = 0, "", list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence, found = FENCE.match(line), MARK.match(line)
        if opened and fence:
            page.blocks.append(Block(f"{page.name}:{opened}", language, "\n".join(lines) + "\n", mark, reason))
            opened, mark, reason = 0, "", ""
        elif opened:
            lines.append(line)
        elif fence:
            opened, language, lines = number, fence[1], []
        elif found and found[1] == "given":
            kinds_and_names = (item.split() for item in found[2].split(", "))
            page.given = [(kind, name) for kind, name in kinds_and_names]
        elif found:
            mark, reason = found[1], found[2] or ""
        else:
            page.prose.append((number, line))
    if opened or mark:
        raise Wrong(f"{page.name}: a block without an end, or a mark without a block")
    return page


def check_marks(page: Page) -> None:
    """Every block of commands or Python says whether it is run, and if not, why."""
    for block in page.blocks:
        marked = block.mark == "run" or (block.mark in ("not run", "file") and block.reason)
        if block.language in ("bash", "python") and not marked:
            raise Wrong(f"{block.place}: write <!-- run --> or <!-- not run: why --> in front of the block")


# --- what a command line says ---


@dataclass(frozen=True)
class Command:
    """One line, taken apart: the environment in front of it, a program, its arguments.

    module: the Python module that runs, if it is one of this project's. world: how many processes of it.
    """

    program: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    module: str | None = None
    world: int = 1


def commands(block: Block) -> list[Command]:
    lines = block.text.replace("\\\n", " ").splitlines()
    try:
        return [command(words) for line in lines if (words := shlex.split(line, comments=True))]
    except (Wrong, ValueError) as error:
        raise Wrong(f"{block.place}: {error}") from None


def command(words: Sequence[str]) -> Command:
    environment = {}
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        name, _, environment_value = words[0].partition("=")
        environment[name], words = environment_value, words[1:]
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


def check_commands(block: Block) -> None:
    """Every program, module and option of the block exists. Wrong says which does not."""
    for said in commands(block):
        try:
            check(said)
        except Wrong as error:
            raise Wrong(f"{block.place}: {error}") from None


def check(said: Command) -> None:
    if said.module is not None:
        check_module(said.module, said.arguments)
    elif said.program == "make":
        check_make(said.arguments)
    elif said.program not in FOREIGN:
        raise Wrong(f"{said.program}: not a program that these pages know")


def check_module(name: str, arguments: Sequence[str]) -> None:
    if not exists(name):
        raise Wrong(f"{name}: there is no such module")
    if name in PLAIN:
        if unknown := set(arguments) - PLAIN[name]:
            raise Wrong(f"{name}: has no {', '.join(unknown)}")
    elif name.partition(".")[0] in PACKAGES:
        parsed(parser_of(name), arguments)


def check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        variable, sign, _ = word.partition("=")
        if sign and f"$({variable})" not in makefile:
            raise Wrong(f"make has no {variable}")
        if not sign and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            raise Wrong(f"make {word}: there is no such target")


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def main_of(name: str) -> tuple[Callable[..., Any], bool]:
    """A command's ``main``, of a package its ``__main__``'s; and whether it takes the arguments."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if not hasattr(module, "main"):
        raise Wrong(f"{name}: is no command")
    return module.main, bool(inspect.signature(module.main).parameters)


class _Made(BaseException):
    """Carries a command's parser out of its ``main``. Not an Exception: no command handles it."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


@cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that ``python -m name`` would parse its arguments with."""
    main, takes = main_of(name)
    usual = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def made(self: argparse.ArgumentParser, *args: Any, **more: Any) -> Any:
        raise _Made(self)

    argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = made  # type: ignore
    try:
        main([]) if takes else main()
    except _Made as found:
        return found.parser
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args = usual  # type: ignore
    raise Wrong(f"{name}: parses no arguments")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(list(arguments))
    except (UserError, SystemExit) as error:
        raise Wrong(f"{parser.prog}: does not take {' '.join(arguments)} ({error})") from None


# --- what Python and the prose name ---


def check_python(block: Block) -> None:
    """The block compiles; what it names of this project exists, and takes the keywords that it is given."""
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        raise Wrong(f"{block.place}: {error}") from None
    known = dict(imported(tree, block.place))
    for node in ast.walk(tree):
        found = resolved(node, known, block.place) if isinstance(node, ast.Attribute | ast.Name) else None
        if isinstance(node, ast.Call):
            found = resolved(node.func, known, block.place)
            if callable(found):
                check_keywords(found, [k.arg for k in node.keywords if k.arg], block.place)


def imported(tree: ast.Module, place: str) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in PACKAGES:
                    yield alias.asname or alias.name.partition(".")[0], importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            for alias in node.names:
                yield alias.asname or alias.name, named(f"{node.module}.{alias.name}", place)


def resolved(node: ast.AST, known: dict[str, Any], place: str) -> Any:
    """The object that ``infer.Engine`` is; None for what is not known before it runs."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolved(node.value, known, place)) is not None:
        if not hasattr(owner, node.attr):
            raise Wrong(f"{place}: {ast.unparse(node)}: there is no such name")
        return getattr(owner, node.attr)
    return None


def check_keywords(function: Callable[..., Any], keywords: Sequence[str], place: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        if unknown := set(keywords) - {p.name for p in parameters}:
            raise Wrong(f"{place}: {function.__name__} takes no {', '.join(sorted(unknown))}")


def named(dotted: str, place: str) -> Any:
    """The module or object of a dotted name."""
    if exists(dotted):
        return importlib.import_module(dotted)
    owner, _, last = dotted.rpartition(".")
    found = named(owner, place) if owner else None
    if not hasattr(found, last):
        raise Wrong(f"{place}: {dotted}: there is no such name")
    return getattr(found, last)


def check_prose(page: Page) -> None:
    """Links lead somewhere; files, names, commands and options between backticks exist."""
    for number, line in page.prose:
        place = f"{page.name}:{number}"
        for target in LINK.findall(line):
            check_link(page.path, target, place)
        for said in CODE.findall(line):
            check_code(said, place)


def check_link(page: Path, target: str, place: str) -> None:
    if "://" in target:
        return
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        raise Wrong(f"{place}: {target}: there is no such file")
    if anchor and anchor not in anchors(path):
        raise Wrong(f"{place}: {target}: the page has no such heading")


@cache
def anchors(path: Path) -> set[str]:
    """As GitHub makes them: lower case, spaces as hyphens, without punctuation."""
    heads = [text.lstrip("#").strip() for _, text in read(path).prose if text.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def check_code(said: str, place: str) -> None:
    first, *rest = said.split()
    if first in ("python", "torchrun", "make") and "…" not in said and rest:
        try:
            check(command(shlex.split(said))) if first != "python" else check_spoken(rest)
        except Wrong as error:
            raise Wrong(f"{place}: {error}") from None
    elif re.fullmatch(rf"({'|'.join(PACKAGES)})/[\w./-]*", first):
        if not (ROOT / first).exists():
            raise Wrong(f"{place}: {first}: there is no such file")
    elif re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", first) and not first.endswith((".py", ".md")):
        named(first, place)
    for word in (first, *rest):
        if re.fullmatch(r"--[a-z][a-z0-9-]+", word) and not any(word in options() for options in known_options()):
            raise Wrong(f"{place}: {word}: no command has this option")


def check_spoken(words: Sequence[str]) -> None:
    """``python -m train.export``: a command that is only named need not be complete."""
    if words[0] == "-m" and not exists(words[1]):
        raise Wrong(f"{words[1]}: there is no such module")


def known_options() -> Iterator[Callable[[], set[str]]]:
    """Of each command the options, made when they are asked for: the likeliest first."""
    found = [module_of(p.relative_to(ROOT).as_posix()) for folder in ("train", "infer", "phi4rv", "benchmarks")
             for p in sorted((ROOT / folder).rglob("*.py")) if 'if __name__ == "__main__":' in p.read_text()]  # fmt: skip
    for name in found:
        yield lambda name=name: options_of(name)
    yield lambda: set(get_args_parser()._option_string_actions) | {word for taken in PLAIN.values() for word in taken}


@cache
def options_of(name: str) -> set[str]:
    return set(parser_of(name)._option_string_actions)


# --- running ---


def run(page: Page, folder: Path) -> int:
    """Runs the page's blocks in ``folder``, the working directory, in this process where one is enough. How many."""
    names: dict[str, Any] = {"__name__": "__page__"}
    count = 0
    for block in page.blocks:
        if block.mark == "file":
            (folder / block.reason).write_text(block.text, encoding="utf-8")
        elif block.mark == "run":
            count += 1
            if block.language == "python":
                exec(compile(block.text, block.place, "exec"), names)
            else:
                for said in commands(block):
                    run_command(said, block.place, folder)
    return count


def run_command(said: Command, place: str, folder: Path) -> None:
    if said.module is None or said.environment:
        raise Wrong(f"{place}: {said.program}: only this project's commands are run, in the usual environment")
    if said.world > 1:
        statuses = processes.run(said.world, folder / f"{said.module}.log", said.arguments)
        if any(statuses):
            raise Wrong(f"{place}: exit statuses {statuses}: {processes.told(folder / f'{said.module}.log')}")
        return
    main, takes = main_of(said.module)
    with arguments(said.module, said.arguments):
        status = main(list(said.arguments)) if takes else main()
    if status:
        raise Wrong(f"{place}: {said.module} ends with exit status {status}")


@contextmanager
def arguments(module: str, given: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, [module, *given]
    try:
        yield
    finally:
        sys.argv = before
