"""The emulator of csrc/emulator/: a right kernel is right in every order of events, and a broken one is found out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from csrc import build

HERE = Path(__file__).parent


@pytest.mark.skipif(build.nvcc() is None, reason="no CUDA headers")
def test_mistakes_are_found(tmp_path: Path) -> None:
    compiler = build.nvcc()
    assert compiler is not None
    program = tmp_path / "pipeline"
    sources = [
        "-x",
        "c++",
        HERE / "broken_pipeline.cu",
        build.SOURCES / "tensor_map.cu",
        build.SOURCES / "emulator/grid.cpp",
    ]
    includes = [f"-I{build.headers(compiler)}", f"-I{build.SOURCES}"]
    subprocess.run(["g++", *build.EMULATE.split(), *includes, *sources, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=True)
    found = dict(tuple(map(int, line.split())) for line in run.stdout.splitlines())
    assert found.pop(0) == 0  # without a mistake
    assert len(found) == 8 and all(found.values()), found
