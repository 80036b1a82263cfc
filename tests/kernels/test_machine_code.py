"""What csrc/ compiles to for Hopper: nothing spilled, the intended instructions, a library that loads anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from csrc import build

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The library for Hopper, which this machine may not be able to run."""
    build.build()
    return build.LIBRARY


@needs_nvcc
def test_no_spills(compiled: Path) -> None:
    logs = [log.read_text() for log in (build.ROOT / "build" / "csrc").glob("*.cu.o.log")]
    spilled = [int(n) for log in logs for n in re.findall(r"(\d+) bytes spill", log)]
    assert len(spilled) > 20 and not any(spilled)
    assert not any("wgmma.mma_async instructions are serialized" in log for log in logs)


@needs_nvcc
def test_loads_without_a_gpu(compiled: Path) -> None:
    """The compiled library registers its operators and checks arguments where PyTorch has no CUDA."""
    code = (
        "import torch; from phi4rv.ops import cuda; cuda.load(); x = torch.zeros(1, 64, dtype=torch.bfloat16)\n"
        "try: cuda.decode_gemv(x, torch.zeros(8, 64, dtype=torch.bfloat16))\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {**os.environ, "PHI4RV_EMULATE": "0", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=build.ROOT)
    assert "x must be on a CUDA device" in run.stdout, run.stderr


@pytest.fixture(scope="module")
def functions(compiled: Path) -> dict[str, str]:
    """Machine code by kernel."""
    sass = subprocess.run([CUOBJDUMP, "-sass", compiled], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s+Function :|\Z)", sass, re.S))


@needs_nvcc
def test_attention(functions: dict[str, str]) -> None:
    """Head dim 72 is multiplied as 72; keys and values come by the copy engine, once for two heads that share them;
    the softmax stands between the wait for its scores and the wait for the output that is computed meanwhile."""
    kernels = {n: code for n, code in functions.items() if "attention_forward" in n and "7forward" in n}
    assert len(kernels) == 20  # two dtypes, causal or not, four head dims, and 128 in pairs
    for name, code in kernels.items():
        D, cluster = (int(re.search(pattern, name)[1]) for pattern in (r"Li(\d+)ELb", r"ELi(\d)E"))  # type: ignore[index]
        assert "HGMMA.64x128x16" in code and f"HGMMA.64x{D}x16" in code, name
        assert "UTMALDG.3D" in code and ("UTMALDG.3D.MULTICAST" in code) == (cluster == 2), name
        assert "STG.E.128" in code, name
        loop = code.split("DEPBAR.LE gsb0, 0x1")[1].split("DEPBAR.LE gsb0, 0x0")[0]
        assert loop.count("MUFU.EX2") >= 64, name


@needs_nvcc
def test_attention_backward(functions: dict[str, str]) -> None:
    """The products' shapes, none of them waited for one by one; loads, integer sums and ds by their instructions."""
    kernels = {name: code for name, code in functions.items() if "attention_backward_cu" in name and "products" in name}
    assert len(kernels) == 16  # two dtypes, four head dims, causal or not
    for name, code in kernels.items():
        D = int(re.search(r"Li(\d+)E", name)[1])  # type: ignore[index]
        assert f"HGMMA.64x{D}x16" in code and "HGMMA.64x64x16" in code and "HGMMA.64x8x" not in code, name
        for instruction in ("UTMALDG.3D", "UBLKCP", "UBLKRED.G.S.ADD.S32", "STSM.16.M88.4", "USETMAXREG"):
            assert instruction in code, (name, instruction)
        assert code.count("WARPGROUP.DEPBAR") <= 9, name


@needs_nvcc
def test_decode_gemv(functions: dict[str, str]) -> None:
    """The first weights are asked for before it waits for the kernel in front."""
    gemvs = [code for name, code in functions.items() if "decode_gemv" in name]
    assert len(gemvs) == 20  # two dtypes, five kinds of weight, with a norm or without
    for code in gemvs:
        before = code[: code.index("ACQBULK")]  # griddepcontrol.wait
        assert "LDGSTS.E.BYPASS.LTC256B.128" in before and "HMMA.16816.F32" in code


@needs_nvcc
def test_decode_attention(functions: dict[str, str]) -> None:
    """The cache comes by copies of 16 bytes, is read as matrices, and 8-bit floats are converted two at a time."""
    parts = {name: code for name, code in functions.items() if "decode_attention" in name and "4partI" in name}
    assert len(parts) == 28  # two dtypes, their caches of four head dims and float8's of three, one tile and two
    for name, code in parts.items():
        assert set(re.findall(r"LDGSTS\S+", code)) == {"LDGSTS.E.BYPASS.LTC256B.128"}, name
        assert "HMMA.16816.F32" in code and "LDSM.16.MT88.4" in code and "LDL" not in code, name
        assert ("F2FP.F16.E4M3.UNPACK_B" in code) == ("fp8" in name), name


@needs_nvcc
def test_gemm(functions: dict[str, str]) -> None:
    """Products of the intended shapes; one operand comes for both blocks; a finished tile is worked on between the
    products of the next, not behind them."""
    gemms = {name: code for name, code in functions.items() if "gemm_kernel" in name}
    assert len(gemms) == 8  # operands and outputs bfloat16 or float16, float8 operands with both, GELU or nothing
    for name, code in gemms.items():
        product = "QGMMA.64x128x32.F32.E4M3.E4M3" if "fp8" in name else "HGMMA.64x256x16.F32"
        assert product in code and "UTMALDG.2D.MULTICAST" in code and "STSM.16.M88.4" in code, name
        products = [m.start() for m in re.finditer("[HQ]GMMA", code)]
        stores = [m.start() for m in re.finditer("STSM", code)]
        assert len(stores) == (8 if "fp8" in name else 16), name
        assert all(products[0] < store < products[-1] for store in stores), name
