"""Low-rank adapters (LoRA, Hu et al. 2021) on a frozen base, and their files as PEFT writes and reads them.

An adapted layer computes x Wᵀ + (alpha / rank) · (x Aᵀ) Bᵀ with A (rank, K) and B (N, rank). A folder holds
``adapter_config.json`` and ``adapter_model.safetensors``, whose names are the Hugging Face module paths after
``base_model.model.``: PEFT on the published model loads what is written here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phi4rv.checkpoint.huggingface import hf_name
from phi4rv.config import read_json
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.quantization.quantized_linear import QuantizedLinear, linear_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
_SUBMODULES = (".base", ".lora_A", ".lora_B")
# What PEFT can express and this code does not compute: an adapter that asks for it is refused.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
}


class LoRALinear(nn.Module):
    """``base`` and its adapter; ``base`` is frozen. B starts at zero, A as PEFT's: uniform within 1 / sqrt(K)."""

    def __init__(self, base: nn.Linear | QuantizedLinear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        n, k = base.quantized.shape if isinstance(base, QuantizedLinear) else base.weight.shape
        like = base.weight if isinstance(base, nn.Linear) else base.quantized.data
        dtype = base.weight.dtype if isinstance(base, nn.Linear) else base.dtype
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.lora_A, self.lora_B = (nn.Linear(i, o, bias=False, device="meta") for i, o in ((k, rank), (rank, n)))
        a = torch.empty(rank, k).uniform_(-(k**-0.5), k**-0.5, generator=generator)
        self.lora_A.weight = nn.Parameter(a.to(like.device, dtype))
        self.lora_B.weight = nn.Parameter(torch.zeros(n, rank, device=like.device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        """(N, K) of the merged layer in the base's dtype, for operations that take weights and not layers."""
        return self.base.weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


def match_target_modules(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The paths that PEFT's ``target_modules`` match: equal to a target, or ending in it after a dot."""
    return [p for p in paths if any(p == t or p.endswith("." + t) for t in targets)]


def add_adapters(model: Phi4RV, names: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and puts an adapter on each of the layers ``names`` (our paths); they alone train."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear | QuantizedLinear)
        model.set_submodule(name, LoRALinear(base, rank, alpha, generator))


def lora_layers(model: Phi4RV) -> dict[str, LoRALinear]:
    """Hugging Face path -> adapted layer."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {hf_name(n + ".weight").removesuffix(".weight"): m for n, m in found.items()}


def write_adapter(model: Phi4RV, folder: Path, base: str) -> None:
    """The two files into an existing ``folder``; ``base`` is the folder or name of the model that they belong to."""
    layers = lora_layers(model)
    tensors = {}
    for path, layer in layers.items():
        for side, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            tensors[f"base_model.model.{path}.lora_{side}.weight"] = part.weight.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    first = next(iter(layers.values()))
    rank = first.lora_A.out_features
    alpha = first.scaling * rank
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _target_modules(model: Phi4RV, paths: list[str]) -> list[str]:
    """The last names of ``paths``, if PEFT would match exactly these layers by them, else ``paths``."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    modules = [hf_name(n + ".x").removesuffix(".x") for n, _ in model.named_modules() if n.count(".")]
    return names if match_target_modules([m for m in modules if not m.endswith(_SUBMODULES)], names) == paths else paths


@dataclass(frozen=True)
class Adapter:
    """What a folder holds: ``scaling`` multiplies B A; ``weights``: Hugging Face path -> A (r, K), B (N, r)."""

    scaling: float
    weights: dict[str, tuple[Tensor, Tensor]]


def read_adapter(folder: str | Path) -> Adapter:
    """An adapter in PEFT's layout. UserError if a file is missing or broken or it is no plain LoRA adapter."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: missing; an adapter folder in PEFT's layout has one")
    config = read_json(folder / CONFIG)
    for key, allowed in _SUPPORTED.items():
        if config.get(key, allowed[0] if key != "peft_type" else None) not in allowed:
            raise UserError(f"{folder / CONFIG}: {key} is {config.get(key)!r}, only {allowed[0]!r} is supported")
    for key in ("r", "lora_alpha"):
        if isinstance(config.get(key), bool) or not isinstance(config.get(key), int | float) or not config[key] > 0:
            raise UserError(f"{folder / CONFIG}: {key} is {config.get(key)!r}, must be a number above 0")
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise UserError(f"{folder / WEIGHTS}: missing; an adapter folder in PEFT's layout has one") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: not a whole safetensors file ({error})") from None
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = _KEY.fullmatch(key)
        if not name:
            raise UserError(f"{folder / WEIGHTS}: {key} is unexpected, only lora_A and lora_B weights are supported")
        pairs.setdefault(name["path"], {})[name["side"]] = tensor
    for path, pair in pairs.items():
        if len(pair) < 2:
            raise UserError(f"{folder / WEIGHTS}: {path} has only lora_{next(iter(pair))}, must have lora_A and lora_B")
        shapes = [pair["A"].shape, pair["B"].shape]
        if any(len(s) != 2 for s in shapes) or not shapes[0][0] == shapes[1][1] == config["r"]:
            got = f"shapes {[list(s) for s in shapes]}"
            raise UserError(f"{folder / WEIGHTS}: {path} has {got}, must be [{config['r']}, K] and [N, {config['r']}]")
    if not pairs:
        raise UserError(f"{folder / WEIGHTS}: holds no tensors")
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return Adapter(config["lora_alpha"] / root, {path: (pair["A"], pair["B"]) for path, pair in pairs.items()})


@torch.no_grad()
def merge_adapter(model: Phi4RV, folder: str | Path) -> None:
    """Adds a folder's scaling · B A to the model's weights, computed in float32 and rounded once.

    UserError, and no change, if one of its layers is not the model's, is quantised or has another shape.
    """
    adapter, known = read_adapter(folder), linear_layers(model, used=False)
    weights = {}
    for path, (a, b) in adapter.weights.items():
        if path not in known:
            raise UserError(f"{folder}: {path} is no linear layer of this model")
        if isinstance(model.get_submodule(known[path]), QuantizedLinear):
            raise UserError(f"{folder}: {path} is quantised in this model; merge first, by python -m phi4rv.merge")
        weights[path] = weight = model.get_parameter(known[path] + ".weight")
        if weight.shape != (b.shape[0], a.shape[1]):
            got = [b.shape[0], a.shape[1]]
            raise UserError(f"{folder}: {path} is for a weight of {got}, the model's is {list(weight.shape)}")
    for path, (a, b) in adapter.weights.items():
        weight = weights[path]
        a, b = (x.to(weight.device, torch.float32) for x in (a, b))
        weight.copy_(torch.addmm(weight.float(), b, a, alpha=adapter.scaling))
