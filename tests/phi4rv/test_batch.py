"""Packing: where documents, images and labels end up, and what the row says of them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from phi4rv import Sample, pack

NONE = -100


def sample(ids: list[int], labels: list[int] | None = None, grids: list[list[int]] | None = None) -> Sample:
    """Image positions are the ids that are 0."""
    positions = [i for i, token in enumerate(ids) if token == 0]
    return Sample(
        input_ids=torch.tensor(ids),
        labels=None if labels is None else torch.tensor(labels),
        patches=torch.arange(len(positions) * 768.0).view(-1, 768) + ids[-1],
        grids=torch.tensor(grids or [], dtype=torch.int32).view(-1, 2),
        image_positions=torch.tensor(positions, dtype=torch.int64),
    )


ONE = sample([5])
PAIR = sample([0, 0, 7], [NONE, NONE, 7], [[1, 2]])
LONG = sample([9, 0, 8, 0, 0, 0, 0, 6], [NONE, NONE, 8, NONE, NONE, NONE, NONE, 6], [[1, 1], [2, 2]])


def test_every_field_of_a_packed_row() -> None:
    batch = pack([LONG, ONE, PAIR])
    assert batch.input_ids.tolist() == [9, 0, 8, 0, 0, 0, 0, 6, 5, 0, 0, 7]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 1, 2]
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen, batch.documents) == ([0, 8, 9, 12], 8, 3)
    assert batch.grids.tolist() == [[1, 1], [2, 2], [1, 2]]
    assert (batch.cu_patches.tolist(), batch.max_patches) == ([0, 1, 5, 7], 4)
    assert batch.image_positions.tolist() == [1, 3, 4, 5, 6, 9, 10]
    assert torch.equal(batch.patches, torch.cat([LONG.patches, PAIR.patches]))
    assert batch.labels is None  # ONE has none


def test_types_are_the_documented_ones() -> None:
    for batch in (pack([LONG, PAIR]), pack([ONE])):
        for name in ("input_ids", "image_positions"):
            assert getattr(batch, name).dtype == torch.int64, name
        for name in ("positions", "cu_seqlens", "grids", "cu_patches"):
            assert getattr(batch, name).dtype == torch.int32, name
        assert isinstance(batch.max_seqlen, int) and isinstance(batch.max_patches, int)
    assert pack([LONG, PAIR]).labels.dtype == torch.int64


def test_text_alone() -> None:
    batch = pack([ONE])
    assert (batch.positions.tolist(), batch.cu_seqlens.tolist()) == ([0], [0, 1])
    assert (batch.cu_patches.tolist(), batch.max_patches) == ([0], 0)
    assert (batch.patches.shape, batch.grids.shape, batch.image_positions.shape) == ((0, 768), (0, 2), (0,))


def by_hand(labels: list[Tensor]) -> list[int]:
    """Each document's labels from its second on, then one position that predicts nothing."""
    return [target for own in labels for target in [*own.tolist()[1:], NONE]]


def test_targets_stop_at_document_ends() -> None:
    # Every token labelled: the last row of a document must not learn the first token of the next.
    samples = [dataclasses.replace(s, labels=s.input_ids + 1) for s in (ONE, PAIR, LONG, ONE, ONE)]
    targets = pack(samples).targets()
    assert targets.dtype == torch.int64
    assert targets.tolist() == by_hand([s.labels for s in samples])
    assert pack(samples[:1]).targets().tolist() == [NONE]


def test_targets_leave_the_labels_alone() -> None:
    batch = pack([PAIR, LONG])
    before = batch.labels.clone()
    assert batch.targets().tolist() == by_hand([PAIR.labels, LONG.labels])
    assert torch.equal(batch.labels, before)


def test_no_labels_no_targets() -> None:
    with pytest.raises(ValueError, match="no labels"):
        pack([ONE, PAIR]).targets()


def test_nothing_to_pack() -> None:
    empty = dataclasses.replace(ONE, input_ids=torch.empty(0, dtype=torch.int64))
    for samples in ([], [ONE, empty]):
        with pytest.raises(ValueError, match="none of them empty"):
            pack(samples)


def test_moved_to_a_device() -> None:
    batch = pack([LONG, PAIR])
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if not isinstance(before, Tensor):
            assert after is before
        else:
            assert after.is_meta and after.shape == before.shape and after.dtype == before.dtype
    assert pack([ONE]).to("meta").labels is None
