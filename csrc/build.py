"""Builds csrc/ with ninja: ``python csrc/build.py`` writes phi4rv/lib/phi4rv_cuda.so with nvcc, ``--emulated``
phi4rv/lib/phi4rv_emulated.so with g++, the same kernels for a CPU (csrc/emulator/).

The library is built against PyTorch's stable ABI of 2.10 and links libtorch_cpu alone: one file serves every later
PyTorch and every Python, and it loads where there is no GPU. PHI4RV_CUDA_ARCHS names the architectures (``90a``;
several separated by semicolons), CUDA_HOME the toolkit. phi4rv/lib/csrc.txt, which is packed with the library, says in
one line what was built; in a wheel without the library, why not.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
LIBRARY = ROOT / "phi4rv" / "lib" / "phi4rv_cuda.so"
EMULATED = LIBRARY.with_name("phi4rv_emulated.so")
RECORD = LIBRARY.with_name("csrc.txt")  # read by phi4rv/ops/cuda.py
OLDEST_TORCH = (2, 11)
STABLE_ABI = "-DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000"
# No _FORTIFY_SOURCE: it takes a jump to another fiber's stack for an error.
EMULATE = "-std=c++20 -O2 -march=native -fPIC -fvisibility=hidden -U_FORTIFY_SOURCE -Wno-psabi -DPHI4RV_EMULATED"

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
EMULATED_RULES = """\
ninja_required_version = 1.5
builddir = {build}
rule cuda
  command = {cxx} {flags} -I{include} -MD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = {cxx} $in
rule bindings
  command = {cxx} {flags} {abi} -I{include} -I{torch}/include -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = {cxx} $in
rule link
  command = {cxx} -shared -o $out $in -L{torch}/lib -ltorch_cpu
  description = link $out
"""


def nvcc() -> Path | None:
    """The compiler of CUDA_HOME, else the one on the path, else that of the usual place; None without one."""
    home = os.environ.get("CUDA_HOME")
    found = Path(home) / "bin" / "nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    return found.resolve() if found.exists() else None


def headers(compiler: Path) -> Path:
    """The folder of cuda.h that belongs to this compiler."""
    found = [
        top / "include" for top in (compiler.parents[1], Path("/usr/local/cuda")) if (top / "include/cuda.h").exists()
    ]
    if not found:
        raise FileNotFoundError(f"no cuda.h beside {compiler}: set CUDA_HOME to the CUDA toolkit")
    return found[0]


def torch_folder() -> Path | None:
    """Where the installed torch lies, with its headers; None without one. Importing it would take seconds.

    pip hides what is installed from an isolated build by PYTHONPATH alone, and its interpreter is that of the
    environment that it installs into: the same interpreter without PYTHON* variables (-E) and without the current
    folder (-P) sees the torch that the package will run with. Where the isolated interpreter is another one
    (``python -m build``, uv) there is no torch to be seen, and the build must not be isolated.
    """
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    code = "from importlib.util import find_spec; spec = find_spec('torch'); print(spec.origin if spec else '')"
    run = subprocess.run([sys.executable, "-EP", "-c", code], capture_output=True, text=True)
    return Path(run.stdout.strip()).parent if run.stdout.strip() else None


def architectures() -> list[str]:
    """What PHI4RV_CUDA_ARCHS asks for, as nvcc names them without ``sm_``."""
    return os.environ.get("PHI4RV_CUDA_ARCHS", "90a").split(";")


def ninja_file(compiler: Path, torch: Path, build: Path, emulated: bool) -> str:
    """The build's rules and edges: each source alone, so that a change compiles one file."""
    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])
    if emulated:
        sources += sorted((SOURCES / "emulator").glob("*.cpp"))
        text = EMULATED_RULES.format(
            build=build,
            cxx=os.environ.get("CXX", "g++"),
            flags=EMULATE,
            abi=STABLE_ABI,
            include=headers(compiler),
            torch=torch,
        )
    else:
        flags = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures())
        text = RULES.format(build=build, nvcc=compiler, archs=flags, abi=STABLE_ABI, torch=torch)
    objects = []
    for source in sources:
        objects.append(build / f"{source.name}.o")
        text += f"build {objects[-1]}: {'bindings' if source.name == 'bindings.cpp' else 'cuda'} {source}\n"
    return text + f"build {EMULATED if emulated else LIBRARY}: link {' '.join(map(str, objects))}\n"


def unavailable_reason() -> str | None:
    """What there is not to build with, in one line; None where all is."""
    if nvcc() is None:
        return "no nvcc (CUDA_HOME names the CUDA toolkit)"
    torch = torch_folder()
    if torch is None:
        return "no torch that the build can see (an isolated one sees it under pip alone)"
    version = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text(), re.M)
    if version and (int(version[2]), int(version[3])) < OLDEST_TORCH:
        return f"no newer torch than {version[1]} (it takes 2.11)"
    if importlib.util.find_spec("ninja") is None:
        return "no ninja (pip install ninja)"
    return None


def build(emulated: bool = False) -> str | None:
    """Builds what changed. Returns why nothing was built, in one line, where a tool is missing.

    The emulated library needs CUDA's headers, so it too is built only where nvcc is.
    """
    if reason := unavailable_reason():
        return f"csrc/ is not built, its CUDA kernels are left out: {reason}"
    compiler, torch = nvcc(), torch_folder()
    assert compiler is not None and torch is not None
    folder = ROOT / "build" / ("emulated" if emulated else "csrc")
    folder.mkdir(parents=True, exist_ok=True)
    LIBRARY.parent.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:  # test workers build side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(ninja_file(compiler, torch, folder, emulated))
        subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-f", str(folder / "build.ninja")], check=True)
        if not emulated:
            RECORD.write_text(f"built for {' '.join(f'sm_{a}' for a in architectures())} by {release(compiler)}\n")
    return None


def release(compiler: Path) -> str:
    """``CUDA 13.0``, as the compiler says."""
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", told)
    return f"CUDA {found[1]}" if found else "nvcc of an unknown release"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python csrc/build.py", description="Builds csrc/; compiles what changed.")
    parser.add_argument("--emulated", action="store_true", help="the kernels for a CPU, with g++ (csrc/emulator/)")
    emulated = parser.parse_args().emulated
    try:
        print(build(emulated) or f"built: {(EMULATED if emulated else LIBRARY).relative_to(ROOT)}")
    except subprocess.CalledProcessError:
        sys.exit("error: csrc/ does not compile; the compiler's own words are above")
