"""The benchmark of loading: what it calls padding, and that both sides read the same pictures."""

import dataclasses
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.data import loading_and_packing
from benchmarks.data.mixture import SampleLengths
from phi4rv.config import Config
from phi4rv.processing.processor import Processor


def test_padding_is_what_a_collator_adds() -> None:
    samples = [
        SampleLengths(100, (50,), 10, False),
        SampleLengths(300, (250,), 10, False),
        *[SampleLengths(400, (), 10, False)] * 2,
    ]
    found = loading_and_packing.padding(samples)
    assert found["tokens"] == pytest.approx(1 - 1200 / 1600)
    assert found["patches"] == pytest.approx(1 - 300 / 7200)
    assert found["operations"] > 1600 / 1200


def test_both_sides_read_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_and_packing, "IMAGES", 4)
    path = loading_and_packing.make_data(tmp_path)
    config = dataclasses.replace(
        Config.from_folder(loading_and_packing.CHECKPOINT), min_num_patches=256, max_num_patches=3600
    )
    processor = Processor.from_folder(loading_and_packing.CHECKPOINT, config)
    assert sum(islice(loading_and_packing.phi4rv_loader(path, processor, 0), 4)) >= 4
    assert next(loading_and_packing.plain_loader(path, 0)) == 4
    [sample] = [loading_and_packing.PlainDataset(path)[3]]
    assert sample["pixels"].shape == (3600, 768)
    labelled = sample["labels"][sample["labels"] != loading_and_packing.NO_LABEL].tolist()
    # The published template's block begins with the answer; what the tokenizer writes is what ours labels.
    assert "A thing of note." in processor.decode(labelled)


def test_the_table_says_it_in_words() -> None:
    packing = {
        "case": "packing",
        "ms_per_sample": 0.1,
        "filling": 0.995,
        **{f"imbalance_{w}": 0.01 for w in loading_and_packing.WORLDS},
    }
    loading = {
        "case": "loading",
        "workers": 1,
        "ours_images_per_second": 30.0,
        "peer_images_per_second": 10.0,
        "ratio": 3.0,
    }
    text = loading_and_packing.table(
        [loading_and_packing.padding([SampleLengths(10, (5,), 2, False)] * 4), packing, loading]
    )
    assert "99.50% full" in text and "3.0 times" in text and "ours 0" in text
