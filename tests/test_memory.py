"""The sums of ``train/memory.py`` for the published model, against counts by hand; recomputed activations."""

from typing import Any

import pytest
import torch
from small import mixed_data, small_model
from torch import Tensor

from phi4rv import model as model_module
from phi4rv.batch import PackedBatch
from phi4rv.config import Config
from phi4rv.model import Phi4RV
from train.data import Corpus
from train.lora import adapt
from train.memory import one_gpu, saved_bytes
from train.recipe import stage

# Of the published checkpoint: decoder layers' matrices, embeddings and output layer, norms, tower and projector.
LAYER = 5120 * (7680 + 5120 + 2 * 17920 + 17920)
DECODER = 40 * (LAYER + 2 * 5120) + 2 * 100352 * 5120 + 5120


def memory(**overrides: Any) -> dict[str, int]:
    return one_gpu(Config(), stage(2, False, overrides))


def test_lora_fits_80_gb_in_bfloat16_and_48_gb_in_int4() -> None:
    plain, packed = memory(lora_rank=16), memory(lora_rank=16, frozen_weights="int4")
    assert plain["total"] < 80e9
    assert packed["total"] < 48e9
    assert plain["weights"] - 2 * DECODER == pytest.approx(2 * 0.46e9, rel=0.02)
    # Half a byte a weight, and a bfloat16 scale for each 128.
    assert plain["weights"] - packed["weights"] == 40 * LAYER * 2 - 40 * LAYER // 2 - 40 * LAYER // 128 * 2
    adapters = 16 * 40 * (5120 + 7680 + 5120 + 5120 + 5120 + 35840 + 17920 + 5120)
    assert plain["adapters"] == 2 * adapters
    assert plain["optimizer"] == 12 * adapters, "master, two moments"


def test_all_parameters_fit_80_gb_layerwise_and_not_otherwise() -> None:
    full = memory(optimizer="layerwise", global_batch=1)
    assert full["total"] < 80e9
    trained = DECODER + 26 * (4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)  # layers of the tower
    trained += 1152 * 769 + 256 * 1152 + 1153 * 5120 + 5121 * 5120  # patches, positions, projector
    assert full["optimizer"] == pytest.approx(trained * (2 + 2 * 4 / 256), rel=1e-6)
    assert full["gradients"] == 3 * 2 * 100352 * 5120
    assert full["kept"] == 8192 * 2 * (2 * 5120 * 40 + 1152 * 26)
    assert full["total"] == sum(v for k, v in full.items() if k != "total")
    assert memory()["total"] > 3 * 80e9


@pytest.fixture
def batch(tmp_path: Any) -> PackedBatch:
    corpus = Corpus([mixed_data(tmp_path, 5)], small_model()[1], stage(2, False, {}))
    made = corpus.load([planned for planned in map(corpus.plan, corpus.records) if planned])
    assert made is not None
    return made


def gradients(model: Phi4RV, batch: PackedBatch, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    model.set_checkpointing(kind)
    model.zero_grad()
    loss, _ = model.loss_sum(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
def test_recomputed_activations_give_the_same_numbers(batch: PackedBatch, lora: bool) -> None:
    model, _ = small_model()
    if lora:  # the first layer's input needs no gradient then
        adapt(model, stage(2, False, {"lora_rank": 2, "lora_targets": "fc1,o_proj"}), seed=0)
    kept, again = (gradients(model, batch, kind) for kind in ("none", "full"))
    assert torch.equal(kept[0], again[0])
    assert kept[1].keys() == again[1].keys()
    assert len(kept[1]) > 4
    assert all(torch.equal(kept[1][n], again[1][n]) for n in kept[1])


def test_recomputing_keeps_little(batch: PackedBatch) -> None:
    model, _ = small_model()
    kept = {}
    for kind in ("none", "full"):
        model.set_checkpointing(kind)
        kept[kind] = saved_bytes(lambda: model.loss_sum(batch), model)
    assert kept["full"] < kept["none"] / 5


def test_the_loss_in_pieces(batch: PackedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pieces and a rest: the same sums in another order."""
    monkeypatch.setattr(model_module, "LOSS_ROWS", (len(batch.input_ids) - 1) // 5)
    model, _ = small_model()
    whole, pieces = (gradients(model, batch, kind) for kind in ("none", "full"))
    assert model.loss_sum(batch)[1] == (batch.targets() != -100).sum()
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-6, atol=0)
    for name, grad in whole[1].items():
        # Key biases, which softmax cancels, have a gradient of rounding alone.
        assert float((pieces[1][name] - grad).norm()) <= 1e-5 * float(grad.norm()) + 1e-6, name
