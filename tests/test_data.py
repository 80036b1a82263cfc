"""From files to steps: order, records too long, records that are bad, and what counts them."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import mixed_data, mixed_records, picture, record, small_model, write_jsonl

from phi4rv.batch import NO_LABEL
from phi4rv.errors import UserError
from phi4rv.processor import Processor
from train.data import Corpus, prefetch, run_steps
from train.recipe import Stage, stage


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_model()[1]


def options(**overrides: Any) -> Stage:
    return stage(2, False, {"sequence_length": 256, "global_batch": 5, **overrides})


def where(planned: Any) -> str:
    return planned.record.where


def order(corpus: Corpus, seed: int, epoch: int) -> list[str]:
    return [where(planned) for planned in corpus.epoch(seed, epoch)]


def layout(corpus: Corpus, seed: int, count: int = 99) -> list[list[list[str]]]:
    steps = itertools.islice(run_steps(corpus, seed)(), count)
    return [[[where(p) for p in sequence] for sequence in step] for step in steps]


def long_conversation(folder: Path) -> dict[str, Any]:
    """Three questions; the first shows one picture, the second two, the third none."""
    made = record("<image> One?", "<nothink>Red.", picture(folder, "a.png", 40, 40))
    made["image"] += [picture(folder, "b.png", 60, 30), picture(folder, "c.png", 30, 60)]
    made["conversations"][0] += record("<image> and <image>, two?", "<nothink>Blue.")["conversations"][0]
    made["conversations"][0] += record("Three?" + " Why?" * 40, "<nothink>Green.")["conversations"][0]
    return made


def test_the_order_is_a_function_of_seed_and_epoch(processor: Processor, tmp_path: Path) -> None:
    file = mixed_data(tmp_path, 20)
    corpus, again = (Corpus([file], processor, options()) for _ in range(2))
    orders = [order(corpus, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(found) == sorted(orders[0]) and len(set(found)) == 20 for found in orders)
    assert len(set(map(tuple, orders))) == 4
    assert order(again, 1, 1) == orders[3], "whatever was read before"
    samples = itertools.islice(corpus.samples(0), 40)
    assert [where(planned) for planned in samples] == orders[0] + orders[1]


def test_file_order_keeps_the_first_epoch_as_written(processor: Processor, tmp_path: Path) -> None:
    file = mixed_data(tmp_path, 20)
    corpus = Corpus([file], processor, options(order="file"))
    assert order(corpus, 0, 0) == [record.where for record in corpus.records]
    assert order(corpus, 0, 1) == order(Corpus([file], processor, options()), 0, 1) != order(corpus, 0, 0)


def test_steps_hold_the_global_batch_and_repeat_exactly(processor: Processor, tmp_path: Path) -> None:
    file = mixed_data(tmp_path, 20)
    corpus = Corpus([file], processor, options(epochs=2))
    steps = layout(corpus, 0)
    assert steps == layout(Corpus([file], processor, options(epochs=2)), 0)
    assert steps != layout(corpus, 1)
    assert all(sum(map(len, step)) >= 5 > sum(map(len, step[:-1])) for step in steps[:-1])
    flat = [name for step in steps for sequence in step for name in sequence]
    assert sorted(flat) == sorted(2 * order(corpus, 0, 0)), "every record once an epoch"
    assert len(layout(Corpus([file], processor, options(max_steps=17)), 0)) == 17


def test_ranks_share_every_step_without_loss(processor: Processor, tmp_path: Path) -> None:
    corpus = Corpus([mixed_data(tmp_path, 20)], processor, options(global_batch=9))
    source = run_steps(corpus, 0)
    alone = list(prefetch(source(), corpus, 0, 1))
    shares = [list(prefetch(source(), corpus, rank, 3)) for rank in range(3)]
    for number, (step, batches, _) in enumerate(alone):
        assert len(step) == len(batches)
        for place, batch in enumerate(batches):
            share = shares[place % 3][number][1][place // 3]
            for field in dataclasses.fields(batch):
                ours, theirs = getattr(batch, field.name), getattr(share, field.name)
                assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert sum(len(shares[rank][number][1]) for rank in range(3)) == len(batches)


def test_too_long_is_dropped_and_counted_once(processor: Processor, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [*mixed_records(tmp_path, 4), long_conversation(tmp_path)])
    corpus = Corpus([file], processor, options(sequence_length=120))
    for epoch in range(2):
        assert len(order(corpus, 0, epoch)) == 4
    assert corpus.counts == {"dropped": 1}
    assert corpus.summary() == "1 dropped"


@pytest.mark.parametrize(("room", "turns", "pictures"), [(300, 3, 3), (150, 2, 3), (60, 1, 1), (10, 0, 0)])
def test_too_long_loses_its_last_turns_whole(
    processor: Processor, tmp_path: Path, room: int, turns: int, pictures: int
) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [long_conversation(tmp_path)])
    corpus = Corpus([file], processor, options(sequence_length=room, too_long="shorten"))
    planned = corpus.plan(corpus.records[0])
    assert corpus.counts == ({} if turns == 3 else {"shortened": 1} if turns else {"dropped": 1})
    if not turns:
        assert planned is None
        return
    assert planned is not None
    sample = planned.sample
    answers = [f"<|dummy_84|>{colour}.<|im_end|>" for colour in ("Red", "Blue", "Green")[:turns]]
    assert processor.decode(sample.labels[sample.labels != NO_LABEL].tolist()) == "".join(answers)
    assert len(sample) <= room
    assert len(sample.grids) == pictures
    assert len(sample.image_positions) == int(sample.grids.prod(1).sum()), "an image was cut"
    batch = corpus.load([planned])
    assert batch is not None
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
        corpus = Corpus([file], reader, options(sequence_length=room, too_long="shorten"))
        planned = corpus.plan(corpus.records[0])
        assert planned is None or planned.sample.labels.max() > 0, "without an answer"
        assert corpus.counts == {"shortened" if planned else "dropped": 1}
    assert planned is not None


def test_nothing_usable_says_so(processor: Processor, tmp_path: Path) -> None:
    corpus = Corpus([mixed_data(tmp_path, 6)], processor, options(sequence_length=8))
    with pytest.raises(UserError, match=r"--sequence-length: none of the 6 records .* 8 tokens \(6 dropped\)"):
        next(corpus.epoch(0, 0))


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


def read_all(corpus: Corpus) -> list[tuple[Any, Any, dict[str, int]]]:
    return list(prefetch(run_steps(corpus, 0)(), corpus, 0, 1))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_stops_the_run_with_its_line(processor: Processor, tmp_path: Path, kind: str) -> None:
    make, words = BAD[kind]
    lines = mixed_records(tmp_path, 6)
    file = write_jsonl(tmp_path / "d.jsonl", [*lines[:3], make(tmp_path), *lines[3:]])
    with pytest.raises(UserError, match=f"{re.escape(str(file))}:4: .*{words}"):
        read_all(Corpus([file], processor, options()))


@pytest.mark.parametrize("kind", BAD)
def test_skip_bad_counts_it_once_and_goes_on(
    processor: Processor, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, words = BAD[kind]
    lines = mixed_records(tmp_path, 6)
    file = write_jsonl(tmp_path / "d.jsonl", [*lines[:3], make(tmp_path), *lines[3:]])
    corpus = Corpus([file], processor, options(epochs=2), skip_bad=True)
    steps = read_all(corpus)
    assert sum(batch.documents for _, batches, _ in steps for batch in batches) == 12
    assert corpus.counts == {"bad": 1}
    assert steps[-1][2] == {"bad": 1}
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"skipped: {re.escape(str(file))}:4: .*{words}", line)


def test_a_sequence_of_bad_pictures_alone_is_left_out(processor: Processor, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [truncate(tmp_path), record("Hello?", "<nothink>A.")])
    lengths = [len(p.sample) for p in Corpus([file], processor, options()).epoch(0, 0)]
    corpus = Corpus([file], processor, options(sequence_length=max(lengths), global_batch=2), skip_bad=True)
    [(step, batches, counts)] = read_all(corpus)
    assert len(step) == 2
    assert [batch.documents for batch in batches] == [1]
    assert counts == {"bad": 1}


def test_several_files_are_one_corpus(processor: Processor, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [record(f"Q{n}?", "<nothink>A.")] * n) for n in (1, 3)]
    corpus = Corpus(files, processor, options())
    assert sorted(order(corpus, 0, 0)) == [
        f"{tmp_path}/1.jsonl:1",
        *(f"{tmp_path}/3.jsonl:{i}" for i in (1, 2, 3)),
    ]
