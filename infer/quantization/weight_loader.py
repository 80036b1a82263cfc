"""A model to run, from the published layout, quantised as it is read, or from a folder that holds it quantised.

A quantised folder is like a published one, but ``NAME.weight`` of a quantised layer lies there as ``NAME.weight.data``,
``.scales`` and, in int4_zero, ``.zeros`` (``quantized.QuantizedWeight``), and ``config.json`` says which parts are in
which format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi4rv.checkpoint.atomic_folder import atomic_folder
from phi4rv.checkpoint.huggingface import (
    FLOAT_DTYPES,
    assign_parameter,
    copy_if_mapped,
    empty_model,
    hf_name,
    iter_tensors,
    load_meta,
    write_config_and_processor,
    write_tensors,
)
from phi4rv.checkpoint.tensor_reader import DTYPES as STORED_DTYPES
from phi4rv.config import DTYPES, Config, read_json
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.low_precision import GROUP_SIZE, QuantizedWeight
from phi4rv.processing.processor import Processor
from phi4rv.quantization.quantized_linear import (
    format_spec,
    load_quantized_weights,
    parse_formats,
    quantization_formats,
    quantize_layers,
    quantized_layers,
)

CONFIG_KEY = "quantization_config"  # of config.json, where transformers looks for it too
QUANT_METHOD = {"quant_method": "phi4rv", "version": 1, "group_size": GROUP_SIZE}


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kernels: str | None = None,
    weights: str | None = None,
) -> tuple[Phi4RV, Processor]:
    """Model and processor of a folder in the published layout, or of a quantised one.

    device, dtype, kernels: as in ``checkpoint.load``. weights: ``int4,head=fp8`` quantises parts of a published folder
    as they are read, see ``parse_formats``; of a quantised folder only what it holds can be asked for. UserError that
    lists everything in which the folder differs from its config.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    formats = parse_formats(weights) if weights is not None else {}
    folder = Path(path)
    config = folder / "config.json"
    if config.is_file() and CONFIG_KEY in (raw := read_json(config)):
        saved = _saved_formats(raw[CONFIG_KEY], config)
        if formats not in ({}, saved):
            raise UserError(f"--weights: {weights}, but {folder} holds {format_spec(saved)}; leave the option out")
        sizes = Config.from_dict({k: v for k, v in raw.items() if k != CONFIG_KEY}, str(config))
        return _load_quantized(folder, sizes, saved, device, dtype, kernels)
    model, processor = load_meta(folder, device, dtype, kernels)
    if device.type == "meta":
        quantize_layers(model, formats)
    else:
        load_quantized_weights(model, folder, device, formats)
    return model, processor


def save(model: Phi4RV, processor: Processor, path: str | Path) -> None:
    """Writes a quantised folder, bit for bit what the model holds: beside ``path`` and renamed, or not at all.

    ValueError for a model without quantised layers.
    """
    formats = quantization_formats(model)
    if not formats:
        raise ValueError("no layer is quantised: phi4rv.save writes the published layout")
    tensors = _state_dict(model)
    with atomic_folder(Path(path)) as folder:
        write_tensors(tensors, folder, lambda name: tensors[name].cpu())
        dtype = model.decoder.norm.weight.dtype
        write_config_and_processor(
            model, processor, folder, dtype, {CONFIG_KEY: {**QUANT_METHOD, "weights": format_spec(formats)}}
        )


def _load_quantized(
    folder: Path,
    config: Config,
    formats: dict[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
    kernels: str | None,
) -> tuple[Phi4RV, Processor]:
    model = empty_model(config, device, dtype or DTYPES[config.dtype], kernels)
    processor = Processor.from_folder(folder, config)
    quantize_layers(model, formats)
    if device.type != "meta":
        _load_quantized_weights(model, folder, device)
    return model, processor


def _state_dict(model: Phi4RV) -> dict[str, Tensor]:
    """All that a model holds, by the names of a quantised folder."""
    tensors = {hf_name(n): p.detach() for n, p in model.named_parameters()}
    for path, layer in quantized_layers(model).items():
        fields = {field: getattr(layer.quantized, field) for field in ("data", "scales", "zeros")}
        tensors |= {f"{path}.weight.{field}": t for field, t in fields.items() if t is not None}
    return tensors


@torch.no_grad()
def _load_quantized_weights(model: Phi4RV, folder: Path, device: torch.device) -> None:
    """Reads the folder's tensors into an outline with the folder's quantised layers."""
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    plain = {hf_name(n): n for n, _ in model.named_parameters()}
    held = _state_dict(model)
    expected = {n: (tuple(t.shape), FLOAT_DTYPES if n in plain else (names[t.dtype],)) for n, t in held.items()}
    tensors = iter_tensors(folder, expected, device)
    layers = quantized_layers(model)
    for name, tensor in tensors:
        if name in plain:
            assign_parameter(model, plain[name], tensor)
        else:
            path, field = name.rsplit(".weight.", 1)
            known = layers[path].quantized
            layers[path].quantized = QuantizedWeight(**{**vars(known), field: copy_if_mapped(tensor)})


def _saved_formats(given: Any, config: Path) -> dict[str, str]:
    """Part -> format, of the object under CONFIG_KEY in ``config``. UserError if ``save`` writes no such object."""
    kind = {key: given.get(key) for key in QUANT_METHOD} if isinstance(given, dict) else {}
    if kind != QUANT_METHOD or not isinstance(given.get("weights"), str):
        supported = f"only what infer.quantize writes is supported: {QUANT_METHOD} and weights"
        raise UserError(f"{config}: {CONFIG_KEY} is {given!r}, {supported}")
    return parse_formats(given["weights"], f"{config}: {CONFIG_KEY}.weights")
