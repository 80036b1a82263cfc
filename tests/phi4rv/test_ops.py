"""Which implementation of an operation runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phi4rv import UserError
from phi4rv.ops import cuda, reference, registry
from phi4rv.ops.registry import IMPLEMENTATIONS, Operations
from tests.small import ROOT

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHI4RV_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(cuda.EMULATE, raising=False)


def test_one_kind_for_all() -> None:
    assert Operations("torch").rms_norm is reference.rms_norm
    assert set(Operations("torch").backends) == set(IMPLEMENTATIONS)
    assert str(Operations("torch")) == "torch: " + ", ".join(IMPLEMENTATIONS)


def test_every_operation_is_typed_and_defined() -> None:
    assert set(Operations.__annotations__) == set(IMPLEMENTATIONS)
    assert all(IMPLEMENTATIONS[name]["torch"].load() is getattr(reference, name) for name in IMPLEMENTATIONS)


def test_argument_before_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4RV_KERNELS", "fast")
    with pytest.raises(UserError, match=r"^PHI4RV_KERNELS: 'fast' is unknown, must be one of auto, cuda"):
        Operations()
    assert set(Operations("torch").backends.values()) == {"torch"}
    with pytest.raises(UserError, match=r"^--kernels: 'cudnn' is unknown"):
        Operations("cudnn")


def test_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    chosen = Operations("triton,rms_norm=torch").backends
    assert chosen.pop("rms_norm") == "torch"
    assert set(chosen.values()) <= {"triton"}
    assert set(Operations("rms_norm=torch").backends.values()) == {"torch"}  # the rest: auto
    with pytest.raises(UserError, match=r"^--kernels: 'rmsnorm' is no operation, must be one of "):
        Operations("torch,rmsnorm=triton")


def test_cuda_for_all_is_triton_where_csrc_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(cuda.EMULATE, "1")
    monkeypatch.setattr(cuda, "library_path", lambda: tmp_path)  # whatever is there
    monkeypatch.setattr(cuda, "load", lambda: None)
    chosen = Operations("cuda").backends
    assert chosen == {name: "cuda" if "cuda" in kinds else "triton" for name, kinds in IMPLEMENTATIONS.items()}
    with pytest.raises(UserError, match=r"^--kernels: rms_norm has no cuda implementation, only triton, torch"):
        Operations("cuda,rms_norm=cuda")


@pytest.mark.parametrize("kind", ["triton", "cuda", "flash_attn"])
def test_kernels_that_cannot_run_on_a_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"^--kernels: \w+ (has no {kind} implementation|cannot run as {kind} on cpu)"):
        Operations(kind, "cpu")
    monkeypatch.setenv("PHI4RV_KERNELS", kind)
    with pytest.raises(UserError, match=rf"^PHI4RV_KERNELS: \w+ (has no {kind}|cannot run as {kind})"):
        Operations(None, "cpu")


def test_auto_takes_only_what_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(registry, "VERIFIED", {})
    assert set(Operations("auto").backends.values()) == {"torch"}
    monkeypatch.setattr(registry, "VERIFIED", {"triton": {"rms_norm": ("cpu",)}})
    assert Operations("auto").backends["rms_norm"] == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert Operations("auto").backends["rms_norm"] == "torch"


def test_the_cuda_projector_brings_the_kernels_of_its_gradient() -> None:
    """In a process where nothing else has imported them."""
    code = (
        "import torch; from phi4rv.ops.registry import IMPLEMENTATIONS\n"
        "assert not hasattr(torch.ops.phi4rv_triton, 'projector_backward')\n"
        "IMPLEMENTATIONS['projector']['cuda'].load()\n"
        "assert hasattr(torch.ops.phi4rv_triton, 'projector_backward')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
