"""A room imports only from rooms below it: a room is a package, and within a package a folder or a file beside it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. The registry of phi4rv loads kernels by name, so that triton_kernels stands on phi4rv's formats.
PACKAGES = ("csrc", "phi4rv", "triton_kernels", "infer", "train", "benchmarks")
MOST_FILES = 16  # side by side in a folder

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def imported(module: str) -> set[str]:
    """Modules of this project that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & set(FILES) - {module}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_packages_import_downwards() -> None:
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in imported(module)
        if PACKAGES.index(module.split(".")[0]) < PACKAGES.index(other.split(".")[0])
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_of_a_package_form_no_circle(package: str) -> None:
    graph: dict[str, set[str]] = {}
    for module in FILES:
        # A package's own __init__ gives names out and belongs to no room.
        if module.split(".")[0] == package and module != package:
            below = {room(other) for other in imported(module) if other.split(".")[0] == package and other != package}
            graph.setdefault(room(module), set()).update(below - {room(module)})
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_folders_can_be_read_at_a_glance() -> None:
    folders: dict[Path, int] = {}
    for path in FILES.values():
        if path.name != "__init__.py":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    assert {str(folder): count for folder, count in folders.items() if count > MOST_FILES} == {}


def test_every_package_of_the_ground_plan_is_read() -> None:
    assert {module.split(".")[0] for module in FILES} == set(PACKAGES)
    assert "phi4rv.errors" in imported("phi4rv.processing.images")
