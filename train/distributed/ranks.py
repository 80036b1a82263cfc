"""The processes of a run, and what they tell each other beside gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A process waits for the others while the first draws data, saves and measures; one that died is found by Watch.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """The first rank's ``value``, on all of them; every rank waits here for it."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Each rank's ``value``, on all of them."""
        if self.world == 1:
            return [value]
        parts = [None] * self.world
        dist.all_gather_object(parts, value)
        return parts

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; a message of one byte, so that every step can ask."""
        if self.world == 1:
            return flag
        said = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)


def join_ranks(device: torch.device) -> Ranks:
    """Joins torchrun's other processes, if there are any. gloo serves what lies on the CPU, also beside NCCL."""
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if ranks.world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        own: dict[str, Any] = (
            {"store": _attempt_store(), "rank": ranks.rank, "world_size": ranks.world} if _under_agent() else {}
        )
        dist.init_process_group(backend, timeout=PATIENCE, **own)
    return ranks


def _under_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _attempt_store() -> dist.Store:
    """torchrun's store under names of this attempt: it outlives a restart, and the addresses of the dead with it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=10))
    return dist.PrefixStore(f"attempt/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def own_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """A group on the CPU for a thread that exchanges while others do; None for a single process."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.world > 1 else None


def gatherer(ranks: Ranks) -> Callable[[Any], list[Any]]:
    """``Ranks.gather`` for another thread than the training one: with a group of its own."""
    group = own_group(ranks)

    def gather(value: Any) -> list[Any]:
        if group is None:
            return [value]
        parts = [None] * ranks.world
        dist.all_gather_object(parts, value, group=group)
        return parts

    return gather
