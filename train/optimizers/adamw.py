"""AdamW on float32 masters, whole or sharded, the learning-rate schedules, and gradients summed over rows and ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phi4rv.ops.registry import Operations
from train.distributed.fsdp import local
from train.recipe import Stage

EPS = 1e-8


def learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Rate of step ``step`` (from 0) of ``steps``: linear warm-up, then cosine from lr to min_lr_ratio · lr."""
    warmup = math.ceil(stage.warmup * steps) if stage.warmup < 1 else int(stage.warmup)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.lr
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    ratio = stage.min_lr_ratio + (1 - stage.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return stage.lr * ratio


class Optimizer:
    """AdamW over the parameters that train. ``named``: name -> parameter, of any float dtype.

    A float32 parameter is its own master; another has a float32 copy that it is rounded from after each step.
    Gradients are summed in float32 by ``accumulate`` and are the sums, not means, until ``step`` divides them.
    """

    def __init__(self, named: dict[str, nn.Parameter], stage: Stage, ops: Operations):
        self.params, self.stage, self.ops = named, stage, ops
        self.steps = 0  # of the run: the data's and the schedule's position
        self.skipped = 0  # those of them that changed nothing
        self.masters = {n: p.data if p.dtype == torch.float32 else p.data.float() for n, p in named.items()}
        self.exp_avg = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        # One flat buffer, so that ranks exchange it in one call and its norm is one reduction.
        self.flat = torch.zeros(sum(p.numel() for p in named.values()), device=next(iter(named.values())).device)
        parts = self.flat.split([p.numel() for p in named.values()])
        self.grads = {n: part.view_as(p) for part, (n, p) in zip(parts, named.items(), strict=True)}

    def accumulate(self) -> None:
        """Adds each parameter's ``.grad`` to its float32 sum and clears it. None counts as zero."""
        for name, parameter in self.params.items():
            if parameter.grad is not None:
                self.grads[name].add_(parameter.grad)
                parameter.grad = None

    def step(self, lr: float, labelled: int) -> float:
        """Sums over ranks, divides by ``labelled`` (tokens of the global batch), clips, updates.

        Returns the gradient's global norm before clipping. If it is not finite, on all ranks alike, the step is
        skipped.
        """
        norm = self._summed() / labelled
        if not math.isfinite(norm):
            self.skip()
            return norm
        factor = min(1.0, self.stage.clip / norm if norm else 1.0) / labelled
        self.steps += 1
        updates = self.steps - self.skipped
        copies = self._copies()
        for name, master in self.masters.items():
            decay = self.stage.weight_decay if master.ndim >= 2 else 0.0
            betas = (self.stage.beta1, self.stage.beta2)
            moments = self.exp_avg[name], self.exp_avg_sq[name]
            copy = self.params[name].data if name in copies else None
            if master.numel():  # of a short vector a rank may hold nothing
                self.ops.adamw(master, self.grads[name], *moments, updates, lr, betas, EPS, decay, factor, copy)
        self._clear()
        return norm

    def skip(self) -> None:
        """Counts a step and forgets its gradients; weights, masters and moments stay as they are."""
        self._clear()
        self.steps += 1
        self.skipped += 1

    def _summed(self) -> float:
        """Leaves the gradients' sum over all ranks in ``grads``; its global norm."""
        if dist.is_initialized():
            dist.all_reduce(self.flat)
        return float(self.flat.norm())

    def _clear(self) -> None:
        self.flat.zero_()

    def state(self) -> dict[str, Tensor]:
        """Moments, and the masters that are not the parameters themselves, by ``kind/name``."""
        state = {f"exp_avg/{n}": t for n, t in self.exp_avg.items()}
        state |= {f"exp_avg_sq/{n}": t for n, t in self.exp_avg_sq.items()}
        return state | {f"master/{n}": m for n, m in self._copies().items()}

    def load_state(self, state: dict[str, Tensor], steps: int, skipped: int = 0) -> None:
        """The inverse of ``state``; the tensors are copied in, and parameters rounded from their masters.

        KeyError if one is missing.
        """
        self.steps, self.skipped = steps, skipped
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        for name, master in self._copies().items():
            self.params[name].data.copy_(master)

    def _copies(self) -> dict[str, Tensor]:
        return {n: m for n, m in self.masters.items() if m.data_ptr() != self.params[n].data_ptr()}


class ShardedOptimizer(Optimizer):
    """The same for a model that ``parallel.parallelize`` has cut up: each rank updates the rows that it holds.

    The parameters are float32 and their own masters; FSDP2 has summed their ``.grad`` over rows and ranks.
    """

    def __init__(self, named: dict[str, nn.Parameter], stage: Stage, ops: Operations):
        self.params, self.stage, self.ops = named, stage, ops
        self.steps = self.skipped = 0
        self.sharded = {
            kind: {n: torch.zeros_like(p.detach()) for n, p in named.items()} for kind in ("exp_avg", "exp_avg_sq")
        }
        self.masters = {n: local(p.detach()) for n, p in self.params.items()}
        self.exp_avg, self.exp_avg_sq = (
            {n: local(t) for n, t in self.sharded[kind].items()} for kind in ("exp_avg", "exp_avg_sq")
        )

    def accumulate(self) -> None:
        """Nothing: the sums are in the parameters' ``.grad``."""

    def _summed(self) -> float:
        self.grads = {
            n: torch.zeros_like(local(p.detach())) if p.grad is None else local(p.grad) for n, p in self.params.items()
        }
        mesh = next(iter(self.params.values())).device_mesh  # type: ignore[attr-defined]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.grads.values()]
        total = torch.stack(norms).square().sum()
        dist.all_reduce(total, group=mesh.get_group("shard"))
        if "replicate" in mesh.mesh_dim_names:
            # Copies hold the same gradients; their sums, in another order, may differ in the last bit.
            dist.all_reduce(total, dist.ReduceOp.MAX, group=mesh.get_group("replicate"))
        return math.sqrt(float(total))

    def _clear(self) -> None:
        for parameter in self.params.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        return {f"{kind}/{n}": t for kind, moments in self.sharded.items() for n, t in moments.items()}

    def _copies(self) -> dict[str, Tensor]:
        return {}
