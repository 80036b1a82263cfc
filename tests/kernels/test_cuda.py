"""The CUDA kernels of csrc/: what they compile to, their checks, and on a GPU their parity with the definitions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from csrc import build
from phi4rv import cuda, reference
from tests.kernels.check import CUDA_PLACES, Place, draw, parity

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="no nvcc")


@pytest.fixture(scope="module", autouse=True)
def kernels(csrc: None) -> None:
    """Every test here wants them loaded."""


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
        "import torch; from phi4rv import cuda; cuda.load(); x = torch.zeros(1, 64, dtype=torch.bfloat16)\n"
        "try: cuda.decode_gemv(x, torch.zeros(8, 64, dtype=torch.bfloat16))\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {**os.environ, "PHI4RV_EMULATE": "0", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=build.ROOT)
    assert "x must be on a CUDA device" in run.stdout, run.stderr


@needs_nvcc
def test_machine_code(compiled: Path) -> None:
    """Head dim 72 is multiplied as 72, keys and values come by the copy engine, decoding does not wait for x."""
    sass = subprocess.run([CUOBJDUMP, "-sass", compiled], capture_output=True, text=True, check=True).stdout
    functions = {name: code for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s+Function :|\Z)", sass, re.S)}
    head72 = [code for name, code in functions.items() if "forward" in name and "Li72E" in name]
    assert len(head72) == 4  # two dtypes, causal or not
    for code in head72:
        assert "HGMMA.64x72x16" in code and "HGMMA.64x128x16" in code and "UTMALDG.3D" in code
    gemvs = [code for name, code in functions.items() if "decode_gemv" in name]
    assert len(gemvs) == 20  # two dtypes, five kinds of weight, with a norm or without
    for code in gemvs:
        before = code[: code.index("ACQBULK")]  # griddepcontrol.wait
        assert "LDGSTS.E.BYPASS.LTC256B.128" in before and "HMMA.16816.F32" in code
    parts = {name: code for name, code in functions.items() if "decode_attention" in name and "4partI" in name}
    assert len(parts) == 28  # two dtypes, their caches of four head dims and float8's of three, one tile and two
    for name, code in parts.items():
        assert set(re.findall(r"LDGSTS\S+", code)) == {"LDGSTS.E.BYPASS.LTC256B.128"}, name
        assert "HMMA.16816.F32" in code and "LDSM.16.MT88.4" in code and "LDL" not in code, name
        assert ("F2FP.F16.E4M3.UNPACK_B" in code) == ("fp8" in name), name


def offsets(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def test_attention_checks() -> None:
    q = torch.zeros(4, 2, 72, dtype=torch.bfloat16)
    ends = offsets([4])
    for wrong, message in [
        ((q.float(), q, q, ends), "q must be bfloat16 or float16"),
        ((q, q.half(), q, ends), "k must have the dtype of q"),
        ((q, q[:3], q, ends), "k must have q's tokens and head_dim"),
        ((q[..., :40], q[..., :40], q[..., :40], ends), "heads of a row must follow each other"),
        ((q, q, q[:, :1], ends), "those of k and v, which must be equal"),
        ((q, q, q, ends.long()), r"cu_seqlens must be \(documents \+ 1\) int32"),
        ((q, q, q, ends.to("meta")), "must be on one CUDA device"),
        ((*(torch.zeros(4, 2, 96, dtype=torch.bfloat16),) * 3, ends), "head_dim is 96, must be 64, 72, 80 or 128"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cuda.packed_attention(*wrong, max_seqlen=4, causal=False)
    with pytest.raises(ValueError, match="has no key_ends"):
        cuda.packed_attention(q, q, q, ends, 4, True, ends)


def test_fakes() -> None:
    q, k = (torch.zeros(5, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    assert cuda.packed_attention(q, k, k, offsets([5]).to("meta"), 5, True).shape == (5, 4, 128)


@pytest.mark.parametrize("place", CUDA_PLACES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("H", "G", "D"), [(16, 16, 72), (4, 2, 64), (2, 2, 80), (8, 2, 128)])
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17, 0, 63, 64, 65], [191, 192, 193], [1] * 300, [900, 257]])
def test_attention(place: Place, causal: bool, H: int, G: int, D: int, lengths: list[int]) -> None:
    row = draw(place, sum(lengths), H + 2 * G, D)
    q, k, v = (x.detach().requires_grad_() for x in row.split([H, G, G], dim=1))  # strided views of one row
    parity(
        lambda q, k, v: cuda.packed_attention(q, k, v, offsets(lengths, place[0]), max(lengths), causal),
        lambda q, k, v: reference.packed_attention(q, k, v, offsets(lengths, place[0]), max(lengths), causal),
        (q, k, v),
        gradients=place[0] == "cuda",
    )
