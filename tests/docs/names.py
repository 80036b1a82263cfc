"""Names of this project's modules and objects, in the pages' Python and prose: whether they exist."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.docs.commands import PACKAGES, Wrong, exists


def named(dotted: str) -> Any:
    """The module or object of a dotted name."""
    if exists(dotted):
        return importlib.import_module(dotted)
    owner, _, last = dotted.rpartition(".")
    found = named(owner) if owner else None
    if not hasattr(found, last):
        raise Wrong(f"{dotted}: there is no such name")
    return getattr(found, last)


def check_python(text: str) -> None:
    """Wrong unless the text compiles, what it names of this project exists and takes the keywords that it is given."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Wrong(str(error)) from None
    known = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _resolved(node, known)
        if isinstance(node, ast.Call) and callable(found := _resolved(node.func, known)):
            _check_keywords(found, [k.arg for k in node.keywords if k.arg])


def _imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """What the text calls this project's modules and objects, and what they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (top := alias.name.partition(".")[0]) in PACKAGES:
                    module = named(alias.name)
                    yield (alias.asname, module) if alias.asname else (top, importlib.import_module(top))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            for alias in node.names:
                yield alias.asname or alias.name, named(f"{node.module}.{alias.name}")


def _resolved(node: ast.AST, known: dict[str, Any]) -> Any:
    """The object that ``infer.Engine`` is; None for what is not known before it runs."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _resolved(node.value, known)) is not None:
        if not hasattr(owner, node.attr):
            raise Wrong(f"{ast.unparse(node)}: there is no such name")
        return getattr(owner, node.attr)
    return None


def _check_keywords(function: Callable[..., Any], keywords: Sequence[str]) -> None:
    parameters = inspect.signature(function).parameters.values()
    unknown = set(keywords) - {p.name for p in parameters}
    if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
        raise Wrong(f"{function.__name__} takes no {', '.join(sorted(unknown))}")
