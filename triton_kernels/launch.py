"""What the launch functions share: checks of arguments, and facts of the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def require(condition: bool, message: str) -> None:
    """ValueError(message) unless ``condition``. Shapes, dtypes and devices only: nothing that reads the device."""
    if not condition:
        raise ValueError(message)


def rows(x: Tensor) -> Tensor:
    """x as (rows, channels) with adjacent channels; copies only where they are not adjacent."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, -2) if x.ndim > 2 else torch.atleast_2d(x)


@functools.lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small number where kernels are interpreted, so that loops are."""
    if device.type != "cuda":
        return 4
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)
