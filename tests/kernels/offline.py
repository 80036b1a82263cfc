"""Compiles an operation's kernels, as its benchmark launches them, for GPUs that are not here, and reads the machine
code: ``python -m tests.kernels.offline rms_norm`` prints one JSON object a kernel.

The launches themselves are caught: arguments are specialised as Triton would, nothing runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.kernels.case import Case, Draw, differentiable_outputs
from triton_kernels.common.tuning import Config, SearchSpace

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Registers and shared memory of one multiprocessor, sm_80 and later.
REGISTERS, SHARED, THREADS = 65536, 233472, 2048


class Empty(Draw):
    """Inputs of a shape that nothing reads: memory that is not touched costs nothing."""

    def normal(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype).requires_grad_(grad)


class Driver:
    """Stands in for a CUDA driver of one architecture."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Catches every launch and keeps what was compiled."""

    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}

    def __enter__(self) -> Recorder:
        self.launch = launch = JITFunction.run

        def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
            self.kernels[compiled.hash] = compiled
            return compiled

        JITFunction.run = compile_only
        # The products left to cuBLAS would take minutes here.
        self.products = torch.mm, torch._scaled_mm
        torch.mm = lambda a, b: a.new_empty((len(a), b.shape[1]))
        torch._scaled_mm = lambda a, b, *_, out_dtype, **__: a.new_empty((len(a), b.shape[1]), dtype=out_dtype)
        return self

    def __exit__(self, *error: object) -> None:
        JITFunction.run = self.launch
        torch.mm, torch._scaled_mm = self.products


def compile_case(case: Case, draw: Draw) -> dict[str, Any]:
    """hash -> compiled kernel, of the forward pass and, for a backward case, of the gradient."""
    with Recorder() as recorder:
        inputs = case.inputs(draw)
        outputs = differentiable_outputs(case.ours(*inputs))
        if case.backward:
            wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
            torch.autograd.grad(outputs, wanted, [torch.empty_like(out) for out in outputs], allow_unused=True)
    return recorder.kernels


def resources(compiled: Any) -> dict[str, Any]:
    """Registers and spill bytes a thread, shared bytes, threads, blocks a multiprocessor, kinds of product."""
    usage = cuobjdump("-res-usage", compiled)
    dots = compiled.asm["ttir"].count("tt.dot")
    # Slow, and what the product is called is a matter of sm_90.
    sass = cuobjdump("-sass", compiled) if dots and compiled.metadata.target.arch == 90 else ""
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    threads = 32 * compiled.metadata.num_warps
    shared = compiled.metadata.shared
    blocks = min(
        REGISTERS // (threads * 8 * -(-registers // 8)), THREADS // threads, SHARED // (shared + 1024), 32
    )  # 1024: what the system keeps of each block's shared memory
    return {
        "kernel": compiled.metadata.name,
        "registers": registers,
        "spills": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "shared": shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "blocks": blocks,
        "dots": dots,
        **{name: len(re.findall(rf"\b{name}\b", sass)) for name in ("HGMMA", "QGMMA", "HMMA", "UTMALDG")},
    }


def cuobjdump(option: str, compiled: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def configurations(
    operation: str, cases: list[Case], defaults: bool
) -> Iterator[tuple[Case, SearchSpace | None, Config]]:
    """What to compile: every case with its defaults, then each other candidate with the first case that may pick it."""
    first: dict[tuple[str, str], Case] = {}
    for case in cases:
        SearchSpace.picked.clear()
        yield case, None, {}
        for pick in SearchSpace.picked:
            first.setdefault(pick, case)
    for space in SearchSpace.all:
        for key, configs in space.cases.items():
            if (space.name, key) in first and space.name.split(".")[0] == operation and not defaults:
                for config in configs[1:]:
                    yield first[space.name, key], space, config


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.offline", description=__doc__)
    parser.add_argument("operation", help="a file of benchmarks/kernels/cases")
    parser.add_argument("--capability", type=int, default=90, metavar="N")
    parser.add_argument("--defaults", action="store_true", help="only the first candidate of each kernel")
    args = parser.parse_args()
    triton.runtime.driver.set_active(Driver(args.capability))
    module = importlib.import_module(f"benchmarks.kernels.cases.{args.operation}")
    seen: set[str] = set()
    cases = [case for case in module.cases(tiny=False) if not case.cuda]
    for case, space, config in configurations(args.operation, cases, args.defaults):
        report(case, space, config, seen)


def report(case: Case, space: SearchSpace | None, config: Config, seen: set[str]) -> None:
    """Prints what ``case`` compiles to under ``config`` and was not printed before."""
    if space:
        with space.forced(config):
            kernels = compile_case(case, Empty("cpu", torch.bfloat16))
    else:
        kernels = compile_case(case, Empty("cpu", torch.bfloat16))
    for name, compiled in kernels.items():
        if name not in seen:
            seen.add(name)
            print(json.dumps({"case": case.shape, "config": config, **resources(compiled)}), flush=True)


if __name__ == "__main__":
    main()
