"""Checkpoints: tensors and files survive, others read them, memory stays small, full disks harm nothing."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

import phi4rv
from phi4rv import Config, Phi4RV, Prompt, UserError, pack
from phi4rv.checkpoint import huggingface as checkpoint_module
from phi4rv.processing.processor import FILES
from tests.parity import relative

INDEX = "model.safetensors.index.json"
TOWER = "model.vision_tower.vision_tower.vision_model."
Tiny = tuple[Phi4RV, phi4rv.Processor]


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Path:
    phi4rv.save(*tiny, tmp_path / "saved")
    return tmp_path / "saved"


def load_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_survives(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, processor = phi4rv.load(checkpoint, device="cpu", dtype=dtype)
    phi4rv.save(model, processor, tmp_path / "a")
    original, found = load_tensors(checkpoint), load_tensors(tmp_path / "a")
    assert len(original) == 83 and original.keys() == found.keys()
    for name, tensor in original.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    phi4rv.save(*phi4rv.load(tmp_path / "a", device="cpu"), tmp_path / "b")  # the saved config says which dtype
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_other_files_survive_byte_for_byte(checkpoint: Path, saved: Path) -> None:
    for name in FILES:
        assert (saved / name).read_bytes() == (checkpoint / name).read_bytes(), name
    before, after = (json.loads((f / "config.json").read_text()) for f in (checkpoint, saved))
    assert {k: v for k, v in after.items() if k in before} == {**before, "dtype": "float32"}
    assert Config.from_folder(saved) == dataclasses.replace(Config.from_folder(checkpoint), dtype="float32")


@pytest.mark.parametrize("limit", [1, 300_000, 5 * 10**9])
def test_shards_and_index(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", limit)
    phi4rv.save(*tiny, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert (len(shards) == 83) == (limit == 1) and (len(shards) == 1) == (limit > 10**9)
    total, found = 0, {}
    for shard in shards:
        sizes = {name: t.nbytes for name, t in load_file(tmp_path / "out" / shard).items()}
        assert sum(sizes.values()) <= limit or len(sizes) == 1
        total += sum(sizes.values())
        found.update(dict.fromkeys(sizes, shard))
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
        assert os.stat(tmp_path / "out" / shard).st_mode == os.stat(tmp_path / "out" / INDEX).st_mode
    assert index == {"metadata": {"total_size": total}, "weight_map": found}
    again, _ = phi4rv.load(tmp_path / "out", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tiny[0].parameters(), strict=True))


def test_transformers_reads_what_is_saved(tiny: Tiny, saved: Path) -> None:
    model, processor = tiny
    config = json.loads((saved / "config.json").read_text())
    theirs, info = Phi3ForCausalLM.from_pretrained(
        saved, config=Phi3Config.from_dict(config), dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    text = processor.encode(Prompt("What is 1+1?"))
    pictured = processor.encode(Prompt("<image>", [Image.linear_gradient("L").resize((70, 90))]))
    batch = pack([pictured])
    tower = Siglip2VisionModel(Siglip2VisionConfig(**config["vision_config"])).eval()
    state = {n.removeprefix(TOWER): t for n, t in load_tensors(saved).items() if n.startswith(TOWER)}
    tower.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert relative(model(pack([text])), theirs(input_ids=text.input_ids[None]).logits[0]) < 1e-4
        features = tower(
            pixel_values=batch.patches[None],
            pixel_attention_mask=torch.ones(1, len(batch.patches), dtype=torch.int64),
            spatial_shapes=batch.grids.long(),
            output_hidden_states=True,
        ).hidden_states[-2][0]
        assert relative(model.vision(batch), features) < 1e-4
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    rendered = processor.template.render(Prompt("What is 1+1?").messages(), "auto", add_generation_prompt=True).text
    assert tokenizer.encode(rendered, add_special_tokens=False) == text.input_ids.tolist()


def test_a_single_file(tiny: Tiny, folder: Path) -> None:
    save_file(load_tensors(folder), folder / "model.safetensors")
    for file in [*folder.glob("model-*.safetensors"), folder / INDEX]:
        file.unlink()
    model, _ = phi4rv.load(folder, device="cpu", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny[0].parameters(), strict=True))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json: missing"):
        phi4rv.load(folder)


def test_the_published_sizes_on_meta(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(Config().to_dict()))
    model, _ = phi4rv.load(folder, device="meta")  # its shards do not fit, and are not read
    assert model.config == Config()
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    rounded = {name: round(number / 1e9, 2) for name, number in count.items()}
    assert rounded == {"decoder": 14.66, "vision": 0.43, "projector": 0.03}
    assert round(2 * sum(count.values()) / 1e9, 1) == 30.2  # GB in bfloat16
    shapes = {checkpoint_module.hf_name(n): tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes["model.layers.39.self_attn.qkv_proj.weight"] == (7680, 5120)
    assert shapes["model.mm_projector.0.weight"] == (5120, 1152)
    assert shapes[TOWER + "encoder.layers.26.mlp.fc1.weight"] == (4304, 1152)
    assert shapes[TOWER + "head.attention.in_proj_weight"] == (3456, 1152)


def test_the_index_says_which_of_two_tensors_counts(tiny: Tiny, folder: Path) -> None:
    shards = {
        file: load_file(folder / file)
        for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    }
    (first, a), (second, b) = shards.items()
    for own, other, file in ((a, b, second), (b, a, first)):
        name = next(iter(own))
        save_file({**other, name: torch.full_like(own[name], 9.0)}, folder / file)
    model, _ = phi4rv.load(folder, device="cpu", dtype=torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), tiny[0].parameters(), strict=True))


MEASURE = """
import sys, torch, phi4rv

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

phi4rv.load(sys.argv[1])  # what the first call of anything costs
for dtype in (torch.bfloat16, torch.float32):
    open("/proc/self/clear_refs", "w").write("5")  # starts the peak anew
    before = kilobytes("VmRSS")
    model, _ = phi4rv.load(sys.argv[2], device="cpu", dtype=dtype)
    sizes = [p.nbytes for p in model.parameters()]
    print(kilobytes("VmHWM") - before, sum(sizes) // 1024)
    del model
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc/self/clear_refs")
def test_loading_needs_the_model_and_one_tensor(checkpoint: Path, tmp_path: Path) -> None:
    """Peak memory over what the process had, in the checkpoint's own dtype and converted while it is read."""
    _, processor = phi4rv.load(checkpoint, device="meta")
    config = dataclasses.replace(
        processor.config,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=8,
    )
    model = checkpoint_module.empty_model(config, "cpu", torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    phi4rv.save(model, processor, tmp_path / "large")
    largest = max(p.nbytes for p in model.parameters()) // 1024
    run = [sys.executable, "-c", MEASURE, str(checkpoint), str(tmp_path / "large")]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    for line in lines:
        peak, size = map(int, line.split())
        assert size > 20 * largest, "one tensor must not hide a second copy of the model"
        assert peak < size + 1.1 * largest + 4096, f"{peak} kB for a model of {size} kB"
    assert len(lines) == 2


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failing_save_leaves_nothing(tiny: Tiny, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(saved)
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 300_000)
    for failing in (checkpoint_module, "save_file"), (type(tiny[1]), "write"), (Path, "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(*failing, full_disk)
            for target in (saved, saved.with_name("new")):
                with pytest.raises(UserError, match=f"^{target}: cannot be written .No space left on device"):
                    phi4rv.save(*tiny, target)
        assert [f.name for f in saved.parent.iterdir()] == ["saved"] and files_of(saved) == before


def test_an_interrupted_swap_puts_the_old_folder_back(tiny: Tiny, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = files_of(saved), Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> None:
        full_disk() if ".partial-" in self.name else rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(UserError, match="No space left"):
        phi4rv.save(*tiny, saved)
    assert [f.name for f in saved.parent.iterdir()] == ["saved"] and files_of(saved) == before


def test_an_interrupt_leaves_nothing(tiny: Tiny, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        phi4rv.save(*tiny, saved.with_name("new"))
    assert [f.name for f in saved.parent.iterdir()] == ["saved"]


def test_a_disk_that_is_really_full(tiny: Tiny, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.decode().strip()}")
    try:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "old").write_text("old")
        with pytest.raises(UserError, match=r"model: cannot be written .*No space left on device"):
            phi4rv.save(*tiny, tmp_path / "model")
        assert [f.name for f in tmp_path.iterdir()] == ["model"]
        assert files_of(tmp_path / "model") == {"old": b"old"}
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_an_older_folder_is_replaced_whole(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "real"
    target.mkdir()
    (target / "old").write_text("old")
    (tmp_path / "link").symlink_to("real")
    written = checkpoint_module.save_file

    def looks(*arguments: object, **options: object) -> None:
        assert files_of(target) == {"old": b"old"}  # until the new one is whole
        written(*arguments, **options)

    monkeypatch.setattr(checkpoint_module, "save_file", looks)
    phi4rv.save(*tiny, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and "old" not in files_of(target)
    monkeypatch.undo()
    monkeypatch.chdir(target)
    phi4rv.save(*tiny, ".")
    assert load_tensors(target).keys() == load_tensors(tmp_path / "link").keys()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "real"]


def test_a_file_is_not_replaced(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", Path("/")):
        with pytest.raises(UserError, match=f"^{target}: is not a folder that can be replaced"):
            phi4rv.save(*tiny, target)
    assert files_of(tmp_path) == {"file": b"mine"}
