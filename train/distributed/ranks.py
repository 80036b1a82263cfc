"""The processes of a run, and what they exchange beside gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The others wait while rank 0 generates data, saves and evaluates; a dead process is found by ``Watchdog``.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process's rank and the number of processes, as torchrun sets them."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """The ``value`` of rank 0, on every rank. Any object that pickles."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Waits for rank 0."""
        self.broadcast(None)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        parts = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank; one byte is sent, so that it can be called at every step."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)


def init_distributed(device: torch.device) -> Ranks:
    """Joins torchrun's other processes, if there are any. CPU tensors use gloo, also beside NCCL."""
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if ranks.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        options: dict[str, Any] = (
            {"store": _restart_store(), "rank": ranks.rank, "world_size": ranks.world_size} if _under_torchrun() else {}
        )
        dist.init_process_group(backend, timeout=TIMEOUT, **options)
    return ranks


def _under_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _restart_store() -> dist.Store:
    """torchrun's store with keys of this attempt: it outlives a restart, with the addresses of dead processes in it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=10))
    return dist.PrefixStore(f"attempt/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def new_gloo_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """A CPU group for a thread that communicates while others do; None for a single process."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks.world_size > 1 else None


def new_all_gather(ranks: Ranks) -> Callable[[Any], list[Any]]:
    """``Ranks.all_gather`` for another thread than the training one, in a group of its own."""
    group = new_gloo_group(ranks)

    def all_gather(value: Any) -> list[Any]:
        if group is None:
            return [value]
        parts = [None] * ranks.world_size
        dist.all_gather_object(parts, value, group=group)
        return parts

    return all_gather
