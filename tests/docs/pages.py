"""Reads the documentation's pages, and checks and runs what they tell the reader to do.

Comments, which a rendered page does not show, say what becomes of a block. In front of each block of commands or
Python stands one of

- ``<!-- run -->``: run with the others of its page, in order, in a folder that holds what the page is given;
- ``<!-- not run: reason -->``: only checked: its commands, options and names exist.

``<!-- file: NAME -->`` writes the block to a file of that folder instead.
``<!-- given: checkpoint DIR, picture FILE -->`` says what the folder holds at the start.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.docs import commands
from tests.docs.commands import PACKAGES, ROOT, Wrong
from tests.docs.names import check_python, named

FENCE = re.compile(r"^```(\w*)$")
MARK = re.compile(r"^<!-- (run|not run|file|given)(?:: (.+))? -->$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
CODE = re.compile(r"`([^`]+)`")
FOLDERS = (*PACKAGES, "docs", "examples")


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
            page.given = [(kind, name) for kind, name in (item.split() for item in found[2].split(", "))]
        elif found:
            mark, reason = found[1], found[2] or ""
        else:
            page.prose.append((number, line))
    if opened or mark:
        raise Wrong(f"{page.name}: a block without an end, or a mark without a block")
    return page


@contextmanager
def at(place: str) -> Iterator[None]:
    """Says where something is wrong."""
    try:
        yield
    except (Wrong, ValueError) as error:
        raise Wrong(f"{place}: {error}") from None


def check(page: Page) -> None:
    """Wrong, with its place, for the first thing on the page that does not exist."""
    for block in page.blocks:
        with at(block.place):
            _check_block(block)
    for number, line in page.prose:
        with at(f"{page.name}:{number}"):
            for targets in LINK.findall(line):
                _check_link(page.path, "".join(targets))
            for said in CODE.findall(line):
                _check_code(said)


def _check_block(block: Block) -> None:
    marked = block.mark == "run" or (block.mark in ("not run", "file") and block.reason)
    if block.language in ("bash", "python") and not marked:
        raise Wrong("write <!-- run --> or <!-- not run: why --> in front of the block")
    if block.language == "python":
        check_python(block.text)
    if block.language == "bash":
        for said in commands.commands(block.text):
            commands.check(said)


def _check_link(page: Path, target: str) -> None:
    if "://" in target:
        return
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        raise Wrong(f"{target}: there is no such file")
    if anchor and anchor not in anchors(path):
        raise Wrong(f"{target}: the page has no such heading")


@cache
def anchors(path: Path) -> set[str]:
    """As GitHub makes them: lower case, spaces as hyphens, without punctuation."""
    heads = [text.lstrip("#").strip() for _, text in read(path).prose if text.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _check_code(said: str) -> None:
    """What stands between backticks in the prose: a command that need not be complete, a file, a name, an option."""
    first, *rest = said.split()
    if first == "python" and rest[:1] == ["-m"]:
        if not commands.exists(rest[1]):
            raise Wrong(f"{rest[1]}: there is no such module")
    elif first == "make" and rest:
        commands.check(commands.command(shlex.split(said)))
    elif re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", first):
        if not (ROOT / first).exists():
            raise Wrong(f"{first}: there is no such file")
    elif re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", first):
        named(first)
    for word in (first, *rest):
        if re.fullmatch(r"--[a-z][a-z0-9-]+", word) and not commands.has_option(word):
            raise Wrong(f"{word}: no command has this option")


def run(page: Page, folder: Path) -> int:
    """Runs the page's blocks in ``folder``, the working directory. How many."""
    names: dict[str, Any] = {"__name__": "__page__"}
    count = 0
    for block in page.blocks:
        if block.mark == "file":
            (folder / block.reason).write_text(block.text, encoding="utf-8")
        elif block.mark == "run":
            count += 1
            if block.language == "python":
                exec(compile(block.text, block.place, "exec"), names)
            with at(block.place):
                for said in commands.commands(block.text) if block.language == "bash" else []:
                    commands.run(said, folder)
    return count
