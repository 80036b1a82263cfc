"""The next token from a row of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phi4rv.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 keep every token. The same seed gives the same tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature: {self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"--top-k: {self.top_k} must be 0 (every token) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed: {self.seed} must be in [0, 2^63)")


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """logits (V,) float32 -> token id. Temperature first, then the top_k, then the top_p of what they leave.

    top_p keeps the smallest set of most probable tokens whose mass reaches it (Holtzman et al. 2020).
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    # In float64, and from the largest down: neither a tiny temperature nor a long tail may round to nothing.
    below = (logits - logits.max()).double() / sampling.temperature
    values, order = below.sort(descending=True, stable=True)
    if sampling.top_k:
        values, order = values[: sampling.top_k], order[: sampling.top_k]
    probabilities = values.softmax(0)
    if sampling.top_p < 1:
        before = probabilities.cumsum(0) - probabilities
        # The first has 0 before it and stays.
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
