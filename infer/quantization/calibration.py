"""Calibration: scales of quantised weights that fit a layer's inputs, collected on prompts and the model's own answers
to them, and the error that is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer.requests.outputs import Generation
from phi4rv.batch import pack
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.low_precision import GROUP_SIZE, QuantizedWeight, dequantize, quantize, slice_weight
from phi4rv.processing.processor import Processor
from phi4rv.quantization.quantized_linear import CHUNK_ROWS, layers_to_quantize, quantize_in_chunks

# Factors of a scale that are searched: AWQ's range (Lin et al. 2023, whose clipping search has the same criterion).
SCALE_FACTORS = tuple(1 - 0.05 * i for i in range(11))
KEPT_ROWS = 64  # of a layer's inputs, to measure its output on
LOGIT_ROWS = 32  # of a prompt and its answer, the last ones, whose logits are compared


class LayerInputs:
    """A layer's inputs: their Gram matrix in each group of GROUP columns, (G, GROUP, GROUP) float32, and some of their
    rows (M, K).
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(-(-columns // GROUP_SIZE), GROUP_SIZE, GROUP_SIZE, device=device)
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Adds rows (T, K)."""
        groups = split_groups(x.float()).transpose(0, 1)
        self.gram += groups.mT @ groups
        kept = sum(map(len, self.rows))
        step = -(-len(x) // 8)  # few of each prompt
        self.rows.append(x[::step][: KEPT_ROWS - kept].clone())


def split_groups(x: Tensor) -> Tensor:
    """(R, K) -> (R, G, GROUP), the last group padded with zeros."""
    return F.pad(x, (0, -x.shape[1] % GROUP_SIZE)).unflatten(1, (-1, GROUP_SIZE))


def collect_inputs(
    model: Phi4RV, processor: Processor, generations: Sequence[Generation], formats: Mapping[str, str]
) -> dict[str, LayerInputs]:
    """Our path -> the inputs of each layer that ``formats`` names, on the prompts and answers."""
    inputs: dict[str, LayerInputs] = {}

    def collect(name: str, layer: nn.Module, given: tuple[Tensor]) -> None:
        (x,) = given
        inputs.setdefault(name, LayerInputs(x.shape[-1], x.device)).add(x)

    layers = {name: model.get_submodule(name) for name in layers_to_quantize(model, formats)}
    hooks = [layer.register_forward_pre_hook(partial(collect, name)) for name, layer in layers.items()]
    try:
        compute_logits(model, processor, generations)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@torch.no_grad()
def compute_logits(model: Phi4RV, processor: Processor, generations: Sequence[Generation]) -> Tensor:
    """(R, V) float32 on the CPU: of the last LOGIT_ROWS tokens of each prompt and its answer."""
    found = []
    for generation in generations:
        sample = processor.encode(generation.prompt)
        ids = torch.cat([sample.input_ids, torch.tensor(generation.token_ids, dtype=torch.int64)])
        hidden = model.hidden(pack([replace(sample, input_ids=ids)]).to(model.device))
        found.append(model.decoder.logits(hidden[-LOGIT_ROWS:]).cpu())
    return torch.cat(found)


def quantize_calibrated(weight: Tensor, format: str, gram: Tensor) -> QuantizedWeight:
    """``quantize`` with the one of SCALE_FACTORS for each scale that leaves the least ``scale_errors``.

    weight (N, K); gram: ``LayerInputs.gram`` of the layer.
    """
    factors = []
    for block in weight.split(CHUNK_ROWS):
        errors = torch.stack([scale_errors(block, _quantize_scaled(block, format, f), gram) for f in SCALE_FACTORS])
        factors.append(errors.new_tensor(SCALE_FACTORS)[errors.argmin(0)])
    return quantize_in_chunks(weight, format, torch.cat(factors))


def scale_errors(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> Tensor:
    """The squared error of the output, summed over the inputs, due to the weights of each scale: (N,) or, in int4,
    (N, G), float32. Correlations between groups are left out.
    """
    error = split_groups(weight.float() - dequantize(quantized, torch.float32)).transpose(0, 1)
    errors = ((error @ gram) * error).sum(2).T
    return errors.sum(1) if quantized.scales.ndim == 1 else errors


def _quantize_scaled(weight: Tensor, format: str, factor: float) -> QuantizedWeight:
    groups = -(-weight.shape[1] // GROUP_SIZE)
    shape = (len(weight), groups) if format.startswith("int4") else (len(weight),)
    return quantize(weight, format, torch.full(shape, factor, device=weight.device))


@dataclass(frozen=True)
class LayerError:
    """Relative errors of a quantised layer, by Euclidean norm: of its weight, and of its output on some inputs."""

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
