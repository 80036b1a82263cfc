"""Checkpoints in the published layout: sharded safetensors with an index, in and out, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi4rv.config import DTYPES, Config, read_json
from phi4rv.errors import UserError
from phi4rv.files import whole_folder
from phi4rv.model import Phi4RV
from phi4rv.ops import Operations
from phi4rv.processor import Processor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# This code's module names and the published ones; the first prefix that fits counts.
PREFIXES = (
    ("vision.", "model.vision_tower.vision_tower.vision_model."),
    ("projector.", "model.mm_projector."),
    ("decoder.lm_head.", "lm_head."),
    ("decoder.", "model."),
)
_FLOATS = ("F64", "F32", "F16", "BF16")


def published_name(name: str) -> str:
    """``decoder.norm.weight`` -> ``model.norm.weight``."""
    ours, theirs = next(pair for pair in PREFIXES if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kernels: str | None = None,
) -> tuple[Phi4RV, Processor]:
    """Model and processor of a folder in the published layout.

    device: ``cuda`` where there is one, else ``cpu``; ``meta`` gives shapes only and reads no weights.
    dtype: the config's if None. kernels: see ``ops.Operations``.
    Every name, shape and dtype is checked before anything is allocated; one UserError lists all that is wrong.
    Beside the model itself, memory never holds more than the tensor being read.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, processor = outline(path, device, dtype, kernels)
    if device.type != "meta":
        fill(model, path, device)
    return model, processor


def outline(
    path: str | Path, device: torch.device | str, dtype: torch.dtype | None = None, kernels: str | None = None
) -> tuple[Phi4RV, Processor]:
    """``load`` without weights: a model on the meta device, with the operations chosen for ``device``."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; a checkpoint is a folder in the published layout")
    config = Config.from_folder(folder)
    return empty_model(config, device, dtype or DTYPES[config.dtype], kernels), Processor.from_folder(folder, config)


@torch.no_grad()
def fill(
    model: Phi4RV,
    path: str | Path,
    device: torch.device | str,
    assign: Callable[[Tensor, Tensor], object] = lambda parameter, tensor: parameter.copy_(tensor),
) -> None:
    """Moves an outline to ``device`` and reads its weights; ``assign`` puts a whole tensor into a parameter."""
    folder = Path(path)
    tensors = _locate(folder)
    _check(folder, tensors, model)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        # Opened anew for each tensor: closing drops the mapped pages of the one before.
        with safe_open(tensors[published_name(name)], "pt") as shard:
            assign(parameter, shard.get_tensor(published_name(name)))


def empty_model(config: Config, device: torch.device | str, dtype: torch.dtype, kernels: str | None = None) -> Phi4RV:
    """The model's shapes in ``dtype`` on the meta device, with the operations chosen for ``device``."""
    with torch.device("meta"):
        return Phi4RV(config, Operations(kernels, device)).to(dtype)


def save(model: Phi4RV, processor: Processor, path: str | Path) -> None:
    """Writes the published layout in the model's dtype: written beside ``path`` and renamed, or not at all."""
    with whole_folder(Path(path)) as folder:
        write(model, processor, folder)


def write(
    model: Phi4RV, processor: Processor, folder: Path, whole: Callable[[str, Tensor], Tensor] = lambda name, p: p.cpu()
) -> None:
    """The files of ``save`` into an existing folder. ``whole`` gives a parameter's tensor on the CPU, in the order of
    ``named_parameters``; what it gives is held for one file at a time, so the parameters may be on the meta device.

    ValueError for a model with adapters or quantised layers.
    """
    plain = empty_model(model.config, "cpu", torch.float32, "torch")
    if dict(model.named_parameters()).keys() != dict(plain.named_parameters()).keys():
        raise ValueError("the model's layers are not the published ones: merge its adapter into an unquantised base")
    parameters = {published_name(name): (name, p.detach()) for name, p in model.named_parameters()}
    shards = _shards({published: p for published, (_, p) in parameters.items()})
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: whole(*parameters[n]).contiguous() for n in names}
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        dtype = next(reversed(tensors.values())).dtype
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        del tensors
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in dict.fromkeys(weight_map.values()):
        shutil.copymode(folder / INDEX, folder / file)  # save_file leaves them readable to their owner alone
    write_outline(model, processor, folder, dtype)


def write_outline(model: Phi4RV, processor: Processor, folder: Path, dtype: torch.dtype) -> None:
    """Everything but the weights: what ``outline`` reads."""
    name = next(k for k, v in DTYPES.items() if v == dtype)
    _write_json(folder / "config.json", {**model.config.to_dict(), "dtype": name})
    processor.write(folder)


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names in order, cut into runs of at most SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _locate(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by the index or from a single ``model.safetensors``."""
    single = folder / "model.safetensors"
    if single.is_file() and not (folder / INDEX).exists():
        with _open(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{folder / INDEX}: needs an object 'weight_map' from tensor names to file names")
    return {name: folder / file for name, file in weight_map.items()}


def _check(folder: Path, tensors: dict[str, Path], model: Phi4RV) -> None:
    """Compares the headers of all shards with the model; one UserError lists everything that differs."""
    headers = {}
    for file in dict.fromkeys(tensors.values()):
        with _open(file) as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is no mapping
                part = shard.get_slice(name)
                if name not in headers or file == tensors.get(name):  # the index says which of two counts
                    headers[name] = (tuple(part.get_shape()), part.get_dtype(), file)
    wrong = []
    expected = {published_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    for name, shape in expected.items():
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif name not in headers or headers[name][2] != tensors[name]:
            wrong.append(f"{name} is missing from {tensors[name].name}")
        elif headers[name][0] != shape:
            wrong.append(f"{name} has shape {list(headers[name][0])}, must be {list(shape)}")
        elif headers[name][1] not in _FLOATS:
            wrong.append(f"{name} is {headers[name][1]}, must be one of {', '.join(_FLOATS)}")
    wrong += [f"{name} is unexpected" for name in sorted({*tensors, *headers} - {*expected})]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensor(s) do not fit config.json: {'; '.join(wrong)}")


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "pt")
    except FileNotFoundError:
        raise UserError(f"{file}: missing, though the index names it") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a whole safetensors file, truncated or damaged ({error})") from None


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
