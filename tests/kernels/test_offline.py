"""What the kernels compile to for GPUs that are not here: no spills, within shared memory, on the tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import operation_names

ROOT = Path(__file__).parents[2]
OPERATIONS = [name for name in operation_names() if (ROOT / "triton_kernels" / f"{name}.py").exists()]
SHARED = 227 * 1024  # what one block may have on sm_90
# Products of fewer than 64 rows, which wgmma cannot do: they run as mma (HMMA).
FEW_ROWS = {"decode_attention.split_kernel"}
# Bytes a thread that a kernel is known to spill, and may.
SPILLS = {"packed_attention.dkdv_kernel": 136}


def compile_for(operation: str, *options: str) -> list[dict[str, Any]]:
    # A process of its own: here the kernels are interpreted.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.offline", operation, *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_hopper(operation: str) -> None:
    """Every candidate."""
    kernels = compile_for(operation)
    assert kernels
    for k in kernels:
        name = f"{operation}.{k['kernel'].lstrip('_')}"
        products = "HGMMA" if k["HGMMA"] else "HMMA" if k["HMMA"] else ""
        print(
            f"{name:40} {k['registers']:3} registers {k['shared']:6} bytes shared {k['blocks']:2} blocks of "
            f"{k['warps']} warps {k['spills']:3} spilled {products:5} {k['config']}"
        )
        assert k["spills"] <= SPILLS.get(name, 0), k
        assert k["shared"] <= SHARED, k
        assert not k["dots"] or k["HGMMA"] or (name in FEW_ROWS and k["HMMA"]), k


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_other_architectures(operation: str, capability: int) -> None:
    """The defaults compile."""
    assert compile_for(operation, "--capability", str(capability), "--defaults")
