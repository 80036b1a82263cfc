"""Options that several benchmarks have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phi4rv.command_line import JSON, Number, OneOf
from phi4rv.config import Config


def json_option(add: Callable[..., None]) -> None:
    add("--json", kind=Path, metavar="FILE", help=f"{JSON}; written to FILE", unset="not written")


def seconds_option(add: Callable[..., None], what: str, default: float | None = math.inf, unset: str = "none") -> None:
    kind = Number(float, above=0, infinite=True)
    add("--seconds", kind=kind, default=default, help=f"time limit in seconds; {what}", unset=unset)


def layers_option(add: Callable[..., None], low: int = 0, **default: Any) -> None:
    most = "; 0: as many as the memory holds" if low == 0 else ""
    add(
        "--layers",
        kind=Number(int, low, Config().num_hidden_layers),
        help=f"decoder layers of the model that is made{most}",
        **default,
    )


def only_option(add: Callable[..., None], names: Sequence[str], what: str) -> None:
    add("--only", nargs="+", metavar="NAME", kind=OneOf(tuple(names)), help=f"what to run; {what}", unset="all")
