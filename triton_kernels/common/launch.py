"""What the launch functions share: checks of arguments, and facts of the device."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check(condition: bool, message: str) -> None:
    """ValueError(message) unless ``condition``. Shapes, dtypes and devices only: nothing that reads the device."""
    if not condition:
        raise ValueError(message)


def check_float(x: Tensor, name: str) -> None:
    """ValueError unless x is of a float dtype that kernels are right in. ``name``: the operation and argument."""
    check(x.dtype in FLOATS, f"{name} is {x.dtype}, must be float32, float16 or bfloat16")
    exact = x.dtype != torch.bfloat16 or not INTERPRETED
    check(exact, f"{name} is bfloat16, which Triton's interpreter computes wrongly; take float32 or float16")


def flatten_to_2d(x: Tensor) -> Tensor:
    """x as (rows, channels) with adjacent channels; copies only where they are not adjacent."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, -2) if x.ndim > 2 else torch.atleast_2d(x)


@functools.lru_cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a small number where kernels are interpreted, so that loops are."""
    if device.type != "cuda":
        return 4
    return _num_sms(torch.cuda.current_device() if device.index is None else device.index)
