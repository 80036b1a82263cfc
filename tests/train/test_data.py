"""From files to steps: order, records too long, records that are bad, and what counts them."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phi4rv.batch import NO_LABEL, PackedBatch
from phi4rv.errors import UserError
from phi4rv.processing.processor import Processor
from tests.small import mixed_data, mixed_records, picture, record, small_model, write_jsonl
from train.data.loader import PrefetchedStep, prefetch
from train.data.packed_dataset import PackedDataset
from train.data.packing import balance_rows
from train.data.stream import GlobalBatch, StepStream, global_batches
from train.recipe import Stage, stage


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_model()[1]


def options(**overrides: Any) -> Stage:
    return stage(2, False, {"sequence_length": 256, "global_batch": 5, **overrides})


def where(info: Any) -> str:
    return info.where


def order(dataset: PackedDataset, seed: int, epoch: int) -> list[str]:
    stream = StepStream(dataset, seed, {"places": [[epoch, 0, 0]]})
    count = sum(1 for line in dataset.lines[0] if dataset.measure(line))
    return [where(info) for info in itertools.islice(stream.source_samples(0), count)]


def layout(dataset: PackedDataset, seed: int, count: int = 99) -> list[list[list[str]]]:
    steps = itertools.islice(global_batches(dataset, seed)(), count)
    return [[[where(p) for p in sequence] for sequence in step] for step in steps]


def read(ahead: Iterator[PrefetchedStep]) -> list[tuple[GlobalBatch, list[PackedBatch], dict[str, int]]]:
    return [(ready.global_batch, list(ready.batches), ready.skipped) for ready in ahead]


def assert_same_batch(ours: PackedBatch, theirs: PackedBatch) -> None:
    for field in dataclasses.fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def long_conversation(folder: Path) -> dict[str, Any]:
    """Three questions; the first shows one picture, the second two, the third none."""
    made = record("<image> One?", "<nothink>Red.", picture(folder, "a.png", 40, 40))
    made["image"] += [picture(folder, "b.png", 60, 30), picture(folder, "c.png", 30, 60)]
    made["conversations"][0] += record("<image> and <image>, two?", "<nothink>Blue.")["conversations"][0]
    made["conversations"][0] += record("Three?" + " Why?" * 40, "<nothink>Green.")["conversations"][0]
    return made


def test_the_order_is_a_function_of_seed_and_epoch(processor: Processor, tmp_path: Path) -> None:
    file = mixed_data(tmp_path, 20)
    dataset, again = (PackedDataset([file], processor, options(max_steps=9)) for _ in range(2))
    orders = [order(dataset, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(found) == sorted(orders[0]) and len(set(found)) == 20 for found in orders)
    assert len(set(map(tuple, orders))) == 4
    assert order(again, 1, 1) == orders[3], "whatever was read before"
    samples = itertools.islice(StepStream(dataset, 0).samples(), 40)
    assert [where(info) for info in samples] == orders[0] + orders[1]


def test_file_order_keeps_the_first_epoch_as_written(processor: Processor, tmp_path: Path) -> None:
    file = mixed_data(tmp_path, 20)
    dataset = PackedDataset([file], processor, options(order="file", max_steps=9))
    assert order(dataset, 0, 0) == [line.where for line in dataset.lines[0]]
    shuffled = PackedDataset([file], processor, options(max_steps=9))
    assert order(dataset, 0, 1) == order(shuffled, 0, 1) != order(dataset, 0, 0)


def test_steps_hold_the_global_batch_and_repeat_exactly(processor: Processor, tmp_path: Path) -> None:
    file = mixed_data(tmp_path, 20)
    dataset = PackedDataset([file], processor, options(epochs=2))
    steps = layout(dataset, 0)
    assert steps == layout(PackedDataset([file], processor, options(epochs=2)), 0)
    assert steps != layout(dataset, 1)
    assert all(sum(map(len, step)) >= 5 > sum(map(len, step[:-1])) for step in steps[:-1])
    flat = [name for step in steps for sequence in step for name in sequence]
    assert sorted(flat) == sorted(2 * order(dataset, 0, 0)), "every record once an epoch"
    assert len(layout(PackedDataset([file], processor, options(max_steps=17)), 0)) == 17


def test_ranks_share_every_step_without_loss(processor: Processor, tmp_path: Path) -> None:
    dataset = PackedDataset([mixed_data(tmp_path, 20)], processor, options(global_batch=9))
    source = global_batches(dataset, 0)
    alone = read(prefetch(source(), dataset, 0, 1))
    ranks = [read(prefetch(source(), dataset, rank, 3)) for rank in range(3)]
    assert all(len(rank) == len(alone) > 1 for rank in ranks)
    for number, (step, batches, _) in enumerate(alone):
        assert len(step) == len(batches)
        shares = balance_rows(step.row_flops, 3)
        assert sorted(row for rows in shares for row in rows) == list(range(len(step)))
        for rank, rows in enumerate(shares):
            assert len(ranks[rank][number][1]) == len(rows)
            for row, theirs in zip(rows, ranks[rank][number][1], strict=True):
                assert_same_batch(batches[row], theirs)


def test_too_long_is_dropped_and_counted_once(processor: Processor, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [*mixed_records(tmp_path, 4), long_conversation(tmp_path)])
    dataset = PackedDataset([file], processor, options(sequence_length=120, epochs=2))
    steps = list(global_batches(dataset, 0)())
    assert sum(len(sequence) for step in steps for sequence in step) == 8
    assert dataset.counts == {"dropped": 1}
    assert dataset.summary() == "1 dropped"


@pytest.mark.parametrize(("room", "turns", "pictures"), [(300, 3, 3), (150, 2, 3), (60, 1, 1), (10, 0, 0)])
def test_too_long_loses_its_last_turns_whole(
    processor: Processor, tmp_path: Path, room: int, turns: int, pictures: int
) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [long_conversation(tmp_path)])
    dataset = PackedDataset([file], processor, options(sequence_length=room, too_long="shorten"))
    made = dataset.measure(dataset.lines[0][0])
    assert dataset.counts == ({} if turns == 3 else {"shortened": 1} if turns else {"dropped": 1})
    if not turns:
        assert made == []
        return
    [info] = made
    batch = dataset.load_row(made)
    assert batch is not None and batch.labels is not None
    answers = [f"<|dummy_84|>{colour}.<|im_end|>" for colour in ("Red", "Blue", "Green")[:turns]]
    assert processor.decode(batch.labels[batch.labels != NO_LABEL].tolist()) == "".join(answers)
    assert len(info) == len(batch.input_ids) <= room
    assert info.labelled == int((batch.targets() != NO_LABEL).sum())
    assert len(info.grids) == len(batch.grids) == pictures
    assert sum(info.patches) == len(batch.image_positions) == int(batch.grids.prod(1).sum()), "an image was cut"
    assert len(batch.patches) == len(batch.image_positions)


def test_shortening_keeps_one_answer_behind_a_system_turn(processor: Processor, tmp_path: Path) -> None:
    """With one answer left there is nothing more to shorten: the record is dropped, not emptied."""
    made = long_conversation(tmp_path)
    made["conversations"][0].insert(0, {"from": "system", "value": "Be brief."})
    files = dict(processor.files)
    template = files["chat_template.jinja"].decode()
    system = "{% if message['role'] == 'system' %}\n{{ message['content'] }}\n{% endif %}\n{% if message['role']"
    files["chat_template.jinja"] = template.replace("{% if message['role']", system, 1).encode()
    file, reader = write_jsonl(tmp_path / "d.jsonl", [made]), Processor(files, processor.config)
    for room in range(1, 60):
        dataset = PackedDataset([file], reader, options(sequence_length=room, too_long="shorten"))
        info = dataset.measure(dataset.lines[0][0])
        assert not info or info[0].labelled > 0, "without an answer"
        assert dataset.counts == {"shortened" if info else "dropped": 1}
    assert info


def test_nothing_usable_says_so(processor: Processor, tmp_path: Path) -> None:
    dataset = PackedDataset([mixed_data(tmp_path, 6)], processor, options(sequence_length=8))
    with pytest.raises(UserError, match=r"--sequence-length: none of the 6 records .* 8 tokens \(6 dropped\)"):
        next(StepStream(dataset, 0).steps())


def truncate(folder: Path) -> dict[str, Any]:
    """Its header is whole, so that only decoding finds out."""
    name = picture(folder, "cut.png", 200, 200)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    return record("<image> What?", "<nothink>A.", name)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "broken line": (lambda _: '{"conversations": [', "broken JSON"),
    "missing image": (
        lambda _: record("<image> What?", "<nothink>A.", "gone.png"),
        "no image file at .*gone.png",
    ),
    "wrong marks": (lambda _: record("<image> What?", "<nothink>A."), "marks: 1, images: 0"),
    "no picture": (
        lambda f: record("<image> What?", "A.", write_jsonl(f / "x.png", ["?"]).name),
        "not a picture",
    ),
    "empty picture": (lambda f: record("<image> What?", "A.", write_jsonl(f / "e.png", []).name), "is empty"),
    "cut picture": (truncate, "cut.png: cannot be read as an image"),
}


def read_all(dataset: PackedDataset) -> list[tuple[GlobalBatch, list[PackedBatch], dict[str, int]]]:
    return read(prefetch(global_batches(dataset, 0)(), dataset, 0, 1))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_stops_the_run_with_its_line(processor: Processor, tmp_path: Path, kind: str) -> None:
    make, words = BAD[kind]
    lines = mixed_records(tmp_path, 6)
    file = write_jsonl(tmp_path / "d.jsonl", [*lines[:3], make(tmp_path), *lines[3:]])
    with pytest.raises(UserError, match=f"{re.escape(str(file))}:4: .*{words}"):
        read_all(PackedDataset([file], processor, options()))


@pytest.mark.parametrize("kind", BAD)
def test_skip_bad_counts_it_once_and_goes_on(
    processor: Processor, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, words = BAD[kind]
    lines = mixed_records(tmp_path, 6)
    file = write_jsonl(tmp_path / "d.jsonl", [*lines[:3], make(tmp_path), *lines[3:]])
    dataset = PackedDataset([file], processor, options(epochs=2), skip_bad=True)
    steps = read_all(dataset)
    assert sum(batch.documents for _, batches, _ in steps for batch in batches) == 12
    assert dataset.counts == {"bad": 1}
    assert steps[-1][2] == {"bad": 1}
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"skipped: {re.escape(str(file))}:4: .*{words}", line)


def test_a_sequence_of_bad_pictures_alone_is_left_out(processor: Processor, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [truncate(tmp_path), record("Hello?", "<nothink>A.")])
    lengths = [len(p) for p in StepStream(PackedDataset([file], processor, options()), 0).samples()]
    dataset = PackedDataset([file], processor, options(sequence_length=max(lengths), global_batch=2), skip_bad=True)
    [(step, batches, counts)] = read_all(dataset)
    assert len(step) == 2
    assert [batch.documents for batch in batches] == [1]
    assert counts == {"bad": 1}


def test_several_files_are_one_corpus(processor: Processor, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [record(f"Q{n}?", "<nothink>A.")] * n) for n in (1, 3)]
    dataset = PackedDataset(files, processor, options())
    assert sorted(order(dataset, 0, 0)) == [
        f"{tmp_path}/1.jsonl:1",
        *(f"{tmp_path}/3.jsonl:{i}" for i in (1, 2, 3)),
    ]
