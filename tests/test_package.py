"""What pyproject.toml and setup.py promise: metadata, commands, data files, the sdist's files, the wheel's tag."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from packaging.requirements import Requirement

import phi4rv
from csrc import build
from phi4rv import commands
from phi4rv.ops import cuda

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
TOP = ("phi4rv", "triton_kernels", "train", "infer")


def packages() -> list[str]:
    return setuptools.find_packages(str(ROOT), include=SETUPTOOLS["packages"]["find"]["include"])


def test_one_version() -> None:
    assert version("phi4rv") == phi4rv.__version__
    assert re.search(
        rf'^__version__ = "{re.escape(phi4rv.__version__)}"', (ROOT / "phi4rv/__init__.py").read_text(), re.M
    )
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "phi4rv.__version__"} and "version" in PROJECT["dynamic"]


def test_every_command_is_there() -> None:
    assert PROJECT["scripts"] == {command.script: f"{command.module}:main" for command in commands.COMMANDS}
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target


@pytest.mark.parametrize("package", ["phi4rv", "infer", "train"])
def test_a_package_lists_its_commands(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(package, []) == 0
    listed = capsys.readouterr().out.splitlines()
    for command in commands.COMMANDS:
        lines = [line for line in listed if line.split()[0] == command.script]
        mine = package in ("phi4rv", command.module.split(".")[0])
        assert len(lines) == mine and all(command.module in line and command.what in line for line in lines)
    assert max(map(len, listed)) <= 120
    assert commands.main(package, ["--nope"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --nope: ") and error.count("\n") == 1


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main("phi4rv", ["--version"]) == 0
    told = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["phi4rv"] == phi4rv.__version__ and told["torch"] == torch.__version__
    assert told.keys() == {"phi4rv", "torch", "triton", "csrc"}


def test_packages_and_their_data() -> None:
    folders = [init.parent.relative_to(ROOT) for top in TOP for init in (ROOT / top).rglob("__init__.py")]
    assert sorted(packages()) == sorted(".".join(folder.parts) for folder in folders)
    packed: set[Path] = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), f"{package}: {pattern}"
            packed |= set((ROOT / package.replace(".", "/")).glob(pattern))
    others = {file for top in TOP for file in (ROOT / top).rglob("*") if file.suffix not in (".py", ".pyc")}
    assert packed == {file for file in others if file.is_file() and file.parent != build.LIBRARY.parent}


def pinned() -> dict[str, str]:
    """Package -> version of requirements.txt, requirements-dev.txt and the Makefile's torch."""
    texts = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt", "Makefile")]
    return dict(re.findall(r"(?:^|:= )([\w-]+)==([\w.]+)$", "\n".join(texts), re.M))


def test_the_pinned_versions_are_allowed_ones() -> None:
    extras = {name: entries for name, entries in PROJECT["optional-dependencies"].items() if name != "tensorboard"}
    entries = [*PROJECT["dependencies"], *(entry for more in extras.values() for entry in more)]
    wanted = [requirement for entry in entries if (requirement := Requirement(entry)).name not in ("phi4rv", "build")]
    for requirement in wanted:
        assert requirement.specifier.contains(pinned()[requirement.name]), requirement
    assert pinned().keys() == {requirement.name for requirement in wanted}


def test_advice_to_install_names_what_the_extras_hold() -> None:
    """``pip install 'phi4rv[…]'`` cannot work: no registry has the package."""
    extras = PROJECT["optional-dependencies"]
    known = {Requirement(entry).name for entries in extras.values() for entry in entries}
    advised = set()
    for source in (file for top in TOP for file in (ROOT / top).rglob("*.py")):
        for told in re.findall(r"pip install ([^\"`;)]+)", source.read_text()):
            assert "phi4rv[" not in told, source
            advised |= {word for word in told.split() if re.fullmatch(r"[a-z][\w-]+", word)}
    assert {"llguidance", "triton"} <= advised <= known


def test_an_sdist_holds_what_a_wheel_is_built_from(tmp_path: Path) -> None:
    """The manifest that the sdist is packed from, made afresh."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    packed = set((tmp_path / "phi4rv.egg-info/SOURCES.txt").read_text().splitlines())
    suffixes = (".py", ".cpp", ".cu", ".h", ".cuh", ".jinja", ".html", ".json", ".typed")
    folders = [ROOT / name for name in ("csrc", *TOP)]
    needed = [file for folder in folders for file in folder.rglob("*") if file.suffix in suffixes]
    assert len(needed) > 100
    files = {str(file.relative_to(ROOT)) for file in needed}
    assert files | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc")) or name.startswith("tests/")]


def distribution(monkeypatch: pytest.MonkeyPatch, reason: str | None, **metadata: Any) -> setuptools.Distribution:
    """A package of setup.py's kind, where csrc/ cannot be built for this reason; None where it can."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(sys, "path", sys.path[:])  # setup.py adds to it
    monkeypatch.setattr(build, "unavailable_reason", lambda: reason)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    made: setuptools.Distribution = given["distclass"](
        {"name": "phi4rv", "version": "0", "script_name": "setup.py", "cmdclass": given["cmdclass"], **metadata}
    )
    return made


@pytest.mark.parametrize("reason, tag", [(None, r"py3-none-linux_\w+"), ("no nvcc", "py3-none-any")])
def test_a_wheel_is_for_a_platform_where_it_has_the_library(
    reason: str | None, tag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wheel = distribution(monkeypatch, reason).get_command_obj("bdist_wheel")
    wheel.ensure_finalized()
    assert re.fullmatch(tag, "-".join(wheel.get_tag()))
    assert wheel.root_is_pure == (reason is not None)


@pytest.mark.parametrize("reason", [None, "no nvcc"])
def test_what_is_packed_of_csrc(reason: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library that was built and its record; else the reason alone, never a library of an older build."""
    made = distribution(monkeypatch, reason, packages=["phi4rv"])
    for name in ("LIBRARY", "RECORD", "ROOT"):
        monkeypatch.setattr(build, name, tmp_path / getattr(build, name).relative_to(ROOT))
    monkeypatch.setattr(build, "build", lambda: None)
    monkeypatch.chdir(tmp_path)
    build.LIBRARY.parent.mkdir(parents=True)
    (tmp_path / "phi4rv/__init__.py").touch()
    build.LIBRARY.write_text("library")
    build.RECORD.write_text("built for sm_90a")
    made.run_command("build")
    (target,) = (tmp_path / "build").glob("lib*")
    packed = {file.name: file.read_text() for file in (target / "phi4rv/lib").iterdir()}
    if reason is None:
        assert packed == {"phi4rv_cuda.so": "library", "csrc.txt": "built for sm_90a"}
    else:
        assert packed.keys() == {"csrc.txt"}
        assert packed["csrc.txt"].startswith("not built: ") and reason in packed["csrc.txt"]


def test_modules_of_an_older_tree_are_not_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = distribution(monkeypatch, "no nvcc", packages=["phi4rv"])
    for name in ("RECORD", "ROOT"):
        monkeypatch.setattr(build, name, tmp_path / getattr(build, name).relative_to(ROOT))
    monkeypatch.chdir(tmp_path)
    for file in ("phi4rv/__init__.py", "build/lib/phi4rv/removed.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    made.run_command("build")
    assert sorted(file.name for file in (tmp_path / "build/lib/phi4rv").rglob("*.*")) == ["__init__.py", "csrc.txt"]


def test_the_record_tells_why_the_kernels_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "library_path", lambda: tmp_path / "phi4rv_cuda.so")
    monkeypatch.setenv(cuda.EMULATE, "0")
    device = torch.device("cpu")
    assert cuda.unavailable_reason(device) == "csrc/ is not built: `python csrc/build.py` builds it where nvcc is found"
    (tmp_path / "csrc.txt").write_text("not built: no nvcc\n")
    assert cuda.unavailable_reason(device) == "csrc/ is not built: no nvcc"
    (tmp_path / "phi4rv_cuda.so").touch()
    (tmp_path / "csrc.txt").write_text("built for sm_90a by CUDA 13.0\n")
    assert cuda.build_record() == "built for sm_90a by CUDA 13.0"
    assert cuda.unavailable_reason(device) == "the CUDA kernels need a Hopper GPU (sm_90)"


def test_what_is_missing_to_build_with_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(build.unavailable_reason()).startswith("no nvcc")
    monkeypatch.setattr(build, "nvcc", lambda: tmp_path / "nvcc")
    monkeypatch.setattr(build, "torch_folder", lambda: None)
    assert str(build.unavailable_reason()).startswith("no torch")
    monkeypatch.setattr(build, "torch_folder", lambda: tmp_path)
    for number, what in (("2.10.1+cu128", "no newer torch than 2.10.1+cu128 (it takes 2.11)"), ("2.11.0", None)):
        (tmp_path / "version.py").write_text(f"from x import y\n__version__ = '{number}'\n")
        assert build.unavailable_reason() == what
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert str(build.unavailable_reason()).startswith("no ninja")


def test_torch_is_seen_from_an_isolated_build(tmp_path: Path) -> None:
    """pip isolates by a sitecustomize on PYTHONPATH that takes what is installed off the path."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path = [p for p in sys.path if 'packages' not in p]\n")
    code = (
        "import importlib.util as u; print(u.find_spec('torch')); from csrc import build; print(build.torch_folder())"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["None", str(Path(torch.__file__).parent)]
