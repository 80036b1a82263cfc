"""Checkpoints in the Hugging Face layout: sharded safetensors with an index, in and out, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from phi4rv.checkpoint.atomic_folder import atomic_folder
from phi4rv.checkpoint.tensor_reader import TensorInfo, read_header, read_tensors
from phi4rv.config import DTYPES, Config, read_json
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.registry import Operations
from phi4rv.processing.processor import Processor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# This code's module names and those of the published model; the first prefix that fits counts.
HF_PREFIXES = (
    ("vision.", "model.vision_tower.vision_tower.vision_model."),
    ("projector.", "model.mm_projector."),
    ("decoder.lm_head.", "lm_head."),
    ("decoder.", "model."),
)
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# Shape and allowed dtypes of each tensor of a folder, by its Hugging Face name.
ExpectedTensors = Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]


def hf_name(name: str) -> str:
    """``decoder.norm.weight`` -> ``model.norm.weight``."""
    ours, theirs = next(pair for pair in HF_PREFIXES if name.startswith(pair[0]))
    return theirs + name.removeprefix(ours)


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kernels: str | None = None,
) -> tuple[Phi4RV, Processor]:
    """Model and processor of a folder in the Hugging Face layout.

    device: ``cuda`` where there is one, else ``cpu``; ``meta`` gives shapes only and reads no weights.
    dtype: the config's if None. kernels: see ``ops.Operations``.
    Every name, shape and dtype is checked before anything is allocated; one UserError lists all that is wrong.
    Beside the model itself, a CPU's memory never holds more than the tensor being read, a GPU's no more than
    ``tensor_reader.read_tensors`` says.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, processor = load_meta(path, device, dtype, kernels)
    if device.type != "meta":
        load_weights(model, path, device)
    return model, processor


def load_meta(
    path: str | Path, device: torch.device | str, dtype: torch.dtype | None = None, kernels: str | None = None
) -> tuple[Phi4RV, Processor]:
    """``load`` without weights: a model on the meta device, with the operations chosen for ``device``."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; a checkpoint is a folder in the Hugging Face layout")
    config = Config.from_folder(folder)
    if "quantization_config" in config.raw:
        raise UserError(
            f"{folder}: holds quantised weights, which only infer reads, and only infer.quantize's; give the "
            "checkpoint of which they were made"
        )
    return empty_model(config, device, dtype or DTYPES[config.dtype], kernels), Processor.from_folder(folder, config)


@torch.no_grad()
def load_weights(
    model: Phi4RV,
    path: str | Path,
    device: torch.device | str,
    assign: Callable[[Tensor, Tensor], object] | None = None,
) -> None:
    """Reads the weights of a model on the meta device to ``device``. ``assign`` copies a full tensor into a parameter,
    which may be sharded; without it what is read becomes the parameters, and nothing is copied twice.
    """
    expected = {hf_name(n): (tuple(p.shape), FLOAT_DTYPES) for n, p in model.named_parameters()}
    tensors = iter_tensors(Path(path), expected, device)
    if assign:
        model.to_empty(device=device)
    parameters = {hf_name(n): (n, p) for n, p in model.named_parameters()}
    for name_in_file, tensor in tensors:
        name, parameter = parameters[name_in_file]
        if assign:
            assign(parameter, tensor)
        else:
            assign_parameter(model, name, tensor)


def assign_parameter(model: Phi4RV, name: str, tensor: Tensor) -> None:
    """Makes a tensor of ``iter_tensors`` the parameter ``name`` of a model on the meta device, in its dtype."""
    parent, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    setattr(model.get_submodule(parent), leaf, nn.Parameter(copy_if_mapped(tensor, old.dtype), old.requires_grad))


def copy_if_mapped(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of ``iter_tensors`` in memory of its own: on a CPU it is a view of the mapped file."""
    return tensor.to(dtype or tensor.dtype, copy=tensor.device.type == "cpu")


def iter_tensors(folder: Path, expected: ExpectedTensors, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face name and tensor, read to ``device`` by ``tensor_reader.read_tensors``, in the files' order.

    Checked at once: UserError that lists everything in which the folder differs from ``expected``.
    """
    infos = sorted(_find_tensors(folder, expected), key=lambda t: (t.file, t.start))
    return ((item.name, tensor) for item, tensor in read_tensors(infos, device))


def empty_model(config: Config, device: torch.device | str, dtype: torch.dtype, kernels: str | None = None) -> Phi4RV:
    """The model's shapes in ``dtype`` on the meta device, with the operations chosen for ``device``."""
    with torch.device("meta"):
        return Phi4RV(config, Operations(kernels, device)).to(dtype)


def save(model: Phi4RV, processor: Processor, path: str | Path) -> None:
    """Writes the Hugging Face layout in the model's dtype: written beside ``path`` and renamed, or not at all."""
    with atomic_folder(Path(path)) as folder:
        write_checkpoint(model, processor, folder)


def write_checkpoint(
    model: Phi4RV,
    processor: Processor,
    folder: Path,
    full_tensor: Callable[[str, Tensor], Tensor] = lambda name, p: p.cpu(),
) -> None:
    """The files of ``save`` into an existing folder. ``full_tensor`` gives a parameter's tensor on the CPU, in the
    order of ``named_parameters``; its results are held one file at a time, so the parameters may be on the meta device.

    ValueError for a model with adapters or quantised layers.
    """
    plain = empty_model(model.config, "cpu", torch.float32, "torch")
    if dict(model.named_parameters()).keys() != dict(plain.named_parameters()).keys():
        raise ValueError("the model's layers are not the published ones: merge its adapter into an unquantised base")
    parameters = {hf_name(name): (name, p.detach()) for name, p in model.named_parameters()}
    detached = {n: p for n, (_, p) in parameters.items()}
    dtype = write_tensors(detached, folder, lambda name: full_tensor(*parameters[name]))
    write_config_and_processor(model, processor, folder, dtype)


def write_tensors(tensors: Mapping[str, Tensor], folder: Path, full_tensor: Callable[[str], Tensor]) -> torch.dtype:
    """Shards and index of tensors by their Hugging Face names; the dtype of the last one. ``full_tensor`` gives each on
    the CPU, in their order.
    """
    shards = _split_into_shards(tensors)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {n: full_tensor(n).contiguous() for n in names}
        total += sum(t.numel() * t.element_size() for t in shard.values())
        dtype = next(reversed(shard.values())).dtype
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        del shard
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in dict.fromkeys(weight_map.values()):
        shutil.copymode(folder / INDEX, folder / file)  # save_file leaves them readable to their owner alone
    return dtype


def write_config_and_processor(
    model: Phi4RV,
    processor: Processor,
    folder: Path,
    dtype: torch.dtype,
    extra_config: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Everything but the weights: what ``load_meta`` reads. ``extra_config``: more entries of config.json."""
    name = next(k for k, v in DTYPES.items() if v == dtype)
    write_json(folder / "config.json", {**model.config.to_dict(), "dtype": name, **extra_config})
    processor.write(folder)


def _split_into_shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
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


def _read_weight_map(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by the index or from a single ``model.safetensors``."""
    single = folder / "model.safetensors"
    if single.is_file() and not (folder / INDEX).exists():
        return {item.name: single for item in read_header(single)}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{folder / INDEX}: needs an object 'weight_map' from tensor names to file names")
    return {name: folder / file for name, file in weight_map.items()}


def _find_tensors(folder: Path, expected: ExpectedTensors) -> list[TensorInfo]:
    """Where each of the expected tensors lies, by the headers of all shards; one UserError lists everything that
    differs.
    """
    tensors = _read_weight_map(folder)
    found: dict[str, TensorInfo] = {}
    for file in dict.fromkeys(tensors.values()):
        for item in read_header(file):
            if item.name not in found or file == tensors.get(item.name):  # the index says which of two counts
                found[item.name] = item
    wrong = []
    for name, (shape, dtypes) in expected.items():
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif name not in found or found[name].file != tensors[name]:
            wrong.append(f"{name} is missing from {tensors[name].name}")
        elif found[name].shape != shape:
            wrong.append(f"{name} has shape {list(found[name].shape)}, must be {list(shape)}")
        elif found[name].dtype not in dtypes:
            right = f"one of {', '.join(dtypes)}" if len(dtypes) > 1 else dtypes[0]
            wrong.append(f"{name} is {found[name].dtype}, must be {right}")
    wrong += [f"{name} is unexpected" for name in sorted({*tensors, *found} - {*expected})]
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} tensor(s) do not fit config.json: {'; '.join(wrong)}")
    return [found[name] for name in expected]


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
