"""Training the decoder's linear layers with products in fp8 (e4m3), weights and their updates as they are."""

from __future__ import annotations

from torch import Tensor, nn

from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.registry import Operations

MULTIPLE = 16  # of both widths, for the library's product


class Float8Linear(nn.Linear):
    """``nn.Linear`` without bias that multiplies by ``ops.fp8_linear``. Parameter, name and file stay the same."""

    def __init__(self, layer: nn.Linear, ops: Operations):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.ops = layer.weight, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.fp8_linear(x, self.weight)


def convert_to_float8_training(model: Phi4RV) -> None:
    """Replaces the linear layers of the decoder's layers, nine tenths of the model; tower, projector, embeddings and
    output layer stay. UserError naming a layer whose widths do not suit.
    """
    found = [(n, m) for n, m in model.decoder.layers.named_modules() if isinstance(m, nn.Linear)]
    for name, layer in found:
        if any(n % MULTIPLE for n in layer.weight.shape):
            shape = " x ".join(map(str, layer.weight.shape))
            raise UserError(f"--linear: fp8 needs widths that are multiples of {MULTIPLE}, layers.{name} is {shape}")
    for name, layer in found:
        model.decoder.layers.set_submodule(name, Float8Linear(layer, model.ops))
