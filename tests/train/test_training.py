"""One step loop for every split of the batch: what is trained, on which tokens, and on how many processes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phi4rv.batch import NO_LABEL, PackedBatch, pack
from phi4rv.errors import UserError
from phi4rv.processing.processor import Processor, Prompt
from tests.small import (
    ROOT,
    mixed_data,
    picture,
    record,
    small_checkpoint,
    small_model,
    timeless,
    weights,
    write_jsonl,
)
from train.data.packed_dataset import PackedDataset
from train.distributed.ranks import Ranks
from train.main import main
from train.optimizers.adamw import AdamW
from train.recipe import Stage, stage
from train.trainable import set_trainable
from train.trainer import train_step

# Sums in another order differ by a few units of float32's last place, 1.2e-7.
LOSS = 5e-6
# Adam divides each gradient by its own size: where that is rounding alone, as for the key biases, which
# softmax cancels, a share of the rate goes in either direction (0.002 measured; of the mean 3e-7).
WEIGHT_SHARE, MEAN_SHARE = 0.05, 1e-5


def options(number: int = 2, **overrides: Any) -> Stage:
    return stage(number, False, {"lr": 1e-3, "warmup": 0.0, "sequence_length": 512, **overrides})


def batches(processor: Processor, file: Path, groups: list[list[int]]) -> list[PackedBatch]:
    """The file's records by number, each group a packed row."""
    dataset = PackedDataset([file], processor, options())
    made = [dataset.load_row([p for i in group for p in dataset.measure(dataset.lines[0][i])]) for group in groups]
    assert all(batch is not None for batch in made)
    return made


def run_steps(made: list[PackedBatch], steps: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    model, _ = small_model()
    chosen = options()
    optimizer = AdamW(set_trainable(model, chosen), chosen, model.ops)
    losses = [train_step(model, optimizer, made, chosen.lr, Ranks())["loss"] for _ in range(steps)]
    return losses, dict(model.named_parameters())


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], moved: float) -> None:
    """``moved``: the rate times the steps."""
    assert ours.keys() == theirs.keys()
    total = count = 0.0
    for name in ours:
        difference = (ours[name] - theirs[name]).detach().abs()
        assert float(difference.max()) <= WEIGHT_SHARE * moved, name
        total, count = total + float(difference.sum()), count + difference.numel()
    assert total / count <= MEAN_SHARE * moved


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return mixed_data(tmp_path, 8)


def test_only_what_the_assistant_wrote_is_labelled(tmp_path: Path) -> None:
    _, processor = small_model()
    first = record("<image>\nWhere?", "<think>Left.</think>[0.1, 0.2, 0.3, 0.4]", picture(tmp_path, "a.png", 50, 40))
    second = record("And now?", "<notthink>Nowhere.")
    first["conversations"][0] += second["conversations"][0]
    [batch] = batches(processor, write_jsonl(tmp_path / "one.jsonl", [first]), [[0]])
    ids, labels = batch.input_ids, batch.labels
    assert processor.decode(labels[labels != NO_LABEL].tolist()) == (
        "<think>Left.</think>[0.1, 0.2, 0.3, 0.4]<|im_end|><|dummy_84|>Nowhere.<|im_end|>"
    )
    labelled = labels != NO_LABEL
    assert torch.equal(ids[labelled], labels[labelled])
    assert len(batch.image_positions) > 3
    assert not labelled[batch.image_positions].any()


def test_the_loss_is_the_mean_over_all_labelled_tokens(file: Path) -> None:
    """From the logits in float64, one by one; answers of unequal length, so that a mean of means differs."""
    model, processor = small_model()
    groups = [[0, 1, 2], [3], [4, 5, 6, 7]]
    nll, per_document = 0.0, []
    for batch in batches(processor, file, [[i] for i in range(8)]):
        logits = model(batch).detach().double().log_softmax(1)
        rows = [(t - 1, int(label)) for t, label in enumerate(batch.labels) if label != NO_LABEL]
        per_document.append(-sum(float(logits[t, label]) for t, label in rows) / len(rows))
        nll += per_document[-1] * len(rows)
    labelled = sum(int((b.labels != NO_LABEL).sum()) for b in batches(processor, file, groups))
    chosen = options()
    metrics = train_step(
        model,
        AdamW(set_trainable(model, chosen), chosen, model.ops),
        batches(processor, file, groups),
        0.0,
        Ranks(),
    )
    assert metrics["labelled"] == labelled
    assert metrics["loss"] == pytest.approx(nll / labelled, rel=LOSS)
    assert metrics["loss"] != pytest.approx(sum(per_document) / 8, rel=1e-3), "the case does not tell the means apart"


@pytest.mark.parametrize(
    "groups", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[7, 2], [0, 1, 5], [6, 4, 3]], [[i] for i in range(8)]], ids=len
)
def test_the_split_of_a_global_batch_changes_nothing(file: Path, groups: list[list[int]]) -> None:
    """One packed row, several, or one document each."""
    _, processor = small_model()
    losses, trained = run_steps(batches(processor, file, [list(range(8))]))
    split_losses, split_trained = run_steps(batches(processor, file, groups))
    assert split_losses == pytest.approx(losses, rel=LOSS)
    assert losses[-1] < losses[0]
    assert_same_weights(split_trained, trained, 4e-3)


def test_a_step_without_an_image_and_one_with(file: Path) -> None:
    """Records 0, 3 and 6 are text alone: nothing reaches tower and projector, and nothing breaks."""
    _, processor = small_model()
    model, _ = small_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    chosen = options(weight_decay=0.0)
    optimizer = AdamW(set_trainable(model, chosen), chosen, model.ops)
    [text, both] = batches(processor, file, [[0, 3, 6], [1, 3]])
    assert not len(text.patches)
    train_step(model, optimizer, [text], 1e-3, Ranks())
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"decoder"}
    train_step(model, optimizer, [both], 1e-3, Ranks())
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"decoder", "projector", "vision"}


def test_stage_1_meets_text_alone(file: Path) -> None:
    """A row that no trained parameter has a part in counts in the loss and has no gradient."""
    model, processor = small_model()
    chosen = options(1)
    optimizer = AdamW(set_trainable(model, chosen), chosen, model.ops)
    [text, pictures] = batches(processor, file, [[0, 3], [1, 2]])
    metrics = train_step(model, optimizer, [text, pictures], 1e-3, Ranks())
    assert metrics["grad_norm"] > 0
    [whole] = batches(processor, file, [[0, 3, 1, 2]])
    twin, _ = small_model()
    same = train_step(twin, AdamW(set_trainable(twin, chosen), chosen, twin.ops), [whole], 1e-3, Ranks())
    assert metrics == pytest.approx(same, rel=LOSS)
    assert train_step(model, optimizer, [text], 1e-3, Ranks())["grad_norm"] == 0


def test_a_step_without_labels_stops_and_with_a_broken_model_is_skipped(file: Path) -> None:
    model, processor = small_model()
    chosen = options()
    optimizer = AdamW(set_trainable(model, chosen), chosen, model.ops)
    bare = processor.encode(Prompt("Hello?"))
    unlabelled = pack([dataclasses.replace(bare, labels=torch.full_like(bare.input_ids, NO_LABEL))])
    with pytest.raises(UserError, match="without a single labelled token"):
        train_step(model, optimizer, [unlabelled], 1e-3, Ranks())
    with torch.no_grad():
        model.decoder.norm.weight[0] = float("nan")
    metrics = train_step(model, optimizer, batches(processor, file, [[1]]), 1e-3, Ranks())
    assert math.isnan(metrics["loss"]) and metrics["skipped_steps"] == 1


def test_stages_1_2_3_in_a_chain(tmp_path: Path) -> None:
    """Each from the last one's model. Frozen parts bit for bit as they were; every trained tensor moves; the
    tower's parts that no forward pass reads never do.
    """
    source, data = small_checkpoint(tmp_path), mixed_data(tmp_path, 12)
    unused = ("vision.encoder.layers.2.", "vision.post_layernorm.", "vision.head.")
    for number in (1, 2, 3):
        output = tmp_path / f"stage-{number}"
        line = [
            "--stage",
            number,
            "--checkpoint",
            source,
            "--data",
            data,
            "--output",
            output,
            "--device",
            "cpu",
        ]
        line += ["--max-steps", 3, "--global-batch", 6, "--sequence-length", 256, "--lr", 1e-2, "--warmup", 0]
        assert main(list(map(str, line))) == 0
        before, after = weights(source), weights(output / "model")
        assert before.keys() == after.keys()
        for name in before:
            moves = not name.startswith(unused) and (number > 1 or name.startswith("projector."))
            assert torch.equal(before[name], after[name]) != moves, f"stage {number}: {name}"
        source = output / "model"


@pytest.mark.parametrize(("batch", "length", "workers"), [(9, 256, 0), (1, 512, 1)], ids=["shares", "an idle rank"])
def test_two_processes_train_as_one(tmp_path: Path, batch: int, length: int, workers: int) -> None:
    """torchrun with two gloo processes against one: the same losses and weights to float32's rounding. A rank may
    have fewer rows, one without an image, or none.
    """
    checkpoint, data = small_checkpoint(tmp_path), mixed_data(tmp_path, 12)
    line = f"--stage 2 --checkpoint {checkpoint} --data {data} --device cpu --max-steps 4 --save-every 2"
    line += f" --seed 5 --global-batch {batch} --sequence-length {length} --lr 1e-3 --warmup 1 --workers {workers}"
    assert main([*line.split(), "--output", str(tmp_path / "one")]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "train/main.py", *line.split(), "--output", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es)" in done.stdout

    one, two = timeless(tmp_path / "one/metrics.jsonl"), timeless(tmp_path / "two/metrics.jsonl")
    assert len(one) == len(two) == 4
    assert any(entry["sequences"] % 2 for entry in one), "no step of unequal shares"
    for ours, theirs in zip(one, two, strict=True):
        assert ours["skipped"] == theirs["skipped"] == {}
        numbers = [{k: v for k, v in entry.items() if k != "skipped"} for entry in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=LOSS)
    assert_same_weights(weights(tmp_path / "one/model"), weights(tmp_path / "two/model"), 4e-3)
    state = json.loads((tmp_path / "two/step-4/state.json").read_text())
    assert state["step"] == 4
