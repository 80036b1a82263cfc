"""What a GPU has used since its driver was loaded, by NVML's counter (Volta and later)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = "libnvidia-ml.so.1"


def energy_counter(library: Any = None) -> Callable[[], float] | None:
    """A function that reads the counter of the current GPU, in joules; None where nothing tells it.

    The counter moves some ten times a second: what is measured should take a second or more.
    """
    if not torch.cuda.is_available():
        return None
    try:
        nvml = library or ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None

    def read() -> float:
        millijoules = ctypes.c_ulonglong()
        if status := nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError(f"NVML's energy counter: error {status}")
        return millijoules.value / 1e3

    try:
        read()
    except OSError:  # a board without the counter, or a part of one (MIG)
        return None
    return read
