"""Folders that are not a checkpoint: one line for each, naming the file, and nothing allocated before it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import phi4rv
from phi4rv import Phi4RV, UserError
from tests.phi4rv.test_checkpoint import INDEX, load_tensors


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        phi4rv.load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD_CONFIG = {
    "hidden_size is '256', must be an integer": {"hidden_size": "256"},
    "num_hidden_layers is 0, must be above 0": {"num_hidden_layers": 0},
    "hidden_size is 1099511627776, must be above 0 and below 16777216": {"hidden_size": 2**40},
    "vocab_size is True, must be an integer": {"vocab_size": True},
    "rope_theta is inf, must be above 0": {"rope_theta": float("inf")},
    "rms_norm_eps is nan, must be above 0": {"rms_norm_eps": float("nan")},
    "eos_token_id is [1, 2], must be an integer": {"eos_token_id": [1, 2]},
    "bos_token_id is -1, must be 0 or more": {"bos_token_id": -1},
    "dtype is ['bfloat16'], must be a string": {"dtype": ["bfloat16"]},
    "dtype is 'int8', must be one of float32, bfloat16, float16": {"dtype": "int8"},
    "hidden_size 256 is not a multiple of 3 heads": {"num_attention_heads": 3},
    "2 query heads cannot share 4 key heads": {"num_key_value_heads": 4},
    "head dim 5 is odd": {"hidden_size": 10},
    "min_num_patches is over max_num_patches 8": {"max_num_patches": 8},
    "rope_scaling is {'type': 'longrope'}, only None is supported": {"rope_scaling": {"type": "longrope"}},
    "tie_word_embeddings is True, only False": {"tie_word_embeddings": True},
    "vision_config is None, must be an object": {"vision_config": None},
    "vision_config.patch_size is 14, must be 16": {"vision_config": {"patch_size": 14}},
    "vision_config.hidden_act must be": {"vision_config": {"hidden_act": "gelu"}},
    "vision_config.num_patches is 250, must be a square": {"vision_config": {"num_patches": 250}},
    "vision_config.num_hidden_layers must be 2 or more": {"vision_config": {"num_hidden_layers": 1}},
    "vision_config.hidden_size 1152 is not a multiple of 7": {"vision_config": {"num_attention_heads": 7}},
}


@pytest.mark.parametrize("message", BAD_CONFIG)
def test_bad_values_in_config(folder: Path, message: str) -> None:
    edit(folder / "config.json", lambda config: config.update(BAD_CONFIG[message]))
    assert refused(folder).startswith(f"{folder / 'config.json'}: {message}")


SHARD = "model-00001-of-00002.safetensors"
# What is done to the folder, the file that the error names, what it says.
BAD_FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no folder": (shutil.rmtree, "", ": not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json", ": missing"),
    "broken config": (
        lambda f: (f / "config.json").write_text('{\n"a": 1,\n]'),
        "config.json",
        ":3: broken JSON",
    ),
    "config list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json",
        ": must hold a JSON object",
    ),
    "config deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json", ": broken JSON"),
    "config digits": (
        lambda f: (f / "config.json").write_text('{"a":%s}' % ("1" * 5000)),
        "config.json",
        ": broken",
    ),
    "config bytes": (lambda f: (f / "config.json").write_bytes(b"\xff{}"), "config.json", ": not UTF-8"),
    "config folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json",
        ": cannot",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), INDEX, ": missing"),
    "broken index": (lambda f: (f / INDEX).write_text("{"), INDEX, ":1: broken JSON"),
    "index list": (lambda f: (f / INDEX).write_text("[]"), INDEX, ": must hold a JSON object"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), INDEX, ": needs an object 'weight_map'"),
    "weight_map list": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), INDEX, ": needs an object"),
    "weight_map numbers": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'),
        INDEX,
        ": needs an object",
    ),
    "no shard": (lambda f: (f / SHARD).unlink(), SHARD, ": missing, though the index names it"),
    "shard folder": (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), SHARD, ": not a whole"),
    "empty shard": (lambda f: (f / SHARD).write_bytes(b""), SHARD, ": not a whole safetensors file"),
    "short shard": (lambda f: os.truncate(f / SHARD, os.path.getsize(f / SHARD) - 1), SHARD, ": not a whole"),
    "short header": (lambda f: os.truncate(f / SHARD, 100), SHARD, ": not a whole"),
    "long shard": (lambda f: os.truncate(f / SHARD, os.path.getsize(f / SHARD) + 1), SHARD, ": not a whole"),
    "garbage": (lambda f: (f / SHARD).write_bytes(bytes(range(256)) * 9), SHARD, ": not a whole"),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{\n\n"),
        "tokenizer.json",
        ":3: broken JSON",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json", ": missing"),
    "not a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json",
        ": not a tokenizer",
    ),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja", ": missing"),
    "bytes": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        "chat_template.jinja",
        ": not UTF-8",
    ),
    "template": (
        lambda f: (f / "chat_template.jinja").write_text("\n{% if"),
        "chat_template.jinja",
        ":2: not a valid",
    ),
    "vocabulary": (
        lambda f: edit(f / "config.json", lambda c: c.update(vocab_size=1000)),
        "tokenizer.json",
        ": token id 1015 is outside vocab_size 1000",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(folder: Path, name: str) -> None:
    spoil, file, message = BAD_FILES[name]
    spoil(folder)
    assert refused(folder).startswith(f"{folder / file}{message}")


def test_one_error_lists_every_misfit_before_anything_is_allocated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Phi4RV, "to_empty", lambda *a, **k: pytest.fail("allocated before the check"))
    other = "model-00002-of-00002.safetensors"
    tensors, weight_map = load_tensors(folder), json.loads((folder / INDEX).read_text())["weight_map"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]
    tensors["model.norm.weight"] = torch.ones(256, dtype=torch.int32)
    tensors["model.extra"], tensors["surplus"] = torch.ones(1), torch.ones(1)
    del tensors["model.mm_projector.0.bias"], tensors["model.mm_projector.2.bias"]
    del weight_map["model.mm_projector.0.bias"]
    weight_map["surplus"] = other
    for shard in (SHARD, other):  # what the index does not list goes to the second shard
        chosen = {n: t.contiguous() for n, t in tensors.items() if weight_map.get(n, other) == shard}
        save_file(chosen, folder / shard)
    missing_from = weight_map["model.mm_projector.2.bias"]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    message = refused(folder)
    assert message.startswith(f"{folder}: 6 tensor(s) do not fit config.json: ")
    assert set(message.split(": ", 2)[2].split("; ")) == {
        "lm_head.weight has shape [5, 256], must be [1024, 256]",
        "model.norm.weight is I32, must be one of F64, F32, F16, BF16",
        "model.mm_projector.0.bias is missing",
        f"model.mm_projector.2.bias is missing from {missing_from}",
        "model.extra is unexpected",
        "surplus is unexpected",
    }
