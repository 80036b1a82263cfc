"""Scales of quantised weights that suit what a layer reads, found on prompts and the model's own answers to them, and
how far off they leave its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer.requests.request import Generation
from phi4rv.batch import pack
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.low_precision import GROUP_SIZE, QuantizedWeight, dequantize, quantize, slice_weight
from phi4rv.processing.processor import Processor
from phi4rv.quantization.quantized_linear import CHUNK_ROWS, layers_to_quantize, quantize_in_chunks

# Factors of a scale that are tried: AWQ's range (Lin et al. 2023, whose search clips by the same criterion).
FACTORS = tuple(1 - 0.05 * i for i in range(11))
KEPT_ROWS = 64  # of a layer's inputs, to measure its output on
LOGIT_ROWS = 32  # of a prompt and its answer, the last ones, whose logits are compared


class Inputs:
    """What a layer read: the summed products of its columns in each group of GROUP, (G, GROUP, GROUP) float32, and some
    of its rows (M, K).
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.products = torch.zeros(-(-columns // GROUP_SIZE), GROUP_SIZE, GROUP_SIZE, device=device)
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """More rows (T, K)."""
        groups = in_groups(x.float()).transpose(0, 1)
        self.products += groups.mT @ groups
        kept = sum(map(len, self.rows))
        step = -(-len(x) // 8)  # few of each prompt
        self.rows.append(x[::step][: KEPT_ROWS - kept].clone())


def in_groups(x: Tensor) -> Tensor:
    """(R, K) -> (R, G, GROUP), the last group filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE))


def observe(
    model: Phi4RV, processor: Processor, answered: Sequence[Generation], formats: Mapping[str, str]
) -> dict[str, Inputs]:
    """Our path -> what the layer read, of those that ``formats`` names, while the model ran the prompts and answers."""
    seen: dict[str, Inputs] = {}

    def look(name: str, layer: nn.Module, given: tuple[Tensor]) -> None:
        (x,) = given
        seen.setdefault(name, Inputs(x.shape[-1], x.device)).add(x)

    layers = {name: model.get_submodule(name) for name in layers_to_quantize(model, formats)}
    hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    try:
        logits_of(model, processor, answered)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.no_grad()
def logits_of(model: Phi4RV, processor: Processor, answered: Sequence[Generation]) -> Tensor:
    """(R, V) float32 on the CPU: of the last LOGIT_ROWS tokens of each prompt with its answer behind it."""
    found = []
    for generation in answered:
        sample = processor.encode(generation.prompt)
        ids = torch.cat([sample.input_ids, torch.tensor(generation.token_ids, dtype=torch.int64)])
        hidden = model.hidden(pack([replace(sample, input_ids=ids)]).to(model.device))
        found.append(model.decoder.logits(hidden[-LOGIT_ROWS:]).cpu())
    return torch.cat(found)


def calibrated(weight: Tensor, format: str, products: Tensor) -> QuantizedWeight:
    """``quantize`` with the one of FACTORS for each scale that leaves the least ``scale_errors``.

    weight (N, K); products: ``Inputs.products`` of the layer.
    """
    shrinks = []
    for block in weight.split(CHUNK_ROWS):
        errors = torch.stack([scale_errors(block, _shrunk(block, format, f), products) for f in FACTORS])
        shrinks.append(errors.new_tensor(FACTORS)[errors.argmin(0)])
    return quantize_in_chunks(weight, format, torch.cat(shrinks))


def scale_errors(weight: Tensor, quantized: QuantizedWeight, products: Tensor) -> Tensor:
    """The squared error of the output, summed over the inputs, that the weights of each scale make: (N,) or, in int4,
    (N, G), float32. What the errors of two groups have in common is left out.
    """
    off = in_groups(weight.float() - dequantize(quantized, torch.float32)).transpose(0, 1)
    errors = ((off @ products) * off).sum(2).T
    return errors.sum(1) if quantized.scales.ndim == 1 else errors


def _shrunk(weight: Tensor, format: str, factor: float) -> QuantizedWeight:
    groups = -(-weight.shape[1] // GROUP_SIZE)
    shape = (len(weight), groups) if format.startswith("int4") else (len(weight),)
    return quantize(weight, format, torch.full(shape, factor, device=weight.device))


@dataclass(frozen=True)
class LayerError:
    """How far a quantised layer is off, relative by Euclidean norm: its weight, and its output on ``Inputs.rows``."""

    layer: str
    format: str
    weight_error: float
    output_error: float


def layer_error(path: str, weight: Tensor, quantized: QuantizedWeight, rows: Tensor) -> LayerError:
    """Of the layer with published ``path``; the bias, which both have, is left out."""
    off = total = off_output = total_output = 0.0
    rows = rows.float()
    for start in range(0, len(weight), CHUNK_ROWS):
        w = weight[start : start + CHUNK_ROWS].float()
        d = w - dequantize(slice_weight(quantized, 0, start, start + len(w)), torch.float32)
        off, total = off + float(d.square().sum()), total + float(w.square().sum())
        off_output += float((rows @ d.T).square().sum())
        total_output += float((rows @ w.T).square().sum())
    ratios = [(x / y) ** 0.5 if y else 0.0 for x, y in ((off, total), (off_output, total_output))]
    return LayerError(path, quantized.format, *ratios)


def logits_error(given: Tensor, right: Tensor) -> dict[str, float]:
    """Of (R, V) logits: ``relative`` by Euclidean norm, mean ``kl`` of the right distribution from the given one in
    nats, and the share of rows whose largest logit is the same.
    """
    kl = F.kl_div(given.log_softmax(1), right.log_softmax(1), log_target=True, reduction="batchmean")
    return {
        "relative": float((given - right).norm() / right.norm()),
        "kl": float(kl),
        "same_first": float((given.argmax(1) == right.argmax(1)).float().mean()),
    }
