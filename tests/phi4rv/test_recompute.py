"""Recomputed activations and compiled layers: the same numbers, fewer tensors kept, no product twice without need."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import phi4rv
from phi4rv.batch import PackedBatch
from phi4rv.model import activation_checkpointing
from phi4rv.model import phi4rv as model_module
from phi4rv.model.activation_checkpointing import CHECKPOINTING
from phi4rv.model.phi4rv import Phi4RV
from tests.small import mixed_data, saved_bytes, small_checkpoint, small_model, timeless
from tests.train.test_training import batches
from train.main import main
from train.recipe import stage
from train.trainable import add_lora


@pytest.fixture
def batch(tmp_path: Path) -> PackedBatch:
    [made] = batches(small_model()[1], mixed_data(tmp_path, 5), [list(range(5))])
    return made


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_checkpointing, "OFFLOAD_MIN_BYTES", 0)


def gradients(model: Phi4RV, batch: PackedBatch, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    model.set_checkpointing(kind)
    model.zero_grad()
    loss, _ = model.loss_sum(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTING[1:])
def test_recomputed_activations_give_the_same_numbers(batch: PackedBatch, kind: str, lora: bool) -> None:
    model, _ = small_model()
    if lora:  # the first layer's input needs no gradient then
        add_lora(model, stage(2, False, {"lora_rank": 2, "lora_targets": "fc1,o_proj"}), seed=0)
    kept, again = gradients(model, batch, "none"), gradients(model, batch, kind)
    assert torch.equal(kept[0], again[0])
    assert kept[1].keys() == again[1].keys()
    assert len(kept[1]) > 4
    assert all(torch.equal(kept[1][n], again[1][n]) for n in kept[1])


def test_recomputing_keeps_little(batch: PackedBatch) -> None:
    """Of ``offload`` the hooks outside see only what belongs to no layer: embeddings and the loss."""
    model, _ = small_model()
    kept = {}
    for kind in ("none", "full", "offload"):
        model.set_checkpointing(kind)
        kept[kind] = saved_bytes(lambda: model.loss_sum(batch), model)
    assert kept["full"] < kept["none"] / 5
    assert kept["offload"] < 0.6 * kept["full"]


class Operators(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.name().removeprefix("aten::").partition(".")[0]] += 1
        return function(*args, **kwargs or {})


def test_selective_repeats_no_product(batch: PackedBatch) -> None:
    model, _ = small_model()
    counts = {}
    for kind in ("none", "selective", "full"):
        with Operators() as operators:
            gradients(model, batch, kind)
        counts[kind] = operators.counts
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    none, selective, full = counts.values()
    assert selective["mm"] == none["mm"] + 1, "the output layer's, which belongs to the loss"
    for name in ("addmm", "bmm", attention):
        assert none[name] == selective[name]
    assert full[attention] == 2 * none[attention]
    for name in ("silu", "gelu", "rsqrt"):
        assert selective[name] == full[name] > none[name], name


@pytest.mark.parametrize(
    ("operator", "kept"),
    [
        (torch.ops.aten.addmm.default, True),
        (torch.ops.aten._scaled_mm.default, True),
        (torch.ops.aten._scaled_dot_product_flash_attention.default, True),
        (torch.ops.aten._scaled_dot_product_cudnn_attention.default, True),
        ("phi4rv_triton::packed_attention", True),
        ("phi4rv_triton::quantized_linear", True),
        ("phi4rv_triton::rms_norm", False),
        ("phi4rv_triton::rope", False),
        ("phi4rv_triton::swiglu", False),
        (torch.ops.aten.silu.default, False),
        (torch.ops.aten.native_layer_norm.default, False),
    ],
    ids=str,
)
def test_which_operators_are_kept(operator: Any, kept: bool) -> None:
    class Named:
        def name(self) -> str:
            return str(operator)

    policy = activation_checkpointing._policy(None, Named() if isinstance(operator, str) else operator)
    assert (policy == activation_checkpointing.CheckpointPolicy.MUST_SAVE) == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("kind", ["selective", "offload"])
def test_with_kernels(tmp_path: Path, kind: str) -> None:
    """Their operators are opaque to PyTorch: kept, or run again, as a whole."""
    pytest.importorskip("triton")
    model, processor = phi4rv.load(small_checkpoint(tmp_path), "cpu", torch.float32, "triton")
    [short] = batches(processor, mixed_data(tmp_path, 2), [[0]])
    kept, again = gradients(model, short, "none"), gradients(model, short, kind)
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][n], again[1][n]) for n in kept[1])


def test_the_loss_in_pieces(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pieces and a rest: the same sums in another order."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK_ROWS", (len(batch.input_ids) - 1) // 5)
    model, _ = small_model()
    whole, pieces = (gradients(model, batch, kind) for kind in ("none", "full"))
    assert model.loss_sum(batch)[1] == (batch.targets() != -100).sum()
    close(whole, pieces)


def close(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    """But for the order of sums, in float32."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in ours[1].items():
        # Key biases, which softmax cancels, have a gradient of rounding alone.
        assert float((theirs[1][name] - grad).norm()) <= 1e-5 * float(grad.norm()) + 1e-6, name


@pytest.mark.parametrize("kind", ["none", "full", "offload"])
def test_compiled_layers(tmp_path: Path, kind: str) -> None:
    """Rows of several lengths, with and without images, by the graphs of the first ones."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, processor = small_model()
    rows = batches(processor, mixed_data(tmp_path, 9), [[0, 1, 2], [3], [4, 5, 6], [8], [0, 7]])
    plain = [gradients(model, row, kind) for row in rows]
    model.compile_layers(backend="aot_eager")
    for row, expected in zip(rows[:2], plain, strict=False):
        close(gradients(model, row, kind), expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 2
    for row, expected in zip(rows[2:], plain[2:], strict=True):
        close(gradients(model, row, kind), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_compiled_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By PyTorch's own compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    line = ["--checkpoint", small_checkpoint(tmp_path), "--data", mixed_data(tmp_path, 5), "--device", "cpu"]
    line += ["--max-steps", 2, "--global-batch", 3, "--sequence-length", 256, "--lr", 1e-3, "--warmup", 1, "--stage", 1]
    losses = []
    refused = [*map(str, line), "--compile", "--checkpointing", "selective", "--output", str(tmp_path / "refused")]
    assert main(refused) == 2
    assert "error: --compile: its code hides the products" in capsys.readouterr().err
    for more in ([], ["--compile", "--checkpointing", "full"]):
        output = tmp_path / f"out{len(more)}"
        assert main([*map(str, line), *more, "--output", str(output)]) == 0
        losses.append([entry["loss"] for entry in timeless(output / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
