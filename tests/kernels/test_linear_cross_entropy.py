"""linear_cross_entropy against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi4rv import reference
from tests.kernels.check import PLACE, PLACES, Place, parity
from triton_kernels import linear_cross_entropy as module
from triton_kernels import linear_cross_entropy_kernels as kernels
from triton_kernels.linear_cross_entropy import linear_cross_entropy


def draw(place: Place, *shape: int, scale: float = 1.0) -> Tensor:
    device, dtype = place
    return (scale * torch.randn(shape)).to(device, dtype).requires_grad_()


def labels(place: Place, T: int, V: int, share: float = 1.0) -> Tensor:
    kept = torch.rand(T) < share
    return torch.where(kept, torch.randint(V, (T,)), reference.NO_LABEL).to(place[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", [(1, 5, 1), (3, 16, 7), (130, 33, 1000), (257, 64, 2500), (0, 16, 7)])
def test_parity(place: Place, shape: tuple[int, int, int]) -> None:
    T, C, V = shape
    inputs = draw(place, T, C), draw(place, V, C, scale=0.3), labels(place, T, V, 0.8)
    parity(linear_cross_entropy, reference.linear_cross_entropy, inputs)
