"""Full fine-tuning in little memory: each weight is updated inside the backward pass, as soon as its gradient is there.

No two gradients exist at once (LOMO, Lv et al. 2023); the moments take 8 bits each, and bfloat16 weights are rounded
stochastically in place of float32 masters: 4 bytes a parameter and 1/32 for scales. What that costs: a step is one
packed sequence on one process, as gradients cannot be accumulated; and the gradient's global norm is known only when
everything is updated, so that clipping by it takes a backward pass before, or is replaced by what ``_clip_factor``
does.
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
SLICE_ELEMENTS = 1 << 24


class LayerwiseAdamW:
    """AdamW inside the backward pass. ``params``: name -> parameter, float32 or bfloat16. A step is ``begin_step``, one
    backward pass, ``finish_step``. ``seed``: of the stochastic rounding.
    """

    def __init__(self, params: dict[str, nn.Parameter], stage: Stage, ops: Operations, seed: int):
        self.params, self.stage, self.ops = params, stage, ops
        self.steps = 0
        self.skipped = 0  # of these: skipped ones
        self.norm = torch.zeros((), dtype=torch.float64)  # of the last pass's gradient
        self.exp_avg = {n: Moment8.zeros(p.numel(), p.device) for n, p in params.items()}
        self.exp_avg_sq = {n: Moment8.zeros(p.numel(), p.device) for n, p in params.items()}
        self.seeds: dict[str, list[int]] = {}  # one a slice: a shared seed would correlate the roundings
        number = 0
        for name, parameter in params.items():
            slices = math.ceil(parameter.numel() / SLICE_ELEMENTS)
            self.seeds[name] = [hash32(hash32(seed) ^ i) for i in range(number, number + slices)]
            number += slices
            parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, name))
        self._pending: set[str] = set()

    def begin_step(self, lr: float, labelled: int, norm_only: bool = False) -> None:
        """Call before the backward pass of a loss summed over ``labelled`` tokens; gradients are divided by them.

        ``norm_only``: no update; the pass only measures the gradient's norm, by which the next pass is clipped.
        """
        self._lr, self._labelled, self._norm_only = lr, labelled, norm_only
        self._pending, self._squared_norm = set(self.params), 0.0

    def finish_step(self) -> float:
        """Call after it. Parameters without a gradient are updated with zero. Returns the gradient's global norm."""
        for name in [name for name in self.params if name in self._pending and not self._norm_only]:
            self._update(name, None, 0.0)
        self._pending.clear()
        self.steps += not self._norm_only
        self.norm.fill_(math.sqrt(self._squared_norm))
        return float(self.norm)

    def skip(self) -> None:
        """Counts a skipped step. The next one measures its norm first."""
        self.steps += 1
        self.skipped += 1
        self.norm.zero_()

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        """Hook of autograd, for a gradient that is complete: updates the parameter, and frees the gradient."""
        gradient, parameter.grad = parameter.grad, None
        if name not in self._pending:
            raise RuntimeError(f"{name}: a backward pass outside of begin_step and finish_step, or a second one inside")
        assert gradient is not None
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float32)) / self._labelled
        if not math.isfinite(norm) and not self._norm_only:
            raise UserError(
                f"step {self.steps + 1}: the norm of {name}'s gradient is {norm}, and a part of the weights is updated "
                "already: continue with --resume from the last save, with a lower --lr"
            )
        self._pending.discard(name)
        factor = self._clip_factor(norm)
        if not self._norm_only:
            self._update(name, gradient, factor / self._labelled)

    def _clip_factor(self, norm: float) -> float:
        """``stage.clip`` over the last pass's global norm, or over the norm of this pass's gradients so far, this one
        included, whichever is larger; at most 1.

        If ``stage.clipping`` is exact, the last pass was ``norm_only`` of the same loss, and this is clipping by the
        global norm. If it is delayed, the last pass is the last step's, which does not foresee a sudden spike; still no
        tensor has a norm over ``stage.clip``, nor all of them one over clip · sqrt(1 + ln(S / s)), S and s being the
        squared norms of all and of the first. The step after a spike is clipped too much, which hardly affects Adam.
        """
        self._squared_norm += norm * norm
        norm = max(float(self.norm), math.sqrt(self._squared_norm))
        return min(1.0, self.stage.clip / norm) if norm else 1.0

    @torch.no_grad()
    def _update(self, name: str, gradient: Tensor | None, factor: float) -> None:
        parameter = self.params[name]
        decay = self.stage.weight_decay if parameter.ndim >= 2 else 0.0
        number = self.steps - self.skipped + 1
        betas = (self.stage.beta1, self.stage.beta2)
        weights = parameter.detach().view(-1).split(SLICE_ELEMENTS)
        gradients = [None] * len(weights) if gradient is None else gradient.reshape(-1).split(SLICE_ELEMENTS)
        moments = zip(_slices(self.exp_avg[name]), _slices(self.exp_avg_sq[name]), strict=True)
        for w, g, (first, second), seed in zip(weights, gradients, moments, self.seeds[name], strict=True):
            g = torch.zeros_like(w) if g is None else g
            self.ops.adamw(w, g, first, second, number, self._lr, betas, EPS, decay, factor, seed=seed)

    def state_dict(self) -> dict[str, Tensor]:
        """Codes and scales of the moments by ``kind/part/name``, and the last norm."""
        kinds = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        state = {f"{kind}/codes/{n}": m.codes for kind, moments in kinds.items() for n, m in moments.items()}
        state |= {f"{kind}/scales/{n}": m.scales for kind, moments in kinds.items() for n, m in moments.items()}
        return state | {"norm": self.norm}

    def load_state_dict(self, state: dict[str, Tensor], steps: int, skipped: int = 0) -> None:
        """The inverse of ``state_dict``; the tensors are copied in. KeyError if one is missing."""
        self.steps, self.skipped = steps, skipped
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def _slices(moment: Moment8) -> list[Moment8]:
    """Views of SLICE_ELEMENTS elements each."""
    parts = zip(moment.codes.split(SLICE_ELEMENTS), moment.scales.split(SLICE_ELEMENTS // MOMENT_BLOCK), strict=True)
    return [Moment8(codes, scales) for codes, scales in parts]
