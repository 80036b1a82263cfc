"""The sdist, the wheels and what pip makes of them, in fresh environments: ``make test-package``.

torch and the other dependencies are those that run the tests, lent by a .pth file; what builds is downloaded. The
kernels are compiled from the sdist, for minutes, where nvcc is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from csrc import build
from phi4rv import __version__, commands
from tests import parity

pytestmark = pytest.mark.packaging
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")
ROOT = Path(__file__).parents[2]
# What a fresh environment brings or builds for itself, and the package under test.
NOT_LENT = ("phi4rv", "__editable__", "pip", "setuptools", "_distutils_hack", "distutils", "ninja", "build", "wheel")
DATA = [
    "infer/server/page.html",
    "train/synthetic/tiny_chat_template.jinja",
    "triton_kernels/tuned.json",
    *(f"{package}/py.typed" for package in ("phi4rv", "infer", "train", "triton_kernels")),
]
QUESTION = [
    *("--checkpoint", str(parity.CHECKPOINT), "--image", str(parity.CHECKPOINT / "images" / "1_0.png")),
    *("--prompt", "Where is Save?", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "4", "--json"),
]


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The finished command, without the variables that the tests set for themselves."""
    ours = ("PHI4RV_", "PYTHON", "TRITON_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def lent(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with the dependencies that run these tests."""
    folder = tmp_path_factory.mktemp("lent")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(NOT_LENT) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    kept = Path(torch.__file__).parents[1]  # the torch that the Makefile keeps lies elsewhere
    return [folder, *([] if (folder / "torch").exists() else [kept])]


def environment(folder: Path, lent: list[Path]) -> Path:
    """A new virtual environment with what is lent; its folder of programs."""
    venv.create(folder, with_pip=True)
    (library,) = folder.glob("lib/python*/site-packages")
    (library / "lent.pth").write_text("\n".join(map(str, lent)))
    return folder / "bin"


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``python -m build`` makes of the checkout: the sdist, and from it a wheel."""
    folder = tmp_path_factory.mktemp("distributions")
    programs = environment(folder / "venv", [])
    run(programs / "pip", "install", "--quiet", "build", cwd=folder)
    told = run(programs / "python", "-m", "build", "--outdir", folder, ROOT, cwd=folder).stdout
    assert "csrc/ is not built, the CUDA kernels are left out: no " in told
    return folder


@pytest.fixture(scope="session")
def pure(distributions: Path) -> Path:
    return distributions / f"phi4rv-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="session")
def compiled(distributions: Path, lent: list[Path]) -> Path:
    """The wheel that pip makes of the sdist where it finds nvcc and torch, isolated as it is by default."""
    programs = environment(distributions / "compiler", lent)
    (sdist,) = distributions.glob("*.tar.gz")
    run(programs / "pip", "wheel", "--no-deps", "--wheel-dir", distributions, sdist, cwd=distributions)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return distributions / f"phi4rv-{__version__}-py3-none-{platform}.whl"


@pytest.fixture(params=["pure", pytest.param("compiled", marks=needs_nvcc)])
def wheel(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_a_wheel_works_where_it_is_installed(wheel: Path, lent: list[Path], tmp_path: Path) -> None:
    library = "phi4rv/lib/phi4rv_cuda.so"
    has_library = "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as packed:
        assert {*DATA, "phi4rv/lib/csrc.txt"} <= set(packed.namelist())
        assert (library in packed.namelist()) == has_library
    programs = environment(tmp_path / "venv", lent)
    run(programs / "pip", "install", "--quiet", wheel, cwd=tmp_path)
    run(programs / "pip", "check", cwd=tmp_path)

    code = (
        "import infer, phi4rv, train, triton_kernels, sys\n"
        f"assert all(m.__file__.startswith({str(tmp_path)!r}) for m in (infer, phi4rv, train, triton_kernels))\n"
        f"phi4rv.load({str(parity.CHECKPOINT)!r})\n"
    )
    run(programs / "python", "-c", code, cwd=tmp_path)
    told = run(programs / "python", "-m", "phi4rv", "--version", cwd=tmp_path).stdout
    assert f"phi4rv {__version__}\n" in told
    assert ("csrc built for sm_90a by CUDA " if has_library else "csrc not built: ") in told

    answer = json.loads(run(programs / "phi4rv-infer", *QUESTION, cwd=tmp_path).stdout)
    expected = json.loads(run(sys.executable, "-m", "infer.main", *QUESTION, cwd=ROOT).stdout)
    assert answer["token_ids"] == expected["token_ids"] and len(answer["token_ids"]) == 4
    for command in commands.COMMANDS:
        assert run(programs / command.script, "--help", cwd=tmp_path).stdout.startswith("usage: ")


@needs_nvcc
def test_a_wheel_s_kernels_load(compiled: Path, lent: list[Path], tmp_path: Path) -> None:
    programs = environment(tmp_path / "venv", lent)
    run(programs / "pip", "install", "--quiet", compiled, cwd=tmp_path)
    code = (
        "import torch; from phi4rv.ops import cuda; cuda.load(); x = torch.zeros(1, 64, dtype=torch.bfloat16)\n"
        "try: cuda.decode_gemv(x, torch.zeros(8, 64, dtype=torch.bfloat16))\n"
        "except RuntimeError as error: print(error)"
    )
    assert "x must be on a CUDA device" in run(programs / "python", "-c", code, cwd=tmp_path).stdout


@needs_nvcc
def test_the_checkout_installs_without_isolation(lent: list[Path], tmp_path: Path) -> None:
    programs = environment(tmp_path / "venv", lent)
    run(programs / "pip", "install", "--quiet", "--upgrade", "setuptools", "ninja", cwd=tmp_path)
    run(programs / "pip", "install", "--quiet", "--no-build-isolation", ROOT, cwd=tmp_path)
    told = run(programs / "python", "-m", "phi4rv", "--version", cwd=tmp_path).stdout
    assert "csrc built for sm_90a by CUDA " in told
    (record,) = (tmp_path / "venv").rglob("phi4rv-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false" in record.read_text() and "Tag: py3-none-" in record.read_text()
