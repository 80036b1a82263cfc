"""Adapters against W + scale · B A written out, their files against PEFT's layout, and runs that train them."""

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import phi4rv
from infer.main import main as ask
from phi4rv.adapters.peft import add_adapters, linear_layers, lora_layers, merge_adapter, read_adapter, write_adapter
from phi4rv.batch import PackedBatch
from phi4rv.checkpoint.huggingface import hf_name
from phi4rv.errors import UserError
from phi4rv.merge import main as merge
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.low_precision import dequantize, quantize
from phi4rv.quantization.quantized_linear import QuantizedLinear, quantize_layers
from tests.small import mixed_data, small_checkpoint, small_model, timeless, weights
from tests.train.test_resume import saved, stop_at
from tests.train.test_train_command import the_error
from tests.train.test_training import batches
from train.export import main as export
from train.main import main
from train.recipe import Stage, stage
from train.trainable import add_lora

EVERYTHING = (
    "qkv_proj,o_proj,gate_up_proj,down_proj,lm_head,mm_projector.0,mm_projector.2,patch_embedding,"
    "q_proj,k_proj,v_proj,out_proj,fc1,fc2"
)


def options(**overrides: Any) -> Stage:
    return stage(2, False, {"lora_rank": 4, "lora_alpha": 6.0, "lora_targets": EVERYTHING, **overrides})


def adapted(chosen: Stage, format: str | None = None) -> Phi4RV:
    """The small model, with ``format`` its decoder's layers in that, with adapters whose B is not zero."""
    model, _ = small_model()
    if format:
        quantize_layers(model, {"decoder": format})
    add_lora(model, chosen, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture
def batch(tmp_path: Path) -> PackedBatch:
    [made] = batches(small_model()[1], mixed_data(tmp_path, 5), [list(range(5))])
    assert len(made.patches)
    return made


def merged_by_hand(model: Phi4RV, frozen: Callable[[str, Tensor], Tensor] = lambda name, weight: weight) -> Phi4RV:
    """The small model with W + 6/4 · B A in place of each adapted W; ``frozen`` may change W first."""
    plain, _ = small_model()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.copy_(frozen(name, weight))
        for path, layer in lora_layers(model).items():
            weight = dict((hf_name(n), p) for n, p in plain.named_parameters())[path + ".weight"]
            weight += 6.0 / 4 * layer.lora_B.weight @ layer.lora_A.weight
    return plain


def test_every_layer_that_is_used_can_be_adapted() -> None:
    """2 decoder layers of 4, 2 used tower layers of 6, patches, projector, output."""
    model = adapted(options())
    assert len(lora_layers(model)) == 2 * 4 + 2 * 6 + 1 + 2 + 1
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_logits_and_gradients_are_those_of_the_merged_weights(batch: PackedBatch) -> None:
    """dA = s Bᵀ dW, dB = s dW Aᵀ with dW from autograd on the merged model."""
    model = adapted(options())
    plain = merged_by_hand(model)
    torch.testing.assert_close(model(batch), plain(batch), rtol=1e-4, atol=1e-5)
    model.loss(batch).backward()
    plain.loss(batch).backward()
    whole = {hf_name(n): p.grad for n, p in plain.named_parameters()}
    for path, layer in lora_layers(model).items():
        dw = whole[path + ".weight"]
        a, b = layer.lora_A.weight, layer.lora_B.weight
        for ours, theirs in ((a.grad, 1.5 * b.detach().T @ dw), (b.grad, 1.5 * dw @ a.detach().T)):
            assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-9, path


@pytest.mark.parametrize("format", ["int8", "fp8", "int4", "int4_zero"])
def test_a_quantised_base(batch: PackedBatch, format: str) -> None:
    """As if the decoder's layers held what their codes say; the adapters' gradients too."""
    model = adapted(options(), format)
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 8

    def rounded(name: str, weight: Tensor) -> Tensor:
        inside = name.startswith("decoder.layers.") and weight.ndim == 2
        return dequantize(quantize(weight, format), torch.float32) if inside else weight

    plain = merged_by_hand(model, rounded)
    torch.testing.assert_close(model(batch), plain(batch), rtol=1e-4, atol=1e-5)
    model.loss(batch).backward()
    plain.loss(batch).backward()
    layer, weight = model.decoder.layers[0].mlp.gate_up_proj, plain.decoder.layers[0].mlp.gate_up_proj.weight
    expected = 1.5 * weight.grad @ layer.lora_A.weight.T
    torch.testing.assert_close(layer.lora_B.weight.grad, expected, rtol=1e-3, atol=1e-6)


def test_before_the_first_step_nothing_changes(batch: PackedBatch) -> None:
    model, _ = small_model()
    expected = model(batch)
    add_lora(model, options(), seed=5)
    assert torch.equal(model(batch), expected)
    a = model.decoder.layers[0].mlp.down_proj.lora_A.weight
    assert 0.9 * 96**-0.5 < float(a.detach().abs().max()) <= 96**-0.5


FC1 = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1"


def peft_folder(folder: Path, rank: int = 2, **changes: Any) -> tuple[Path, dict[str, Tensor]]:
    """What PEFT writes for r=2, lora_alpha=5 on two layers, typed from the description of its format."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight": (rank, 64),
        "base_model.model.model.layers.1.self_attn.qkv_proj.lora_B.weight": (128, rank),
        f"{FC1}.lora_A.weight": (rank, 48),
        f"{FC1}.lora_B.weight": (64, rank),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "some/base", "bias": "none",
        "corda_config": None, "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
        "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 5, "lora_bias": False, "lora_dropout": 0.05,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
        "qalora_group_size": 16, "r": 2, "rank_pattern": {}, "revision": None,
        "target_modules": ["qkv_proj", "fc1"], "target_parameters": None, "task_type": "CAUSAL_LM",
        "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder, tensors


@pytest.mark.parametrize(("rslora", "scale"), [(False, 5 / 2), (True, 5 / 2**0.5)])
def test_an_adapter_made_by_peft(tmp_path: Path, rslora: bool, scale: float) -> None:
    folder, tensors = peft_folder(tmp_path / "adapter", use_rslora=rslora)
    model, before = small_model()[0], dict(small_model()[0].named_parameters())
    merge_adapter(model, folder)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"decoder.layers.1.self_attn.qkv_proj.weight", "vision.encoder.layers.0.mlp.fc1.weight"}
    (_, a), (_, b) = list(tensors.items())[:2]
    expected = before["decoder.layers.1.self_attn.qkv_proj.weight"].double() + scale * b.double() @ a.double()
    got = model.decoder.layers[1].self_attn.qkv_proj.weight.double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_what_is_written_is_what_peft_reads(tmp_path: Path) -> None:
    """Names letter by letter, shapes, scaling, and target_modules that choose these layers and no others."""
    model, _ = small_model()
    add_lora(model, options(lora_targets="o_proj,down_proj"), seed=0)
    write_adapter(model, tmp_path, "some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert (config["bias"], config["use_rslora"], config["fan_in_fan_out"]) == ("none", False, False)
    assert config["base_model_name_or_path"] == "some/base"
    assert config["target_modules"] == ["o_proj", "down_proj"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model.model.model.layers."): list(t.shape) for name, t in tensors.items()}
    layer = {
        "self_attn.o_proj.lora_A.weight": [4, 64],
        "self_attn.o_proj.lora_B.weight": [64, 4],
        "mlp.down_proj.lora_A.weight": [4, 96],
        "mlp.down_proj.lora_B.weight": [64, 4],
    }
    assert shapes == {f"{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()}


@pytest.mark.parametrize("target", ["fc1", "mm_projector.2", "layers.1.mlp.down_proj"])
def test_names_that_would_choose_too_much_are_written_in_full(tmp_path: Path, target: str) -> None:
    """PEFT would find fc1 in the tower's last layer too, and a module called 2 in every list of layers."""
    model, _ = small_model()
    add_lora(model, options(lora_targets=target), seed=0)
    write_adapter(model, tmp_path, "base")
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == list(lora_layers(model))
    assert all(name.startswith("model.") for name in written)


def test_written_read_and_merged_is_the_adapted_model(tmp_path: Path, batch: PackedBatch) -> None:
    model = adapted(options())
    write_adapter(model, tmp_path, "base")
    merged, processor = small_model()
    merge_adapter(merged, tmp_path)
    torch.testing.assert_close(merged(batch), model(batch), rtol=1e-4, atol=1e-5)
    phi4rv.save(merged, processor, tmp_path / "merged")
    assert weights(tmp_path / "merged").keys() == dict(merged.named_parameters()).keys()
    with pytest.raises(ValueError, match="merge its adapter"):
        phi4rv.save(model, processor, tmp_path / "wrong")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


QKV = "base_model.model.model.layers.1.self_attn.qkv_proj"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: missing"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: missing"),
    "cut": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"12345678"), "not a whole safetensors file"),
    "one side": (lambda d: rewrite(d, lambda t: t.pop(QKV + ".lora_B.weight")), "has only lora_A"),
    "a bias": (lambda d: rewrite(d, lambda t: t.update({QKV + ".bias": torch.zeros(1)})), ".bias is unexpected"),
    "rank": (lambda d: rewrite(d, lambda t: t.update({QKV + ".lora_A.weight": torch.zeros(3, 64)})), "must be [2, K]"),
    "width": (lambda d: rewrite(d, lambda t: t.update({QKV + ".lora_A.weight": torch.zeros(2, 63)})), "[128, 63]"),
    "layer": (
        lambda d: rewrite(d, lambda t: t.update({k.replace("s.1.", "s.7."): t.pop(k) for k in list(t) if QKV in k})),
        "layers.7.self_attn.qkv_proj is no linear layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_one_error_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    folder, _ = peft_folder(tmp_path / "adapter")
    damage, words = BROKEN[kind]
    damage(folder)
    model, before = small_model()[0], small_model()[0]
    with pytest.raises(UserError) as error:
        merge_adapter(model, folder)
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"fc1": 4}),
        ("r", 0),
        ("lora_alpha", None),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder, _ = peft_folder(tmp_path / "adapter", **{key: value})
    with pytest.raises(UserError, match=f"adapter_config.json: {key} is {value!r}".replace("[", r"\[")):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("number", "target", "words"),
    [
        (
            2,
            "q_porj",
            "--lora-targets: 'q_porj' is no linear layer of the model, must be among patch_embedding, q_proj",
        ),
        (2, "norm", "'norm' is no linear layer"),
        (2, "o_proj,", "'' is no linear layer"),
        (1, "o_proj", "--lora-targets: o_proj is in decoder, which this stage freezes"),
    ],
)
def test_a_wrong_target_is_named(number: int, target: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        add_lora(small_model()[0], stage(number, False, {"lora_rank": 2, "lora_targets": target}), seed=0)
    assert words in str(error.value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lora")
    line = ["--checkpoint", small_checkpoint(folder), "--data", mixed_data(folder), "--device", "cpu", "--seed", 3]
    line += ["--max-steps", 4, "--global-batch", 5, "--sequence-length", 256, "--lr", 1e-2, "--warmup", 1]
    return [*map(str, line), "--save-every", "2", "--lora-rank", "3"]


@pytest.mark.parametrize(
    "more",
    [[], ["--frozen-weights", "int4", "--dtype", "bfloat16"], ["--lora-targets", "mm_projector.2,fc2,lm_head"]],
    ids=["decoder", "int4", "elsewhere"],
)
def test_a_resumed_run_is_the_run_in_one_go(
    inputs: list[str], more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert main([*inputs, *more, "--output", str(whole)]) == 0
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        stop_at(patch, 3)
        main([*inputs, *more, "--output", str(output)])
    assert {n.split("/")[0] for n in saved(output / "step-2")} == {"model", "exp_avg", "exp_avg_sq", "random"}
    assert not any("base" in n for n in saved(output / "step-2")), "which the checkpoint has"
    assert main([*inputs, *more, "--output", str(output), "--resume"]) == 0
    assert timeless(output / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    assert export(["--checkpoint", str(output / "step-4"), "--output", str(tmp_path / "exported")]) == 0
    adapters = [load_file(f / "adapter_model.safetensors") for f in (whole / "adapter", output / "adapter")]
    adapters.append(load_file(tmp_path / "exported/adapter_model.safetensors"))
    for ours, theirs in [(saved(output / "step-4"), saved(whole / "step-4")), *pairwise(adapters)]:
        assert ours.keys() == theirs.keys()
        assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    assert any(t.abs().max() > 0 for n, t in adapters[0].items() if "lora_B" in n)
    configs = [(f / "adapter_config.json").read_text() for f in (output / "adapter", tmp_path / "exported")]
    assert configs[0] == configs[1]


def test_train_merge_and_ask(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = Path(inputs[1]), tmp_path / "out/adapter"
    assert main([*inputs, "--output", str(tmp_path / "out")]) == 0
    losses = [entry["loss"] for entry in timeless(tmp_path / "out/metrics.jsonl")]
    assert losses[-1] < losses[0]
    merged = tmp_path / "merged"
    assert merge(["--checkpoint", str(base), "--adapter", str(adapter), "--output", str(merged)]) == 0
    before, after = weights(base), weights(merged)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if n.startswith("decoder.layers.") and n.endswith("proj.weight")}
    capsys.readouterr()
    question = ["--prompt", "What is number 3?", "--max-new-tokens", "8", "--json", "--device", "cpu"]
    answers = []
    for line in (["--checkpoint", str(base), "--adapter", str(adapter)], ["--checkpoint", str(merged)]):
        assert ask([*line, *question]) == 0
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1]
    assert merge(["--checkpoint", str(base), "--adapter", str(adapter), "--output", str(merged)]) == 2
    assert "merged exists already" in the_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lora-rank", "-1"], "--lora-rank: -1 must be 0 to 10^9"),
        (["--lora-alpha", "0"], "--lora-alpha: 0.0 must be above 0"),
        (["--frozen-weights", "int3"], "--frozen-weights: 'int3' is unknown, must be one of dtype, int8"),
        (["--frozen-weights", "int8", "--lora-rank", "0"], "--frozen-weights: int8 needs adapters"),
        (["--lora-targets", "x"], "--lora-targets: 'x' is no linear layer"),
    ],
)
def test_a_wrong_option_is_one_line(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([*inputs, *arguments, "--output", str(tmp_path / "out")]) == 2
    assert words in the_error(capsys)


def test_adapters_need_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = mixed_data(tmp_path)
    line = ["--data", str(data), "--device", "cpu", "--lora-rank", "2", "--output", str(tmp_path / "out")]
    assert main(line) == 2
    assert "--lora-rank: adapters need a base model: give --checkpoint" in the_error(capsys)


def test_frozen_weights_do_not_move() -> None:
    """The optimizer never sees the base: what it holds is the adapters alone."""
    model, _ = small_model()
    twin = copy.deepcopy(model)
    add_adapters(model, list(linear_layers(model).values()), 2, 4.0, seed=0)
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    base = {n.replace(".base.", "."): p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(torch.equal(base[n], p) for n, p in twin.named_parameters())
    assert isinstance(model.decoder.lm_head, nn.Module)
