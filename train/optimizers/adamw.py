"""AdamW with float32 masters, plain or sharded; learning-rate schedules; gradient accumulation over rows and ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phi4rv.ops.registry import Operations
from train.distributed.fsdp import to_local
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


class AdamW:
    """AdamW over the trained parameters. ``params``: name -> parameter, of any float dtype.

    A float32 parameter is its own master; any other has a float32 master, from which it is rounded after each step.
    ``accumulate`` sums gradients in float32; they are sums, not means, until ``step`` divides them.
    """

    def __init__(self, params: dict[str, nn.Parameter], stage: Stage, ops: Operations):
        self.params, self.stage, self.ops = params, stage, ops
        self.steps = 0  # of the run: the position in the data and in the schedule
        self.skipped = 0  # of these: skipped ones
        self.masters = {n: p.data if p.dtype == torch.float32 else p.data.float() for n, p in params.items()}
        self.exp_avg = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.exp_avg_sq = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        # One flat buffer: a single all-reduce, and a single reduction for the norm.
        device = next(iter(params.values())).device
        self.flat_grads = torch.zeros(sum(p.numel() for p in params.values()), device=device)
        parts = self.flat_grads.split([p.numel() for p in params.values()])
        self.grads = {n: part.view_as(p) for part, (n, p) in zip(parts, params.items(), strict=True)}

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
        norm = self._reduce_grads() / labelled
        if not math.isfinite(norm):
            self.skip()
            return norm
        factor = min(1.0, self.stage.clip / norm if norm else 1.0) / labelled
        self.steps += 1
        updates = self.steps - self.skipped
        copies = self._separate_masters()
        for name, master in self.masters.items():
            decay = self.stage.weight_decay if master.ndim >= 2 else 0.0
            betas = (self.stage.beta1, self.stage.beta2)
            moments = self.exp_avg[name], self.exp_avg_sq[name]
            copy = self.params[name].data if name in copies else None
            if master.numel():  # a rank's shard of a short vector may be empty
                self.ops.adamw(master, self.grads[name], *moments, updates, lr, betas, EPS, decay, factor, copy)
        self._zero_grad()
        return norm

    def skip(self) -> None:
        """Counts a step and drops its gradients; weights, masters and moments stay as they are."""
        self._zero_grad()
        self.steps += 1
        self.skipped += 1

    def _reduce_grads(self) -> float:
        """Sums ``grads`` over the ranks; returns the global norm."""
        if dist.is_initialized():
            dist.all_reduce(self.flat_grads)
        return float(self.flat_grads.norm())

    def _zero_grad(self) -> None:
        self.flat_grads.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments, and the masters that are not the parameters themselves, by ``kind/name``."""
        state = {f"exp_avg/{n}": t for n, t in self.exp_avg.items()}
        state |= {f"exp_avg_sq/{n}": t for n, t in self.exp_avg_sq.items()}
        return state | {f"master/{n}": m for n, m in self._separate_masters().items()}

    def load_state_dict(self, state: dict[str, Tensor], steps: int, skipped: int = 0) -> None:
        """The inverse of ``state_dict``; the tensors are copied in, and parameters rounded from their masters.

        KeyError if one is missing.
        """
        self.steps, self.skipped = steps, skipped
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        for name, master in self._separate_masters().items():
            self.params[name].data.copy_(master)

    def _separate_masters(self) -> dict[str, Tensor]:
        return {n: m for n, m in self.masters.items() if m.data_ptr() != self.params[n].data_ptr()}


class ShardedAdamW(AdamW):
    """AdamW for a model that ``fsdp.parallelize`` has sharded: each rank updates its shards.

    The parameters are float32 and their own masters; FSDP2 has summed their ``.grad`` over rows and ranks.
    """

    def __init__(self, params: dict[str, nn.Parameter], stage: Stage, ops: Operations):
        self.params, self.stage, self.ops = params, stage, ops
        self.steps = self.skipped = 0
        self.sharded_moments = {
            kind: {n: torch.zeros_like(p.detach()) for n, p in params.items()} for kind in ("exp_avg", "exp_avg_sq")
        }
        self.masters = {n: to_local(p.detach()) for n, p in self.params.items()}
        self.exp_avg, self.exp_avg_sq = (
            {n: to_local(t) for n, t in self.sharded_moments[kind].items()} for kind in ("exp_avg", "exp_avg_sq")
        )

    def accumulate(self) -> None:
        """Nothing: the sums are in the parameters' ``.grad``."""

    def _reduce_grads(self) -> float:
        self.grads = {
            n: torch.zeros_like(to_local(p.detach())) if p.grad is None else to_local(p.grad)
            for n, p in self.params.items()
        }
        mesh = next(iter(self.params.values())).device_mesh  # type: ignore[attr-defined]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in self.grads.values()]
        total = torch.stack(norms).square().sum()
        dist.all_reduce(total, group=mesh.get_group("shard"))
        if "replicate" in mesh.mesh_dim_names:
            # Replicas have the same gradients, but may sum them in another order: the last bit may differ.
            dist.all_reduce(total, dist.ReduceOp.MAX, group=mesh.get_group("replicate"))
        return math.sqrt(float(total))

    def _zero_grad(self) -> None:
        for parameter in self.params.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{kind}/{n}": t for kind, moments in self.sharded_moments.items() for n, t in moments.items()}

    def _separate_masters(self) -> dict[str, Tensor]:
        return {}
