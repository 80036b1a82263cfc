"""Builds csrc/ with nvcc and ninja: ``python csrc/build.py`` writes phi4rv/lib/phi4rv_cuda.so.

The library is built against PyTorch's stable ABI of 2.10 and links libtorch_cpu alone: one file serves every later
PyTorch and every Python, and it loads where there is no GPU. PHI4RV_CUDA_ARCHS names the architectures (``90a``;
several separated by semicolons), CUDA_HOME the toolkit.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
LIBRARY = ROOT / "phi4rv" / "lib" / "phi4rv_cuda.so"
STABLE_ABI = "-DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000"

RULES = """\
ninja_required_version = 1.5
builddir = {build}
rule cuda
  command = {nvcc} -std=c++20 -O3 -lineinfo -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden {archs} $
    -MD -MF $out.d -c $in -o $out 2> $out.log || (cat $out.log >&2; false)
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule bindings
  command = {nvcc} -std=c++20 -O2 -Xcompiler -fPIC,-fvisibility=hidden {abi} -I{torch}/include $
    -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {nvcc} -shared -o $out $in -L{torch}/lib -ltorch_cpu
  description = link $out
"""


def nvcc() -> Path | None:
    """The compiler of CUDA_HOME, else the one on the path, else that of the usual place; None without one."""
    home = os.environ.get("CUDA_HOME")
    found = Path(home) / "bin" / "nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    return found.resolve() if found.exists() else None


def ninja_file(compiler: Path, build: Path) -> str:
    """The build's rules and edges: each source alone, so that a change compiles one file."""
    # Found, not imported: importing torch takes seconds.
    torch = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    archs = os.environ.get("PHI4RV_CUDA_ARCHS", "90a").split(";")
    flags = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    text = RULES.format(build=build, nvcc=compiler, archs=flags, abi=STABLE_ABI, torch=torch)
    objects = []
    for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]):
        objects.append(build / f"{source.name}.o")
        text += f"build {objects[-1]}: {'cuda' if source.suffix == '.cu' else 'bindings'} {source}\n"
    return text + f"build {LIBRARY}: link {' '.join(map(str, objects))}\n"


def build() -> str | None:
    """Builds what changed. Returns why nothing was built, in one line, where there is no compiler."""
    compiler = nvcc()
    if compiler is None:
        return "no nvcc: csrc/ is not built, the CUDA kernels are left out"
    folder = ROOT / "build" / "csrc"
    folder.mkdir(parents=True, exist_ok=True)
    LIBRARY.parent.mkdir(exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(compiler, folder))
    subprocess.run([sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")], check=True)
    return None


if __name__ == "__main__":
    print(build() or f"built: {LIBRARY.relative_to(ROOT)}")
