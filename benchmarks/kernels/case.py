"""What a kernel benchmark is: inputs at a real shape, our operator, its peers, and the work that cannot be avoided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


class Draw:
    """Makes a case's inputs: normal random tensors on one device, floats in one dtype: bfloat16, or float32
    on a CPU, where kernels are interpreted."""

    def __init__(self, device: str, dtype: torch.dtype | None = None, seed: int = 0):
        self.device = device
        self.dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """Of standard deviation 1; a leaf that wants its gradient if ``grad``."""
        dtype = dtype or self.dtype
        drawn = self.dtype if dtype.itemsize == 1 else dtype  # PyTorch draws no float8
        x = torch.randn(shape, device=self.device, dtype=drawn, generator=self.generator)
        return x.to(dtype).requires_grad_(grad)

    def ints(self, values: list[int] | Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        """Given integers: offsets, indices, labels."""
        return torch.as_tensor(values, dtype=dtype).to(self.device)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    inputs(draw) -> the arguments of ``ours`` and of each peer, which return a tensor or a tuple of tensors. With
    ``backward`` what is timed is the gradient, for every input that wants one, of an already computed result.
    bytes: the fewest through memory, each input read once and each output written once; flops: useful operations.
    goal: ("peer", r): best peer's time / ours ≥ r, or with a peer's name that peer's; ("copy", r): share of the
    measured copy bandwidth; ("product", r): share of the measured product rate.
    bounds: peers that do less than ours (bare products): timed, but not compared, and never the best peer.
    dtype: of the inputs that are drawn; None: Draw's own.
    cuda: ``ours`` is csrc/'s, which nvcc has compiled, not Triton's.
    """

    operation: str
    shape: str
    inputs: Callable[[Draw], tuple[Any, ...]]
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    backward: bool = False
    goal: tuple[str, float] | None = None
    bounds: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    cuda: bool = False


def with_cuda_kernel(case: Case, kernel: Callable[..., Any], goal: tuple[str, float] | None = None) -> Case:
    """The row again, computed by csrc/'s kernel; the other one is its first peer."""
    return replace(
        case,
        shape=f"{case.shape}, CUDA",
        ours=kernel,
        peers={"triton": case.ours, **case.peers},
        goal=goal,
        dtype=torch.bfloat16,
        cuda=True,
    )


def differentiable_outputs(outputs: Any) -> list[Tensor]:
    """The outputs that have a gradient."""
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [out for out in outputs if isinstance(out, Tensor) and out.requires_grad]
