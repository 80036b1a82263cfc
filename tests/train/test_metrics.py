"""What a step is said to be: losses by mode, rates by hand, spikes with their records, events for TensorBoard."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from phi4rv.batch import NO_LABEL
from phi4rv.errors import UserError
from tests.small import picture, record, small_model, write_jsonl
from train.anomalies import MIN_WINDOW
from train.data.flops import flops
from train.data.packed_dataset import PackedDataset
from train.data.stream import global_batches
from train.distributed.ranks import Ranks
from train.figures.metrics import MetricsLogger, TimedIterator, peak_memory, read_metrics, throughput
from train.optimizers.adamw import AdamW
from train.recipe import Stage, stage
from train.trainable import set_trainable
from train.trainer import train, train_step


def options(**overrides: Any) -> Stage:
    return stage(2, False, {"lr": 1e-3, "warmup": 0.0, "sequence_length": 256, **overrides})


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    """Six records, the odd ones with a thought; one that is not has a thought in its second answer."""
    lines = []
    for i in range(6):
        shown = [picture(tmp_path, f"{i}.png", 40 + 9 * i, 40)] if i % 3 else []
        thought = f"<think>Is it {i}? {'Yes. ' * i}</think>" if i % 2 else "<nothink>"
        lines.append(record("<image> " * len(shown) + "What?", f"{thought}It is {i}.", *shown))
    lines[4]["conversations"][0] += record("Sure?", "<think>Am I?</think>Yes.")["conversations"][0]
    return PackedDataset([write_jsonl(tmp_path / "data.jsonl", lines)], small_model()[1], options())


def test_loss_by_mode(dataset: PackedDataset) -> None:
    """Each document by itself, in float64; packed in rows of both modes, of one, and with a thinking one last."""
    model, _ = small_model()
    info = [p for line in dataset.lines[0] for p in dataset.measure(line)]
    assert [p.reasoning for p in info] == [False, True, False, True, False, True]
    nll, count = [0.0, 0.0], [0, 0]
    for i, one in enumerate(info):
        batch = dataset.load_row([one])
        logits = model(batch).detach().double().log_softmax(1)
        rows = [(t - 1, int(label)) for t, label in enumerate(batch.labels) if label != NO_LABEL]
        mode = i % 2
        nll[mode] -= sum(float(logits[row]) for row in rows)
        count[mode] += len(rows)
    groups = [[0, 1, 2], [4, 3], [5]]
    made = [dataset.load_row([info[i] for i in group]) for group in groups]
    chosen = options()
    metrics = train_step(model, AdamW(set_trainable(model, chosen), chosen, model.ops), made, 0.0, Ranks())
    assert (metrics["labelled"], metrics["labelled_reasoning"]) == (sum(count), count[1])
    assert metrics["loss_direct"] == pytest.approx(nll[0] / count[0], rel=5e-6)
    assert metrics["loss_reasoning"] == pytest.approx(nll[1] / count[1], rel=5e-6)
    alone = train_step(model, AdamW(set_trainable(model, chosen), chosen, model.ops), made[2:], 0.0, Ranks())
    assert "loss_direct" not in alone and alone["loss_reasoning"] == alone["loss"]


def test_a_step_as_it_is_reported(dataset: PackedDataset) -> None:
    """Operations are those of the samples it took, by ``flops`` on what was really packed."""
    model, _ = small_model()
    chosen = options(global_batch=6, max_steps=2)
    dataset = PackedDataset(dataset.sources, dataset.processor, chosen)
    optimizer, seen = AdamW(set_trainable(model, chosen), chosen, model.ops), []
    train(
        model,
        optimizer,
        dataset,
        global_batches(dataset, 0),
        2,
        Ranks(),
        lambda metrics, taken: seen.append(metrics),
        peak_tflops=0.5,
    )
    by_record = {line.where: dataset.measure(line)[0] for line in dataset.lines[0]}
    assert len(seen) == 2
    for entry in seen:
        info = [by_record[where] for where in entry["records"]]
        assert len(info) == entry["samples"] >= 6
        patches = [n for p in info for n in p.patches]
        expected = flops(model.config, [len(p) for p in info], patches, int(entry["labelled"])).total
        assert entry["operations"] == expected
        assert entry["mfu"] == pytest.approx(expected / entry["seconds"] / 0.5e12)
        assert entry["tokens_per_second"] == pytest.approx(sum(map(len, info)) / entry["seconds"])
        assert 0 <= entry["data_wait"] < entry["seconds"]
        assert entry["memory"] > 2**20


def test_rates_by_hand() -> None:
    """4 devices, half a second, 8e12 operations: 4 TFLOP/s each, a fifth of a peak of 20."""
    made = throughput({"operations": 8e12, "tokens": 300, "images": 7}, 0.5, 4, 20.0)
    assert made == {"seconds": 0.5, "tokens_per_second": 600, "images_per_second": 14, "tflops": 4.0, "mfu": 0.2}
    assert throughput({"operations": 1, "tokens": 1, "images": 0}, 1.0, 1, None)["mfu"] is None


def test_waiting_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the test sets: 2 an item and for the end; what is done with an item, 50, does not count."""
    now = [0.0]
    monkeypatch.setattr("train.figures.metrics.time.perf_counter", lambda: now[0])

    def slow() -> Iterator[int]:
        for number in range(3):
            now[0] += 2
            yield number
        now[0] += 2

    timed = TimedIterator(slow())
    for _ in timed:
        now[0] += 50
    assert timed.seconds == 8


def test_memory_grows_with_what_is_held() -> None:
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 2**24)  # float32: as much again, and 64 MB
    assert peak_memory(torch.device("cpu")) > before + 2**24
    del held


def entry(step: int, loss: float, norm: float = 1.0) -> dict[str, Any]:
    rates = {"tokens_per_second": 1.0, "images_per_second": 0.0, "mfu": None, "skipped_steps": 0}
    return {"step": step, "loss": loss, "grad_norm": norm, **rates, "records": [f"a.jsonl:{step}"] * 7}


def written(path: Path, losses: list[float], start: int = 0) -> list[dict[str, Any]]:
    logger = MetricsLogger(path, start, 100)
    for number, loss in enumerate(losses, start + 1):
        logger.log_step(entry(number, loss))
    logger.close()
    return read_metrics(path)


def test_a_spike_is_logged_with_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also by a run taken up again, which compares with the losses that the file holds."""
    losses = [2.0, 2.2] * (MIN_WINDOW // 2) + [9.0, 2.1]
    whole = written(tmp_path / "whole.jsonl", losses)
    assert [e["step"] for e in whole if "spike_over" in e] == [MIN_WINDOW + 1]
    assert whole[MIN_WINDOW]["records"] == [f"a.jsonl:{MIN_WINDOW + 1}"] * 7
    assert all("records" not in e for e in whole if "spike_over" not in e)
    told = [line for line in capsys.readouterr().err.splitlines() if "spike" in line]
    assert len(told) == 1 and "step 17 spike: the loss is 9.000, usual is up to 2.900; records: " in told[0]
    assert told[0].endswith("and 2 more, in metrics.jsonl")
    written(tmp_path / "halves.jsonl", losses[:MIN_WINDOW])
    assert written(tmp_path / "halves.jsonl", losses[MIN_WINDOW:], MIN_WINDOW) == whole


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "m.jsonl", 0, 3)
    logger.log_step(entry(1, math.nan))
    logger.log_step(entry(2, 2.0, math.inf))
    logger.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert (lines[0]["loss"], lines[0]["not_finite"]) == (None, "the loss is nan")
    assert (lines[1]["grad_norm"], lines[1]["not_finite"]) == (None, "the gradient norm is inf")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "m.jsonl", 0, 3)
    with Path("/dev/full").open("a") as logger.file:
        with pytest.raises(UserError, match=r"m\.jsonl: cannot be written \(No space left on device\)"):
            logger.log_step(entry(1, 2.0))
        logger.close()


def test_tensorboard_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of its writer: what it is given, and that nothing is needed where the package is not."""
    given: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int):
            given.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            given.append((name, value, step))

        def close(self) -> None:
            given.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    written(tmp_path / "m.jsonl", [2.5, math.nan], start=4)
    assert given[0] == (str(tmp_path / "tensorboard"), 5)
    assert ("loss", 2.5, 5) in given and ("tokens_per_second", 1.0, 6) in given
    assert not [g for g in given if g[0] == "mfu" or (g[0] == "loss" and g[2] == 6)]
    assert given[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # import raises
    assert len(written(tmp_path / "n.jsonl", [2.5])) == 1
    assert not (tmp_path / "tensorboard").exists()


def test_read_metrics(tmp_path: Path) -> None:
    whole = write_jsonl(tmp_path / "m.jsonl", [{"step": 1}, '{"step": 2'])
    assert read_metrics(whole) == [{"step": 1}], "a run may be writing its last line"
    for lines, words in ((["{", "{}"], "m.jsonl:1: not JSON"), (["{}", "3"], "m.jsonl:2: no JSON object")):
        with pytest.raises(UserError, match=words):
            read_metrics(write_jsonl(tmp_path / "m.jsonl", lines))
