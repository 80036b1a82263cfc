"""Datasheet figures of GPUs, for MFU and plans."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GPU:
    """tflops: dense bfloat16 products, 10¹² operations/s. memory: 10⁹ bytes, bandwidth of it: 10⁹ bytes/s. nvlink: to
    the GPUs of the node, network: to other nodes, both 10⁹ bytes/s of one GPU in one direction. node: GPUs in one.
    """

    tflops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    node: int = 8


# Dense figures: half of what is printed "with sparsity". NVLink's printed figure counts both directions.
GPUS = {
    # NVIDIA A100 80GB SXM datasheet (2021): 312 TFLOP/s, 80 GB, 2039 GB/s, NVLink 600 GB/s. DGX A100 (80 GB) datasheet:
    # 8 ConnectX adapters of 200 Gb/s for 8 GPUs.
    "a100": GPU(312.0, 80, 2039, 300, 25),
    # NVIDIA H100 SXM datasheet (2023): 1979 TFLOP/s with sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s. DGX H100
    # datasheet: 8 ConnectX-7 of 400 Gb/s.
    "h100": GPU(989.5, 80, 3350, 450, 50),
    # NVIDIA H200 SXM datasheet (2024): 1979 TFLOP/s with sparsity, 141 GB, 4.8 TB/s, NVLink 900 GB/s. DGX H200
    # datasheet: as DGX H100.
    "h200": GPU(989.5, 141, 4800, 450, 50),
    # NVIDIA HGX B200 (2024), 8 GPUs: 36 PFLOP/s with sparsity; DGX B200 datasheet: 1440 GB and 64 TB/s in 8 GPUs,
    # NVLink 14.4 TB/s in all, 8 ConnectX-7 of 400 Gb/s.
    "b200": GPU(2250.0, 180, 8000, 900, 50),
}


def peak_tflops(device: torch.device) -> float | None:
    """Of a GPU in the table, by the name that CUDA gives it; None for any other device."""
    if device.type != "cuda":
        return None
    return peak_tflops_by_name(torch.cuda.get_device_name(device))


def peak_tflops_by_name(name: str) -> float | None:
    """``NVIDIA H100 80GB HBM3`` -> 989.5. None for a GPU that is not in the table, and for the slower PCIe boards."""
    if "PCIe" in name or "NVL" in name:
        return None
    return next((gpu.tflops for key, gpu in GPUS.items() if re.search(rf"\b{key.upper()}\b", name)), None)
