"""Writes docs/command-reference.md from the commands' own parsers: ``python -m docs.make_reference``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from phi4rv.command_line import Option, Parser
from phi4rv.commands import COMMANDS

PAGE = Path(__file__).with_name("command-reference.md")
SCRIPTS = {command.module: command.script for command in COMMANDS}
# Run from the repository alone.
BENCHMARKS = (
    "benchmarks.run",
    "benchmarks.gpu",
    "benchmarks.images",
    "benchmarks.data.loading_and_packing",
    "benchmarks.saving",
    "benchmarks.kernels.__main__",
    "benchmarks.train_step",
    "benchmarks.inference.command",
    "benchmarks.loading",
    "benchmarks.server_load",
    "benchmarks.tune",
    "benchmarks.report.results",
)
HEAD = """# Command reference

Made from the commands' own parsers by `python -m docs.make_reference`; each prints the same with `--help`. All of them
also take `--version`. What is wrong with an argument is told in one line, `error: --option: …`, with exit status 2.
Metavariables: `N` is an integer, `X` a number.
"""


def parsers() -> dict[str, Parser]:
    """Each command's, by its module."""
    return {name: importlib.import_module(name).make_parser() for name in (*SCRIPTS, *BENCHMARKS)}


def page() -> str:
    return "\n".join([HEAD, *(section(parser, SCRIPTS.get(module)) for module, parser in parsers().items())])


def section(parser: Parser, script: str | None) -> str:
    """One command: its usage under each of its names, and its options, a table for each group of them."""
    usage = parser.usage_line()
    names = [usage, usage.replace(parser.prog, script)] if script else [usage]
    lines = [f"## {script or parser.prog}", "", str(parser.description), "", "```", *names, "```", ""]
    for title in dict.fromkeys(option.section for option in parser.options):
        lines += [f"{title[:1].upper()}{title[1:]}:", ""] if title else []
        lines += ["| option | meaning | takes | default |", "|---|---|---|---|"]
        lines += [row(option) for option in parser.options if option.section == title]
        lines.append("")
    return "\n".join(lines)


def row(option: Option) -> str:
    names = ", ".join(f"`{name} {option.metavar}`" if option.metavar else f"`{name}`" for name in option.names)
    if not option.names[0].startswith("-"):
        names = f"`{option.metavar}`"
    cells = (names, *map(escaped, (option.meaning, option.allowed, option.default)))
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """As Markdown: what would be a tag, a column or emphasis there."""
    for sign in "\\<|*":
        text = text.replace(sign, f"\\{sign}")
    return text


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
