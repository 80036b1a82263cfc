"""Linear layers in 8 and 4 bits: which ones, the layer itself, and loading without the whole model in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from phi4rv.checkpoint.huggingface import FLOAT_DTYPES, assign_parameter, hf_name, iter_tensors
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.low_precision import FORMATS, QuantizedWeight, dequantize, quantize
from phi4rv.ops.registry import Operations

# The parts whose layers may be quantised, nine tenths of the weights being the decoder's. Embeddings are looked up,
# and patch embedding and projector are given to operations as weights: these keep their dtype.
PARTS = {"decoder": "decoder.layers.", "head": "decoder.lm_head", "tower": "vision.encoder."}
CHUNK_ROWS = 4096  # of a weight that are quantised at a time: rounding needs several float32 copies


class QuantizedLinear(nn.Module):
    """``layer``, frozen, with its weight as ``quantized`` says; gradients reach its input alone."""

    def __init__(self, layer: nn.Linear, quantized: QuantizedWeight, ops: Operations):
        super().__init__()
        self.ops, self.dtype, self.bias = ops, layer.weight.dtype, layer.bias
        # No buffers: module.to(dtype) would convert the scales.
        self.quantized = quantized

    @property
    def weight(self) -> Tensor:
        """(N, K), dequantised anew each time."""
        return dequantize(self.quantized, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.quantized_linear(x, self.quantized, self.bias)


def parse_formats(spec: str, origin: str = "--weights") -> dict[str, str]:
    """Part -> format. ``int4,head=fp8``: the decoder's layers in int4, the output layer in fp8, all else as loaded.

    UserError, beginning with ``origin``, for a part or format that is unknown or given twice.
    """
    formats: dict[str, str] = {}
    for piece in spec.split(","):
        part, _, format = piece.strip().rpartition("=")
        part = part or "decoder"
        if part not in PARTS:
            raise UserError(f"{origin}: {part!r} is no part, must be one of {', '.join(PARTS)}")
        if format not in FORMATS:
            raise UserError(f"{origin}: {format!r} is unknown, must be one of {', '.join(FORMATS)} (int4,head=fp8)")
        if part in formats:
            raise UserError(f"{origin}: {part} is given twice, {formats[part]} and {format}")
        formats[part] = format
    return formats


def format_spec(formats: Mapping[str, str]) -> str:
    """What ``parse_formats`` reads."""
    return ",".join(f if part == "decoder" else f"{part}={f}" for part, f in formats.items())


def linear_layers(model: Phi4RV, used: bool = True) -> dict[str, str]:
    """Hugging Face path -> our path of each linear layer; ``used``: only those that a forward pass reads."""
    unused = {id(p) for p in model.vision.unused_parameters()} if used else set()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) or (isinstance(module, nn.Linear) and id(module.weight) not in unused)
    ]
    return {hf_name(n + ".weight").removesuffix(".weight"): n for n in found}


def layers_to_quantize(model: Phi4RV, formats: Mapping[str, str]) -> dict[str, str]:
    """Our path -> format of the layers that ``formats`` (part -> format) selects."""
    return {
        name: formats[part]
        for name in linear_layers(model).values()
        for part, prefix in PARTS.items()
        if part in formats and name.startswith(prefix)
    }


def quantize_layers(
    model: Phi4RV,
    formats: Mapping[str, str],
    quantize_fn: Callable[[str, Tensor, str], QuantizedWeight] = lambda name, weight, format: quantize(weight, format),
) -> None:
    """Replaces the layers of the parts in ``formats``, one by one, by quantised ones; on the meta device by shapes.

    quantize_fn(our path, weight, format) quantises one.
    """
    for name, format in layers_to_quantize(model, formats).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quantized = quantize_fn(name, layer.weight.detach(), format)
        model.set_submodule(name, QuantizedLinear(layer, quantized, model.ops))


def quantized_layers(model: Phi4RV) -> dict[str, QuantizedLinear]:
    """Hugging Face path -> quantised layer."""
    return {
        path: layer
        for path, name in linear_layers(model).items()
        if isinstance(layer := model.get_submodule(name), QuantizedLinear)
    }


def quantization_formats(model: Phi4RV) -> dict[str, str]:
    """Part -> format, of the parts that are quantised."""
    ours = linear_layers(model)
    found = {ours[path]: layer.quantized.format for path, layer in quantized_layers(model).items()}
    formats = {part: {f for n, f in found.items() if n.startswith(prefix)} for part, prefix in PARTS.items()}
    return {part: kinds.pop() for part, kinds in formats.items() if kinds}


@torch.no_grad()
def load_quantized_weights(
    model: Phi4RV, path: str | Path, device: torch.device | str, formats: Mapping[str, str]
) -> None:
    """As ``huggingface.load_weights``, but the layers of ``formats`` (part -> format) are quantised on ``device`` one
    by one as they are read, from the dtype in which they are stored.

    Beside the quantised model memory holds the weights that ``tensor_reader.read_tensors`` does, and float32 copies of
    CHUNK_ROWS rows.
    """
    expected = {hf_name(n): (tuple(p.shape), FLOAT_DTYPES) for n, p in model.named_parameters()}
    tensors = iter_tensors(Path(path), expected, device)
    quantize_layers(model, formats)
    names = {hf_name(n): n for n, _ in model.named_parameters()}
    layers = {path + ".weight": layer for path, layer in quantized_layers(model).items()}
    for name, tensor in tensors:
        if name in layers:
            layers[name].quantized = quantize_in_chunks(tensor, layers[name].quantized.format)
        else:
            assign_parameter(model, names[name], tensor)


def quantize_in_chunks(weight: Tensor, format: str, clip_ratio: Tensor | None = None) -> QuantizedWeight:
    """``quantize``, ROWS rows at a time."""
    ratios = [None] * -(-len(weight) // CHUNK_ROWS) if clip_ratio is None else clip_ratio.split(CHUNK_ROWS)
    chunks = [quantize(w, format, r) for w, r in zip(weight.split(CHUNK_ROWS), ratios, strict=True)]
    data, scales = (torch.cat([getattr(p, field) for p in chunks]) for field in ("data", "scales"))
    zeros = None if chunks[0].zeros is None else torch.cat([p.zeros for p in chunks if p.zeros is not None])
    return QuantizedWeight(format, data, scales, zeros, (weight.shape[0], weight.shape[1]))
