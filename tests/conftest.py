"""What several test files share."""

import os
import shutil
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, whose own functions are defined by it
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("PHI4RV_EMULATE", "1")  # csrc/'s kernels, thread by thread

import phi4rv
from tests import parity


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests that take gigabytes, one after the other where pytest-xdist runs several processes on one GPU."""
    large = ("real", "2_31", "two_to_the_31", "2_to_the_31", "far_apart", "32_bits", "same_bits")
    for item in items:
        if item.get_closest_marker("gpu") and any(word in item.name for word in large):
            item.add_marker(pytest.mark.xdist_group("large"))


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The tiny checkpoint in the published layout."""
    return parity.CHECKPOINT


@pytest.fixture(scope="session")
def tiny() -> tuple[phi4rv.Phi4RV, phi4rv.Processor]:
    """Model and processor of the tiny checkpoint in float32; shared, so leave no ``.grad`` in it."""
    return phi4rv.load(parity.CHECKPOINT, device="cpu", dtype=torch.float32)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to write in."""
    return shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("expected", "images"))
