"""compute-sanitizer over every kernel, memcheck and then racecheck: ``python -m tests.kernels.sanitize [NAME …]``.

Runs the tiny cases of each operation's benchmark, forward and backward. Every tensor gets memory of its own, so that
an access behind its end is not hidden by the allocator. Exit status 77 where compute-sanitizer is not on the PATH.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.jobs import SKIPPED
from benchmarks.kernels import operation_names
from benchmarks.kernels.case import Case, Draw, differentiable_outputs
from phi4rv.ops import cuda

ROOT = Path(__file__).parents[2]
INSIDE = "--inside"
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--print-limit", "20", "--tool"]
TOOLS = ("memcheck", "racecheck")
# The allocator would put tensors side by side in one block, where running over an end goes unseen.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}


def main(arguments: list[str]) -> int:
    if arguments[:1] == [INSIDE]:
        return inside(arguments[1:])
    if shutil.which(SANITIZER[0]) is None:
        print(f"{SANITIZER[0]} is not on the PATH: nothing was checked")
        return SKIPPED
    return max(check(tool, arguments or operation_names()) for tool in TOOLS)


def check(tool: str, names: list[str]) -> int:
    """Runs the operations under one of the sanitizer's tools. An illegal access ends a process: the next goes on."""
    failed: list[str] = []
    status = 0
    while names:
        with tempfile.TemporaryFile("w+") as log:
            command = [*SANITIZER, tool, sys.executable, "-m", "tests.kernels.sanitize", INSIDE, *names]
            code = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log
            ).returncode
            log.seek(0)
            text = log.read()
        print(text, flush=True)
        passed = re.findall(r"^ok (\w+)$", text, re.MULTILINE)
        begun = re.findall(r"^begin (\w+)$", text, re.MULTILINE)
        status = status or code
        failed += [name for name in begun if name not in passed]
        names = names[len(begun) :] if begun else []
    print(f"{tool}: {'failed: ' + ', '.join(failed) if failed else 'failed' if status else 'no errors'}")
    return 1 if status else 0


def inside(names: list[str]) -> int:
    """Runs the operations here; stops where the GPU accepts nothing more."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ |= {"TRITON_INTERPRET": "1", cuda.EMULATE: "1"}
    status = 0
    for name in names:
        print(f"begin {name}", flush=True)
        try:
            for case in importlib.import_module(f"benchmarks.kernels.cases.{name}").cases(tiny=True):
                exercise(case, device)
            print(f"ok {name}", flush=True)
        except Exception as error:
            status = 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            if device == "cuda" and not _alive():
                os._exit(1)  # nothing can be freed any more
    return status


def exercise(case: Case, device: str) -> None:
    """Forward, and backward where an input wants its gradient."""
    inputs = case.inputs(Draw(device, case.dtype))
    outputs = differentiable_outputs(case.ours(*inputs))
    wanted: list[Any] = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if outputs and wanted:
        torch.autograd.grad(outputs, wanted, [torch.randn_like(out) for out in outputs], allow_unused=True)
    if device == "cuda":
        torch.cuda.synchronize()


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
