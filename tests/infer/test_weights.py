"""Weights in 8 and 4 bits, rounded as they are read, and saved so and read again.

Relative error of the logits (Euclidean norm) that each format may have on the golden cases in float32, whose random
weights forgive less than trained ones: BOUNDS, over those measured on 2026-11-27, 0.0209, 0.0779, 0.337 and 0.288.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import phi4rv
from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.quantization import weight_loader
from infer.quantization.calibration import logits_error
from infer.quantize import main as quantize_command
from infer.requests.sampling_params import SamplingParams
from phi4rv import Phi4RV, Processor, Prompt, UserError
from phi4rv.adapters.peft import merge_adapter
from phi4rv.checkpoint import huggingface as checkpoint_module
from phi4rv.checkpoint import tensor_reader
from phi4rv.checkpoint.tensor_reader import read_staged
from phi4rv.ops.low_precision import FORMATS, QuantizedWeight, quantize
from phi4rv.quantization import quantized_linear
from phi4rv.quantization.quantized_linear import (
    format_spec,
    linear_layers,
    parse_formats,
    quantize_in_chunks,
    quantize_layers,
    quantized_layers,
)
from tests import parity
from tests.phi4rv import test_tensor_reader
from tests.phi4rv.test_bad_checkpoints import edit
from tests.phi4rv.test_checkpoint import INDEX, load_tensors
from tests.small import small_checkpoint

BOUNDS = {"int8": 0.03, "fp8": 0.1, "int4": 0.4, "int4_zero": 0.35}
MIXED = "int4,head=fp8,tower=int8"
SPECS = [*FORMATS, MIXED, "tower=int4_zero"]
Tiny = tuple[Phi4RV, Processor]


def load(path: Path, spec: str | None = None, dtype: torch.dtype | None = torch.float32) -> Tiny:
    return weight_loader.load(path, "cpu", dtype, None, spec)


def same_weight(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    def bits(value: Any) -> Any:
        return (value.dtype, value.shape, value.view(torch.uint8).tolist()) if isinstance(value, Tensor) else value

    return all(bits(value) == bits(getattr(b, field)) for field, value in vars(a).items())


def same_model(a: Phi4RV, b: Phi4RV) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    layers, others = quantized_layers(a), quantized_layers(b)
    return (
        ours.keys() == theirs.keys()
        and layers.keys() == others.keys()
        and all(torch.equal(p, theirs[n]) and p.dtype == theirs[n].dtype for n, p in ours.items())
        and all(same_weight(q.quantized, others[n].quantized) and q.dtype == others[n].dtype for n, q in layers.items())
    )


@pytest.fixture(scope="module")
def batch(tiny: Tiny) -> phi4rv.PackedBatch:
    return tiny[1]([case.prompt for case in parity.cases()])


# What is quantised.


def test_formats_are_read() -> None:
    assert parse_formats("int4") == {"decoder": "int4"}
    assert parse_formats(" int4_zero , head=fp8,tower=int8") == {"decoder": "int4_zero", "head": "fp8", "tower": "int8"}
    assert parse_formats("head=int8") == {"head": "int8"}
    assert all(parse_formats(format_spec(parse_formats(spec))) == parse_formats(spec) for spec in SPECS)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("int3", "'int3' is unknown, must be one of int8, fp8, int4, int4_zero"),
        ("", "'' is unknown"),
        ("int4,", "'' is unknown"),
        ("int4,projector=fp8", "'projector' is no part, must be one of decoder, head, tower"),
        ("head=", "'' is unknown"),
        ("int4,int8", "decoder is given twice, int4 and int8"),
        ("head=fp8,head=fp8", "head is given twice, fp8 and fp8"),
    ],
)
def test_a_wrong_spec_is_one_line(spec: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_formats(spec)
    assert str(caught.value).startswith("--weights: ") and words in str(caught.value) and "\n" not in str(caught.value)


def test_which_layers(checkpoint: Path) -> None:
    """Those that are called as layers and used: not the tower's last layer, embeddings or projector."""
    model, _ = load(checkpoint, MIXED)
    formats = {path: layer.quantized.format for path, layer in quantized_layers(model).items()}
    tower = "model.vision_tower.vision_tower.vision_model.encoder.layers."
    inner = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    expected = {f"{tower}{i}.{name}": "int8" for i in range(2) for name in inner}
    inner = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    expected |= {f"model.layers.{i}.{name}": "int4" for i in range(2) for name in inner} | {"lm_head": "fp8"}
    assert formats == expected
    plain, _ = load(checkpoint)
    known = dict(plain.named_parameters())
    gone = {linear_layers(plain)[path] + ".weight" for path in expected}
    assert {n for n, _ in model.named_parameters()} == known.keys() - gone
    assert all(torch.equal(p, known[n]) for n, p in model.named_parameters())


# Reading.


@pytest.mark.parametrize(("spec", "dtype"), [(s, torch.bfloat16) for s in SPECS] + [(MIXED, torch.float32)])
def test_each_weight_is_rounded_from_what_is_stored(checkpoint: Path, spec: str, dtype: torch.dtype) -> None:
    """Also where the rest of the model is in fewer bits than the files."""
    model, _ = load(checkpoint, spec, dtype)
    stored = load_tensors(checkpoint)
    layers = quantized_layers(model)
    assert layers and model.decoder.norm.weight.dtype == dtype
    for path, layer in layers.items():
        assert same_weight(layer.quantized, quantize(stored[path + ".weight"], layer.quantized.format)), path
        assert layer.weight.dtype == dtype


@pytest.mark.parametrize("format", FORMATS)
def test_rows_together_or_in_blocks(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(11, 300, generator=torch.Generator().manual_seed(0))
    groups = (11, 3) if "4" in format else (11,)
    shrink = torch.rand(groups, generator=torch.Generator().manual_seed(1)) / 2 + 0.5
    whole, shrunk = quantize(weight, format), quantize(weight, format, shrink)
    for rows in (1, 4, 11):
        monkeypatch.setattr(quantized_linear, "CHUNK_ROWS", rows)
        assert same_weight(quantize_in_chunks(weight, format), whole)
        assert same_weight(quantize_in_chunks(weight, format, shrink), shrunk)


@pytest.mark.parametrize("spec", [*FORMATS, "int8,head=int8,tower=int8"])
def test_logits_are_near_the_unquantised(tiny: Tiny, checkpoint: Path, batch: phi4rv.PackedBatch, spec: str) -> None:
    right = tiny[0](batch).detach()
    model, _ = load(checkpoint, spec)
    error = logits_error(model(batch).detach(), right)["relative"]
    bound = BOUNDS[spec.partition(",")[0]]
    assert bound / 3 < error < bound


def test_what_is_held_while_reading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that become quantised: the one in hand, and the one before it until the next is there."""
    live: weakref.WeakSet[Tensor] = weakref.WeakSet()
    given, read = [], quantized_linear.iter_tensors

    def watched(*arguments: Any) -> Any:
        for name, tensor in read(*arguments):
            live.add(tensor)
            given.append(len(live))
            yield name, tensor

    monkeypatch.setattr(quantized_linear, "iter_tensors", watched)
    load(checkpoint, MIXED)
    assert len(given) == 83 and max(given) <= 2


MEASURE = """
import ctypes, sys, torch
from infer.quantization import weight_loader
from phi4rv.quantization import quantized_linear

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

quantized_linear.CHUNK_ROWS = 64
weight_loader.load(sys.argv[1], "cpu", weights="int4")  # what the first call of anything costs
for path, spec in ((sys.argv[2], "int4"), (sys.argv[3], None)):
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # starts the peak anew
    before = kilobytes("VmRSS")
    model, _ = weight_loader.load(path, "cpu", weights=spec)
    print(kilobytes("VmHWM") - before)
    del model
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc/self/clear_refs")
def test_memory_holds_the_quantised_model_and_no_other(checkpoint: Path, tmp_path: Path) -> None:
    """Quantised while it is read, and read quantised: peak memory over what the process had."""
    _, processor = phi4rv.load(checkpoint, device="meta")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 4}
    config = dataclasses.replace(processor.config, **sizes)
    model = checkpoint_module.empty_model(config, "cpu", torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    phi4rv.save(model, processor, tmp_path / "plain")
    size = sum(p.nbytes for p in model.parameters()) // 1024
    largest = max(p.nbytes for p in model.parameters()) // 1024
    quantize_layers(model, {"decoder": "int4"})
    weight_loader.save(model, processor, tmp_path / "quantised")
    held = sum(f.stat().st_size for f in (tmp_path / "quantised").glob("*.safetensors")) // 1024
    assert held < 0.4 * size and size > 30 * largest
    run = [sys.executable, "-c", MEASURE, checkpoint, tmp_path / "plain", tmp_path / "quantised"]
    lines = subprocess.run(list(map(str, run)), capture_output=True, text=True, check=True).stdout.splitlines()
    rounding, reading = map(int, lines)
    assert max(rounding, reading) < held + 8 * largest + 4096, f"{rounding} and {reading} kB for {held} kB"


# Saved folders.


@pytest.mark.parametrize(("spec", "dtype"), [(s, torch.float32) for s in SPECS] + [(MIXED, torch.bfloat16)])
def test_every_bit_survives(checkpoint: Path, tmp_path: Path, spec: str, dtype: torch.dtype) -> None:
    model, processor = load(checkpoint, spec, dtype)
    weight_loader.save(model, processor, tmp_path / "a")
    for asked in (None, spec):
        again, files = load(tmp_path / "a", asked, None)  # the saved config says which dtype
        assert same_model(again, model) and again.config == dataclasses.replace(model.config, dtype=again.config.dtype)
        assert files.files == processor.files
    weight_loader.save(again, files, tmp_path / "b")
    assert [f.name for f in (tmp_path / "a").iterdir()] == [f.name for f in (tmp_path / "b").iterdir()]
    assert all(f.read_bytes() == (tmp_path / "b" / f.name).read_bytes() for f in (tmp_path / "a").iterdir())


def test_what_was_read_stays_when_the_files_change(saved: Path, checkpoint: Path) -> None:
    """On a CPU files are mapped: nothing of a model may be their pages."""
    models = [load(saved, None, None)[0], load(saved, None, None)[0]]
    for file in saved.glob("*.safetensors"):
        with open(file, "r+b") as opened:
            opened.write(bytes([0xFF]) * file.stat().st_size)
    assert same_model(*models) and same_model(models[0], load(checkpoint, MIXED)[0])


def test_by_way_of_staging_buffers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As to a GPU: several tensors are on their way at a time, and copies come late."""
    right = load(checkpoint)[0], load(checkpoint, MIXED)[0]
    monkeypatch.setattr(tensor_reader, "CHUNK_BYTES", test_tensor_reader.CHUNK_BYTES)
    monkeypatch.setattr(
        checkpoint_module,
        "read_tensors",
        lambda items, device: read_staged(items, torch.device("cpu"), test_tensor_reader.LateStaging()),
    )
    assert same_model(load(checkpoint)[0], right[0]) and same_model(load(checkpoint, MIXED)[0], right[1])


def test_sizes_that_fit_no_group(tmp_path: Path) -> None:
    """K of 48, 64 and 96 in groups of 128, in shards of a tensor each."""
    plain = small_checkpoint(tmp_path)
    model, processor = load(plain, "int4_zero,head=int4,tower=int4_zero")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "SHARD_BYTES", 1)
        weight_loader.save(model, processor, tmp_path / "saved")
    again, _ = load(tmp_path / "saved")
    assert same_model(again, model)
    index = json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == len(index) == len(list(model.parameters())) + 3 * 20 + 2


def test_a_folder_in_another_dtype(checkpoint: Path, tmp_path: Path) -> None:
    """The codes stay, the rest is converted."""
    model, processor = load(checkpoint, MIXED)
    weight_loader.save(model, processor, tmp_path / "saved")
    again, _ = load(tmp_path / "saved", None, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in again.parameters())
    for path, layer in quantized_layers(again).items():
        assert same_weight(layer.quantized, quantized_layers(model)[path].quantized)
        assert layer.weight.dtype == torch.bfloat16


def test_shapes_alone(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load(checkpoint, MIXED)
    weight_loader.save(model, processor, tmp_path / "saved")
    for path, spec in ((checkpoint, MIXED), (tmp_path / "saved", None)):
        meta, _ = weight_loader.load(path, "meta", weights=spec)
        assert all(p.is_meta for p in meta.parameters())
        assert all(layer.quantized.data.is_meta for layer in quantized_layers(meta).values())
        assert quantized_layers(meta).keys() == quantized_layers(model).keys()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [1, 128, 300])
def test_a_weight_without_numbers(format: str, k: int) -> None:
    found, right = quantize(torch.empty(5, k, device="meta"), format), quantize(torch.ones(5, k), format)
    for field, value in vars(right).items():
        other = getattr(found, field)
        if isinstance(value, Tensor):
            assert other.is_meta and (other.shape, other.dtype) == (value.shape, value.dtype)
        else:
            assert other == value


def test_a_plain_model_is_not_saved_so(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"phi4rv\.save writes the published layout"):
        weight_loader.save(*tiny, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(checkpoint: Path, tmp_path: Path) -> Path:
    weight_loader.save(*load(checkpoint, MIXED), tmp_path / "saved")
    return tmp_path / "saved"


def test_other_readers_are_told(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"^{saved}: holds quantised weights, which only infer reads") as caught:
        phi4rv.load(saved)
    assert "\n" not in str(caught.value)
    assert quantize_command(["--checkpoint", str(saved), "--output", str(saved) + "2", "--weights", "int8"]) == 2
    assert "holds quantised weights" in capsys.readouterr().err


def test_only_what_a_folder_holds_can_be_asked_for(saved: Path) -> None:
    with pytest.raises(UserError, match=f"^--weights: int8, but {saved} holds {MIXED}; leave the option out"):
        load(saved, "int8")


BAD_KINDS = {
    "[]": lambda c: c.update(quantization_config=[]),
    "awq": lambda c: c.update(quantization_config={"quant_method": "awq", "bits": 4}),
    "version": lambda c: c["quantization_config"].update(version=2),
    "group": lambda c: c["quantization_config"].update(group_size=64),
    "no weights": lambda c: c["quantization_config"].pop("weights"),
}


@pytest.mark.parametrize("name", BAD_KINDS)
def test_a_config_of_another_kind(saved: Path, name: str) -> None:
    edit(saved / "config.json", BAD_KINDS[name])
    with pytest.raises(UserError, match=r"config\.json: quantization_config is .*, only what infer\.quantize"):
        load(saved)


def test_a_config_with_an_unknown_format(saved: Path) -> None:
    edit(saved / "config.json", lambda c: c["quantization_config"].update(weights="int2"))
    with pytest.raises(UserError, match=r"config.json: quantization_config\.weights: 'int2' is unknown"):
        load(saved)


def test_one_error_lists_every_misfit_before_anything_is_allocated(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Phi4RV, "to_empty", lambda *a, **k: pytest.fail("allocated before the check"))
    [file] = saved.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight.data"] = tensors["lm_head.weight.data"].view(torch.uint8)
    tensors["model.layers.0.mlp.down_proj.weight.scales"] = torch.ones(256, 3)
    tensors["model.layers.1.mlp.down_proj.weight.scales"] = torch.ones(256, 4, dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.o_proj.weight.zeros"] = torch.ones(1)
    tensors["lm_head.weight"] = torch.ones(1024, 256)
    del tensors["model.layers.1.self_attn.o_proj.weight.scales"]
    save_file(tensors, saved / "model.safetensors")
    (saved / INDEX).unlink()
    with pytest.raises(UserError) as caught:
        load(saved)
    assert str(caught.value).startswith(f"{saved}: 6 tensor(s) do not fit config.json: ")
    assert set(str(caught.value).split(": ", 2)[2].split("; ")) == {
        "lm_head.weight.data is U8, must be F8_E4M3",
        "model.layers.0.mlp.down_proj.weight.scales is F32, must be BF16",
        "model.layers.1.mlp.down_proj.weight.scales has shape [256, 4], must be [256, 3]",
        "model.layers.1.self_attn.o_proj.weight.scales is missing",
        "model.layers.0.self_attn.o_proj.weight.zeros is unexpected",
        "lm_head.weight is unexpected",
    }


def test_files_that_are_missing_or_cut(saved: Path) -> None:
    [file] = saved.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=f"^{file}: not a whole safetensors file"):
        load(saved)
    shutil.rmtree(saved)
    with pytest.raises(UserError, match=f"^{saved}: not a folder"):
        load(saved)


def test_an_adapter_is_merged_first(saved: Path, tmp_path: Path) -> None:
    """Into rounded weights it cannot be."""
    model, _ = load(saved)
    path = "base_model.model.model.layers.0.mlp.down_proj"
    save_file(
        {f"{path}.lora_A.weight": torch.ones(1, 512), f"{path}.lora_B.weight": torch.ones(256, 1)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    with pytest.raises(UserError, match=r"down_proj is quantised in this model; merge first, by python -m"):
        merge_adapter(model, tmp_path)


def test_the_engine_on_either_folder(tmp_path: Path) -> None:
    """Quantised as it is read or before: the tokens that the whole model finds most probable one after another."""
    plain = small_checkpoint(tmp_path)
    model, processor = load(plain, "int8,head=int4")
    weight_loader.save(model, processor, tmp_path / "saved")
    sample = processor.encode(Prompt("What is number 3?"))
    expected: list[int] = []
    for _ in range(5):
        ids = torch.cat([sample.input_ids, torch.tensor(expected, dtype=torch.int64)])
        logits = model(phi4rv.pack([dataclasses.replace(sample, input_ids=ids)])).detach()[-1]
        expected.append(int(logits.argmax()))
    for path, spec in ((plain, "int8,head=int4"), (tmp_path / "saved", None)):
        [made] = Engine(path, "cpu", weights=spec, config=EngineConfig(cache_tokens=2048)).generate(
            [Prompt("What is number 3?")], SamplingParams(max_new_tokens=5)
        )
        assert made.token_ids == expected[: len(made.token_ids)] and made.token_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_on_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    """Rounded there as on a CPU, and read there from a saved folder."""
    ours, processor = weight_loader.load(checkpoint, "cuda", torch.float32, None, MIXED)
    weight_loader.save(ours, processor, tmp_path / "saved")
    again, _ = weight_loader.load(tmp_path / "saved", "cuda")
    assert same_model(again, ours) and all(p.is_cuda for p in again.parameters())
    on_cpu = load(checkpoint, MIXED)[0]
    assert all(layer.quantized.data.is_cuda for layer in quantized_layers(again).values())
    for path, layer in quantized_layers(on_cpu).items():
        torch.testing.assert_close(quantized_layers(again)[path].weight.cpu(), layer.weight, rtol=1e-6, atol=1e-7)
