"""The emulator of csrc/emulator/: a right kernel is right in every order of events, and a broken one is found out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from csrc import build

HERE = Path(__file__).parent


needs_headers = pytest.mark.skipif(build.nvcc() is None, reason="no CUDA headers")


def program(folder: Path, name: str, *kernels: str) -> Path:
    """``name``.cu beside this file with these sources of csrc/, emulated."""
    compiler = build.nvcc()
    assert compiler is not None
    sources = [
        HERE / f"{name}.cu",
        *(build.SOURCES / kernel for kernel in kernels),
        build.SOURCES / "emulator/grid.cpp",
    ]
    includes = [f"-I{build.headers(compiler)}", f"-I{build.SOURCES}"]
    subprocess.run(["g++", *build.EMULATE.split(), *includes, "-x", "c++", *sources, "-o", folder / name], check=True)
    return folder / name


@needs_headers
def test_mistakes_are_found(tmp_path: Path) -> None:
    pipeline = program(tmp_path, "broken_pipeline", "tensor_map.cu")
    run = subprocess.run([pipeline], capture_output=True, text=True, check=True)
    found = dict(tuple(map(int, line.split())) for line in run.stdout.splitlines())
    assert found.pop(0) == 0  # without a mistake
    assert len(found) == 8 and all(found.values()), found


@needs_headers
def test_schedule(tmp_path: Path) -> None:
    """Every tile once, dearest first, as many as there are."""
    schedule = program(tmp_path, "print_schedule", "schedule.cu")
    for lengths in ([3, 0, 64, 17, 200], [16] * 70, [1] * 500, [1], [0], [700, 33, 700]):
        for causal in (False, True):
            run = subprocess.run(
                [schedule, "16", str(int(causal)), *map(str, lengths)], capture_output=True, text=True, check=True
            )
            tiles = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
            assert sorted(tiles) == [(d, block) for d, n in enumerate(lengths) for block in range(-(-n // 16))]
            costs = [min((block + 1) * 16, lengths[d]) if causal else lengths[d] for d, block in tiles]
            assert costs == sorted(costs, reverse=True)
