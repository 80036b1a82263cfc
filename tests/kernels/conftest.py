"""What every kernel test gets."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from csrc import build
from phi4rv.ops import cuda


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (and the largest integer), so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def csrc() -> None:
    """The CUDA kernels, built where nvcc is and loaded: the emulated ones where there is no GPU."""
    reason = build.build(cuda.emulated())
    if reason and not cuda.library_path().exists():
        pytest.skip(reason)
    cuda.load()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """One element's rounding can miss any bound by luck: the same draw every time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products in float32: TF32 would hide an error a thousand times larger."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield


@pytest.fixture(autouse=True)
def cheap_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches Triton's language anew, in a millisecond, at each call of a function; once a kernel is
    enough for our own."""
    patching = InterpretedFunction.__call__

    def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        ours = self.fn.__module__.startswith("triton_kernels")
        return self.rewrite()(*args, **kwargs) if ours else patching(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)
