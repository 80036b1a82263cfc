"""Full fine-tuning in little memory: each weight is updated inside the backward pass, as soon as its gradient is there.

No two gradients exist at once (LOMO, Lv et al. 2023); the moments take 8 bits each, and bfloat16 weights are rounded
stochastically in place of float32 masters: 4 bytes a parameter and 1/32 for scales. What that costs: a step is one
packed sequence on one process, as nothing is there to add up gradients in; and the gradient's global norm is known only
when everything is updated, so that clipping by it takes a backward pass before, or is replaced by what ``_clip`` does.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from phi4rv.errors import UserError
from phi4rv.ops.low_precision import MOMENT_BLOCK, Moment8, hash32
from phi4rv.ops.registry import Operations
from train.optimizers.adamw import EPS
from train.recipe import Stage

# Elements updated in one call, so that its working memory does not grow with the tensor. A multiple of the moments'
# block; another number would draw other roundings.
SLICE = 1 << 24


class Layerwise:
    """AdamW inside the backward pass over ``named``: name -> parameter, float32 or bfloat16. ``begin``, one backward
    pass, ``finish`` are a step. ``seed`` draws the roundings.
    """

    def __init__(self, named: dict[str, nn.Parameter], stage: Stage, ops: Operations, seed: int):
        self.params, self.stage, self.ops = named, stage, ops
        self.steps = 0
        self.skipped = 0  # those of them that changed nothing
        self.norm = torch.zeros((), dtype=torch.float64)  # of the last pass's gradient
        self.exp_avg = {n: Moment8.zeros(p.numel(), p.device) for n, p in named.items()}
        self.exp_avg_sq = {n: Moment8.zeros(p.numel(), p.device) for n, p in named.items()}
        self.seeds: dict[str, list[int]] = {}  # of each slice: sharing one would make roundings alike
        number = 0
        for name, parameter in named.items():
            slices = math.ceil(parameter.numel() / SLICE)
            self.seeds[name] = [hash32(hash32(seed) ^ i) for i in range(number, number + slices)]
            number += slices
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))
        self._waiting: set[str] = set()

    def begin(self, lr: float, labelled: int, measure: bool = False) -> None:
        """Before the backward pass of a loss summed over ``labelled`` tokens, by which gradients are divided.

        ``measure``: no step; the pass only leaves its gradient's norm for the next one to be clipped by.
        """
        self._lr, self._labelled, self._measure = lr, labelled, measure
        self._waiting, self._squares = set(self.params), 0.0

    def finish(self) -> float:
        """After it: parameters that got no gradient count it as zero. Returns the gradient's global norm."""
        for name in [name for name in self.params if name in self._waiting and not self._measure]:
            self._update(name, None, 0.0)
        self._waiting.clear()
        self.steps += not self._measure
        self.norm.fill_(math.sqrt(self._squares))
        return float(self.norm)

    def skip(self) -> None:
        """Counts a step that changed nothing. The next one's norm is measured first."""
        self.steps += 1
        self.skipped += 1
        self.norm.zero_()

    def _arrived(self, name: str, parameter: Tensor) -> None:
        """Autograd calls it with a gradient that is complete: updates, and frees it."""
        gradient, parameter.grad = parameter.grad, None
        if name not in self._waiting:
            raise RuntimeError(f"{name}: a backward pass outside of begin and finish, or a second one inside")
        assert gradient is not None
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) / self._labelled
        if not math.isfinite(norm) and not self._measure:
            raise UserError(
                f"step {self.steps + 1}: the norm of {name}'s gradient is {norm}, and a part of the weights is updated "
                "already: go on with --resume from the last save, with a lower --lr"
            )
        self._waiting.discard(name)
        factor = self._clip(norm)
        if not self._measure:
            self._update(name, gradient, factor / self._labelled)

    def _clip(self, norm: float) -> float:
        """``stage.clip`` over the last pass's global norm, or over the norm of all that this pass has brought so far,
        this gradient included, whichever is larger; at most 1.

        Where ``stage.clipping`` is exact, the last pass is a measuring one of the same loss, and this is clipping by
        the global norm. ``delayed``, it is the last step's, which says nothing of a sudden spike; that still leaves no
        tensor with a norm over ``stage.clip``, nor all of them with one over clip · sqrt(1 + ln(S / s)), S and s being
        the squared norms of all and of the first. After it one step is clipped too much, which Adam hardly sees.
        """
        self._squares += norm * norm
        known = max(float(self.norm), math.sqrt(self._squares))
        return min(1.0, self.stage.clip / known) if known else 1.0

    @torch.no_grad()
    def _update(self, name: str, gradient: Tensor | None, factor: float) -> None:
        parameter = self.params[name]
        decay = self.stage.weight_decay if parameter.ndim >= 2 else 0.0
        number = self.steps - self.skipped + 1
        betas = (self.stage.beta1, self.stage.beta2)
        weights = parameter.detach().view(-1).split(SLICE)
        gradients = [None] * len(weights) if gradient is None else gradient.reshape(-1).split(SLICE)
        moments = zip(_slices(self.exp_avg[name]), _slices(self.exp_avg_sq[name]), strict=True)
        for w, g, (first, second), seed in zip(weights, gradients, moments, self.seeds[name], strict=True):
            g = torch.zeros_like(w) if g is None else g
            self.ops.adamw(w, g, first, second, number, self._lr, betas, EPS, decay, factor, seed=seed)

    def state(self) -> dict[str, Tensor]:
        """Codes and scales of the moments by ``kind/part/name``, and the last norm."""
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        state = {f"{kind}/codes/{n}": m.codes for kind, moments in kinds.items() for n, m in moments.items()}
        state |= {f"{kind}/scales/{n}": m.scales for kind, moments in kinds.items() for n, m in moments.items()}
        return state | {"norm": self.norm}

    def load_state(self, state: dict[str, Tensor], steps: int, skipped: int = 0) -> None:
        """The inverse of ``state``; the tensors are copied in. KeyError if one is missing."""
        self.steps, self.skipped = steps, skipped
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _slices(moment: Moment8) -> list[Moment8]:
    """Views of a moment by SLICE elements."""
    parts = zip(moment.codes.split(SLICE), moment.scales.split(SLICE // MOMENT_BLOCK), strict=True)
    return [Moment8(codes, scales) for codes, scales in parts]
