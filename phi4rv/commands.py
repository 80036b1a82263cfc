"""The commands of the package, in one table: what ``python -m phi4rv``, ``-m infer`` and ``-m train`` list."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NamedTuple

import torch

from phi4rv import __version__
from phi4rv.command_line import exit_status
from phi4rv.errors import UserError
from phi4rv.ops.cuda import build_record


class Command(NamedTuple):
    """``script`` on the path and ``python -m module`` are the same program; pyproject.toml names both too."""

    script: str
    module: str
    what: str


COMMANDS = (
    Command("phi4rv-train", "train.main", "one stage of the recipe, from data to a measured model"),
    Command("phi4rv-export", "train.export", "a save of a run as a model or an adapter in the published layout"),
    Command("phi4rv-plan", "train.plan", "memory, communication and time of a run, computed"),
    Command("phi4rv-plot", "train.plot", "runs drawn beside one another, and a table of them"),
    Command("phi4rv-infer", "infer.main", "questions about pictures, answered on the terminal"),
    Command("phi4rv-serve", "infer.serve", "an OpenAI-compatible server, with a page"),
    Command("phi4rv-quantize", "infer.quantize", "a checkpoint in 8 or 4 bits, and what that costs"),
    Command("phi4rv-merge", "phi4rv.merge", "a LoRA adapter merged into its base"),
)


def listing(package: str) -> str:
    """The commands of a package, a line each; of ``phi4rv`` all."""
    shown = [c for c in COMMANDS if package in ("phi4rv", c.module.partition(".")[0])]
    rows = [(c.script, f"python -m {c.module}", c.what) for c in shown]
    rows.append(("", "python -m phi4rv --version", "phi4rv, torch, triton and what is built of csrc/"))
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {script:{wide[0]}}  {module:{wide[1]}}  {what}" for script, module, what in rows]
    return "\n".join(["commands, under either name, each with --help:", *lines])


def versions() -> str:
    """What a report of a problem should name, a line each."""
    triton = version("triton") if importlib.util.find_spec("triton") else "not installed"
    return f"phi4rv {__version__}\ntorch {torch.__version__}\ntriton {triton}\ncsrc {build_record()}"


def main(package: str, argv: Sequence[str] | None = None) -> int:
    """``python -m package``: lists its commands."""
    return exit_status(lambda: _run(package, list(sys.argv[1:] if argv is None else argv)))


def _run(package: str, argv: list[str]) -> None:
    if argv == ["--version"]:
        print(versions())
    elif argv in ([], ["-h"], ["--help"]):
        print(listing(package))
    else:
        raise UserError(f"{argv[0]}: unknown; `python -m {package}` lists the commands, with --version the versions")
