"""Builds the CUDA kernels of csrc/ into the package where that is possible; all else is in pyproject.toml.

``pip install .`` builds them where it finds nvcc and an installed torch, isolated or not (csrc/build.py, torch_folder).
torch is no build requirement: an isolated build would download gigabytes of one that nobody runs. Without either the
wheel is pure Python, and phi4rv/lib/csrc.txt in it says why: pip shows nothing of a build that succeeds but the wheel's
name, ``…-py3-none-any.whl``, so `python -m phi4rv --version` and the error of ``--kernels cuda`` tell it.
"""

import shutil
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # an isolated build brings its own
    sys.exit(f"error: setuptools {setuptools.__version__} is too old to build with: pip install 'setuptools>=77' ninja")

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from csrc import build

REASON = build.unavailable_reason()  # why the kernels are left out; None where they are built


class Distribution(setuptools.Distribution):
    """With the library it has a compiled part, which gives the wheel its platform."""

    def has_ext_modules(self) -> bool:
        return REASON is None


class BuildModules(build_py):
    """The modules, without those of an older tree that build/ still holds, and why there are no kernels."""

    def run(self) -> None:
        target = Path(self.build_lib).resolve()
        if not self.editable_mode and target.is_relative_to(build.ROOT / "build"):
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if REASON is not None:
            print(f"csrc/ is not built, the CUDA kernels are left out: {REASON}")
            if not self.editable_mode:
                record = target / build.RECORD.relative_to(build.ROOT)
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(
                    f"not built: when this package was made there was {REASON}; "
                    "with it, `pip install --force-reinstall --no-deps .` in the sources builds it\n",
                    encoding="utf-8",
                )


class BuildKernels(build_ext):
    """The library, beside the modules; an editable install takes it from where it is built."""

    def run(self) -> None:
        build.build()
        if not self.editable_mode:
            for built in (build.LIBRARY, build.RECORD):
                target = Path(self.build_lib) / built.relative_to(build.ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(built, target)


class Wheel(bdist_wheel):
    """With the library for one platform, yet for every Python: the library knows nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setuptools.setup(
    distclass=Distribution,
    cmdclass={"build_py": BuildModules, "build_ext": BuildKernels, "bdist_wheel": Wheel},
)
