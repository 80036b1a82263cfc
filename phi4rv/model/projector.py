"""Vision features into the language model's embedding space (LLaVA's ``mlp2x_gelu``)."""

from __future__ import annotations

from torch import Tensor, nn

from phi4rv.config import Config
from phi4rv.ops.registry import Operations


class Projector(nn.Sequential):
    """Linear, exact GELU, Linear; an ``nn.Sequential`` because the checkpoint names its layers 0 and 2."""

    def __init__(self, config: Config, ops: Operations):
        wide, hidden = config.vision.hidden_size, config.hidden_size
        super().__init__(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.ops = ops

    def forward(self, features: Tensor) -> Tensor:
        """(P, Cv) -> (P, C)."""
        return self.ops.projector(features, *self._weights())

    def project_into(self, row: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        """row (T, C) with the projected patches (P, C) at ``positions`` (P,)."""
        return self.ops.project_into(row, features, *self._weights(), positions)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[0].weight, self[0].bias, self[2].weight, self[2].bias  # type: ignore[return-value]
