"""The data at scale: lines found again, archives, mixtures, and the same steps whoever loads them."""

import dataclasses
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from phi4rv.batch import PackedBatch
from phi4rv.errors import UserError
from phi4rv.processing import image_files, images
from phi4rv.processing.image_files import ImageFiles
from phi4rv.processing.processor import Processor
from tests.small import mixed_data, mixed_records, picture, record, small_checkpoint, small_model, write_jsonl
from train.data.line_index import JsonLines
from train.data.loader import prefetch, prefetch_to_device
from train.data.mixture import DataSource, parse_sources
from train.data.packed_dataset import PackedDataset
from train.data.reader import Reader, time_limit
from train.data.stream import GlobalBatch, StepStream, count_steps, global_batches
from train.main import main
from train.recipe import Stage, stage


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_model()[1]


def options(**overrides: Any) -> Stage:
    return stage(2, False, {"sequence_length": 256, "global_batch": 5, **overrides})


def seen(step: GlobalBatch) -> Any:
    """All that a step says, but for what its samples' files are called."""
    samples = [[dataclasses.replace(p, line=None) for p in sequence] for sequence in step]
    return step.step, samples, step.row_flops, step.skipped, step.position


def rows(dataset: PackedDataset, rank: int = 0, world: int = 1) -> list[list[PackedBatch]]:
    return [list(ready.batches) for ready in prefetch(global_batches(dataset, 0)(), dataset, rank, world)]


def assert_same_rows(ours: list[list[PackedBatch]], theirs: list[list[PackedBatch]]) -> None:
    assert [len(step) for step in ours] == [len(step) for step in theirs]
    for mine, other in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Lines


@pytest.mark.parametrize("kept", [False, True])
def test_every_line_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    """Of large files by an index that is made once."""
    if kept:
        monkeypatch.setattr("train.data.line_index.INDEX_CACHE_MIN_BYTES", 0)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes("\n{1}\n \r\n\n{zwei é}\r\n{3}".encode())
    second.write_bytes(b"{4}\n\n")
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{5}\n{6}\n"))
    lines = JsonLines([first, second, packed], tmp_path / "cache")
    found = [(line.where, line.read().decode().strip()) for line in lines]
    assert found == [
        (f"{first}:2", "{1}"),
        (f"{first}:5", "{zwei é}"),
        (f"{first}:6", "{3}"),
        (f"{second}:1", "{4}"),
        (f"{packed}:1", "{5}"),
        (f"{packed}:2", "{6}"),
    ]
    assert len(lines) == 6
    with pytest.raises(IndexError):
        lines[6]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3 * kept
    if kept:
        monkeypatch.setattr("train.data.line_index._build_index", lambda _: pytest.fail("made again"))
        assert [line.where for line in JsonLines([first, second, packed], tmp_path / "cache")] == [w for w, _ in found]


def test_a_file_that_changes_under_the_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["{1}", "{2}"])
    line = JsonLines([path], tmp_path)[1]
    path.write_text("{1}\n")
    with pytest.raises(UserError, match=r"a.jsonl: has become shorter since the start"):
        line.read()
    path.unlink()
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read: No such file .* it was there at the start"):
        line.read()


def test_a_gzip_file_is_unpacked_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.jsonl.gz", tmp_path / "cache"
    path.write_bytes(gzip.compress(b"{1}\n"))
    assert JsonLines([path], cache)[0].read() == b"{1}"
    [copy] = cache.iterdir()
    copy.write_bytes(b"{x}\n")
    assert JsonLines([path], cache)[0].read() == b"{x}", "unpacked again"
    path.write_bytes(gzip.compress(b"{1, 2}\n"))
    assert JsonLines([path], cache)[0].read() == b"{1, 2}"
    path.write_bytes(gzip.compress(b"{1, 2}\n" * 99)[:-9])
    with pytest.raises(UserError, match=r"a.jsonl.gz: the gzip stream is broken"):
        JsonLines([path], cache)
    assert not [p for p in cache.iterdir() if "partial" in p.name]


def test_a_million_lines_take_eight_bytes_each(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(b"".join(b'{"conversations": %d}\n' % i for i in range(1_000_000)))
    tracemalloc.start()
    try:
        lines = JsonLines([path], tmp_path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(lines) == 1_000_000
    assert lines[987_654].read() == b'{"conversations": 987654}'
    assert lines[987_654].number == 987_655
    assert held < 10e6, "8 bytes a line"
    assert peak < 42e6, "while it grows, and in the end, it is copied"


# Sources


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "deep/c.jsonl", "deep/d.txt", "x=1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = {name: tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "deep/c.jsonl", "x=1.jsonl")}
    assert parse_sources([files["a.jsonl"], files["x=1.jsonl"]]) == [DataSource((files["a.jsonl"], files["x=1.jsonl"]))]
    assert parse_sources([tmp_path]) == [DataSource(tuple(files.values()))]
    assert parse_sources([f"{tmp_path}/**/*.jsonl"]) == [
        DataSource((files["a.jsonl"], files["deep/c.jsonl"], files["x=1.jsonl"]))
    ]
    weighted = parse_sources([f"{files['a.jsonl']}=1", f"{tmp_path}/deep=3"])
    assert weighted == [DataSource((files["a.jsonl"],), 0.25), DataSource((files["deep/c.jsonl"],), 0.75)]


def named_sources(folder: Path, sizes: dict[str, int]) -> list[Path]:
    return [
        write_jsonl(
            folder / f"{name}.jsonl", [record(f"{name} {i}?" + " Why?" * (i % 9), "<nothink>A.") for i in range(n)]
        )
        for name, n in sizes.items()
    ]


def test_a_mixture_has_its_shares_at_every_moment(processor: Processor, tmp_path: Path) -> None:
    """The report's fifth of reasoning traces, from a file much smaller than its share."""
    files = named_sources(tmp_path, {"reasoning": 7, "direct": 90, "text": 20})
    shares = dict(zip(files, (0.2, 0.7, 0.1), strict=True))
    dataset = PackedDataset(
        parse_sources([f"{file}={share}" for file, share in shares.items()]), processor, options(max_steps=9)
    )
    drawn: dict[Path, list[str]] = {file: [] for file in files}
    for number, info in enumerate(itertools.islice(StepStream(dataset, 0).samples(), 500), 1):
        drawn[info.line.file].append(info.where)
        for file, share in shares.items():
            assert abs(len(drawn[file]) - share * number) < 1.01
    small = drawn[files[0]]
    assert len(small) == 100
    for epoch in range(14):
        assert len(set(small[7 * epoch : 7 * epoch + 7])) == 7, "every record once an epoch"
    assert small[:7] != small[7:14]


# The same steps


def tricky_data(folder: Path) -> list[Path]:
    """Lines of several conversations, lines that are dropped, bad lines and pictures."""
    made: list[Any] = mixed_records(folder, 30)
    for i in range(0, 30, 7):
        made[i]["conversations"] *= 3
    made[4] = "not JSON"
    made[11] = record("Long?" * 400, "<nothink>A.")
    cut = folder / picture(folder, "cut.png", 90, 90)
    cut.write_bytes(cut.read_bytes()[:-99])
    made[17] = record("<image> What?", "<nothink>A.", "cut.png")
    return [write_jsonl(folder / "one.jsonl", made[:20]), write_jsonl(folder / "two.jsonl", made[20:])]


def test_data_that_has_grown_is_not_gone_on_with(processor: Processor, tmp_path: Path) -> None:
    [file] = named_sources(tmp_path, {"a": 20})
    [step] = itertools.islice(StepStream(PackedDataset([file], processor, options()), 0).steps(), 1)
    named_sources(tmp_path, {"a": 21})
    with pytest.raises(UserError, match=r"--resume: the data had \[20\] records when the run was saved, not \[21\]"):
        StepStream(PackedDataset([file], processor, options()), 0, step.position)


def test_a_data_file_that_vanishes_stops_even_with_skip_bad(processor: Processor, tmp_path: Path) -> None:
    file = mixed_data(tmp_path, 20)
    dataset = PackedDataset([file], processor, options(), skip_bad=True)
    [step] = itertools.islice(StepStream(dataset, 0).steps(), 1)
    file.unlink()
    with pytest.raises(UserError, match=r"data.jsonl: cannot be read"):
        dataset.load_row(step.sequences[0])


@pytest.mark.parametrize("mixed", [False, True], ids=["epochs", "mixture"])
def test_a_stream_goes_on_from_the_position_of_any_step(processor: Processor, tmp_path: Path, mixed: bool) -> None:
    files = tricky_data(tmp_path)
    chosen = options(max_steps=25) if mixed else options(epochs=3)
    data = parse_sources([f"{files[0]}=3", f"{files[1]}=1"]) if mixed else parse_sources(files)

    def dataset() -> PackedDataset:
        return PackedDataset(data, processor, chosen, skip_bad=True)

    whole = [seen(step) for step in StepStream(dataset(), 5).steps()]
    assert len(whole) == 25 if mixed else len(whole) > 15
    assert whole[-1][3] == {"bad": 1, "dropped": 1}
    for number, *_, position in whole[:-1:5]:
        position = json.loads(json.dumps(position))
        again = [seen(step) for step in StepStream(dataset(), 5, position).steps()]
        assert again == whole[number:]


def test_going_on_reads_nothing_again(processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = PackedDataset(named_sources(tmp_path, {"a": 900}), processor, options(max_steps=99))
    [*_, last] = itertools.islice(StepStream(dataset, 0).steps(), 40)
    calls = 0
    plan = Reader.measure

    def counting(self: Reader, line: Any) -> Any:
        nonlocal calls
        calls += 1
        return plan(self, line)

    monkeypatch.setattr(Reader, "measure", counting)
    step = next(StepStream(dataset, 0, last.position).steps())
    assert step.step == 41
    assert calls <= len(last.position["waiting"]) + 2 * sum(map(len, step)) + 2


def no_children(seconds: float = 10.0) -> bool:
    """Whether no process is left. The pool's own thread counts them out, at its own time."""
    end = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.01)
    return not multiprocessing.active_children()


def test_loader_processes_change_nothing(processor: Processor, tmp_path: Path) -> None:
    files = tricky_data(tmp_path)
    alone = PackedDataset(files, processor, options(epochs=2), skip_bad=True)
    ours, counts = rows(alone), alone.counts
    assert counts == {"bad": 2, "dropped": 1}
    many = PackedDataset(files, processor, options(epochs=2), skip_bad=True, workers=2)
    try:
        assert_same_rows(ours, rows(many))
        assert many.counts == counts
        assert count_steps(many, 0) == len(ours)
    finally:
        many.close()
    assert no_children()


class Exchange:
    """Ranks as threads: ``gather`` gives each what all have handed in."""

    def __init__(self, world: int):
        self.barrier = threading.Barrier(world, timeout=60)
        self.values: list[Any] = [None] * world

    def gather(self, rank: int) -> Any:
        def exchange(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        return exchange


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_that_share_the_measuring_make_the_same_steps(
    processor: Processor, tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, chosen = tricky_data(tmp_path), options(epochs=3)
    alone = [seen(step) for step in StepStream(PackedDataset(files, processor, chosen, skip_bad=True), 0).steps()]
    measured: list[str] = []
    plan = Reader.measure

    def noting(self: Reader, line: Any) -> Any:
        measured.append(line.where)
        return plan(self, line)

    monkeypatch.setattr(Reader, "measure", noting)
    exchange, found = Exchange(world), {}

    def run(rank: int) -> None:
        dataset = PackedDataset(
            files, processor, chosen, True, rank=rank, world_size=world, all_gather=exchange.gather(rank)
        )
        found[rank] = [seen(step) for step in StepStream(dataset, 0).steps()]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[rank] == alone for rank in range(world))
    assert len(measured) == 3 * 30, "each line is measured by one rank an epoch"


def test_a_rank_without_a_row_has_the_step_too(processor: Processor, tmp_path: Path) -> None:
    dataset = PackedDataset([mixed_data(tmp_path)], processor, options(global_batch=1, sequence_length=512))
    shares = [rows(dataset, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [len(shares[0])] * 3
    assert all(len(step) == 1 for step in shares[0])
    assert all(step == [] for step in shares[1] + shares[2])


# Archives


def tar_of(path: Path, names: list[str], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name in names:
            archive.add(path.parent / name, f"pictures/{name}")
    return path


def test_images_from_an_archive_are_those_from_files(processor: Processor, tmp_path: Path) -> None:
    made = mixed_records(tmp_path, 9)
    plain = write_jsonl(tmp_path / "plain.jsonl", made)
    tar_of(tmp_path / "shard.tar", [name for one in made for name in one["image"]])
    moved = [{**one, "image": [f"shard.tar/pictures/{name}" for name in one["image"]]} for one in made]
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in moved).encode()))
    ours = rows(PackedDataset([plain], processor, options()))
    for name in (name for one in made for name in one["image"]):
        (tmp_path / name).unlink()
    assert sum(len(batch.grids) for batch in itertools.chain(*ours)) == 9
    assert_same_rows(ours, rows(PackedDataset([packed], processor, options(), cache=tmp_path / "cache")))


def test_an_archives_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [picture(tmp_path, f"{i}.png", 20 + i, 20) for i in range(50)]
    path, cache = tar_of(tmp_path / "a.tar", names), tmp_path / "cache"
    ImageFiles(cache).check(path / "pictures/7.png")
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "_build_index", lambda _: pytest.fail("built again"))
        files = ImageFiles(cache)
        for name in names:
            assert files.source(path / "pictures" / name) == (tmp_path / name).read_bytes()
    picture(tmp_path, "0.png", 99, 99)
    os.utime(tar_of(path, names), (1, 1))
    assert ImageFiles(cache).source(path / "pictures/0.png") == (tmp_path / "0.png").read_bytes()


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    names = [picture(tmp_path, f"{i}.png", 300, 200) for i in range(3)]
    whole = tar_of(tmp_path / "a.tar", names)
    files = ImageFiles()
    with pytest.raises(UserError, match=r"no image file 'pictures/9.png' in the archive '.*a.tar'"):
        files.check(whole / "pictures/9.png")
    with pytest.raises(UserError, match=r"no image file at '.*b.tar/pictures/9.png'"):
        files.check(tmp_path / "b.tar/pictures/9.png")
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:1500])
    squeezed = tar_of(tmp_path / "gz.tar", names, "w:gz")
    for bad in (tmp_path / "cut.tar", squeezed, Path(write_jsonl(tmp_path / "no.tar", ["no archive"]))):
        with pytest.raises(UserError, match=rf"{bad.name}: not a whole, uncompressed tar archive"):
            files.check(bad / "pictures/0.png")


# Slow, broken, dead


def test_what_takes_too_long_is_left_out(processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pictures' readers, which turn nearly every exception into their own message."""
    made = [record("<image> What?", "<nothink>A.", picture(tmp_path, f"{i}.png", 40, 40)) for i in range(3)]
    path = write_jsonl(tmp_path / "d.jsonl", made)
    lines = JsonLines([path], tmp_path)
    slow = Reader(processor, options(), tmp_path, timeout=0.2)
    plans = [slow.measure(line)[0] for line in lines]

    def hanging(image: Any, label: str) -> Any:
        if label.endswith("1.png"):
            time.sleep(60)
        return decode(image, label)

    decode = images._decode
    monkeypatch.setattr(images, "_decode", hanging)
    loaded = slow.load_row(plans)
    assert loaded.batch is not None
    assert loaded.batch.documents == 2
    [(place, message)] = loaded.failures
    assert place == 1
    assert message == (f"{path}:2: {tmp_path}/1.png: not read within 0.2 s; check its disk, or raise --image-timeout")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_outlives_no_block() -> None:
    with time_limit(30, "a"), pytest.raises(ValueError):
        raise ValueError
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=r"b: not read within 0\.05 s"), time_limit(0.05, "b"):
        time.sleep(60)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_worker_that_dies_is_one_line(processor: Processor, tmp_path: Path) -> None:
    dataset = PackedDataset([mixed_data(tmp_path, 40)], processor, options(max_steps=999), workers=2)
    try:
        ahead = prefetch(global_batches(dataset, 0)(), dataset, 0, 1)
        assert list(next(ahead).batches)
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        with pytest.raises(UserError, match=r"^--workers: one of the 2 loader processes died .* --resume"):
            for ready in ahead:
                list(ready.batches)
    finally:
        dataset.close()


def test_a_bad_record_in_a_worker_stops_the_program_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [*mixed_records(tmp_path, 6), record("What?", "")])
    line = ["--checkpoint", small_checkpoint(tmp_path), "--data", data, "--output", tmp_path / "out", "--device", "cpu"]
    assert main([*map(str, line), "--workers", "1", "--sequence-length", "256", "--global-batch", "4"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"error: {data}:7: turn 2: 'value' is an empty string; give the turn's text"]
    assert no_children()


def test_the_loader_reads_ahead_but_not_without_bound(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row beside the one in use, however many a step has."""
    loaded = 0
    load = Reader.load_row

    def counting(self: Reader, sequence: Any) -> Any:
        nonlocal loaded
        loaded += 1
        return load(self, sequence)

    monkeypatch.setattr(Reader, "load_row", counting)
    dataset = PackedDataset([mixed_data(tmp_path, 40)], processor, options(global_batch=40))
    given = 0
    for ready in prefetch(global_batches(dataset, 0)(), dataset, 0, 1):
        for _ in ready.batches:
            given += 1
            assert loaded <= given + 1
    assert given == loaded > 5


def test_batches_reach_a_cpu_as_they_are(processor: Processor, tmp_path: Path) -> None:
    made = rows(PackedDataset([mixed_data(tmp_path)], processor, options()))

    def lazily() -> Iterator[PackedBatch]:
        yield from made[0]

    assert_same_rows([list(prefetch_to_device(lazily(), torch.device("cpu")))], [made[0]])


class Noted(torch.Tensor):
    """Says which stream will use it."""

    events: ClassVar[list[str]] = []

    def record_stream(self, stream: Any) -> None:
        self.events.append(f"kept for {stream.name}")


@dataclasses.dataclass
class Row:
    number: int
    values: torch.Tensor

    def to(self, device: Any, non_blocking: bool) -> "Row":
        assert non_blocking, "the thread that launches kernels would wait for the copy"
        Noted.events.append(f"copy {self.number} on {Cuda.current}")
        return self


class Cuda:
    """PyTorch's streams, as far as copying ahead knows of them."""

    current = "main"

    def __init__(self, name: str = "copies"):
        self.name = name

    def wait_stream(self, other: "Cuda") -> None:
        Noted.events.append(f"{self.name} waits for {other.name}")

    @staticmethod
    @contextmanager
    def stream(chosen: "Cuda") -> Iterator[None]:
        Cuda.current = chosen.name
        yield
        Cuda.current = "main"


def test_batches_are_copied_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what a GPU is told; each copy is asked for while the row before it is computed."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Cuda())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Cuda("main"))
    monkeypatch.setattr(torch.cuda, "stream", Cuda.stream)
    Noted.events.clear()
    made = [Row(i, torch.zeros(1).as_subclass(Noted)) for i in range(2)]
    for row in prefetch_to_device(made, SimpleNamespace(type="cuda")):  # type: ignore[arg-type]
        Noted.events.append(f"compute {row.number} on {Cuda.current}")
    assert Noted.events == [
        *("copy 0 on copies", "main waits for copies", "kept for main", "compute 0 on main"),
        *("copy 1 on copies", "main waits for copies", "kept for main", "compute 1 on main"),
    ]


def test_the_order_of_a_source_is_its_own(processor: Processor, tmp_path: Path) -> None:
    files = named_sources(tmp_path, {"a": 30, "b": 30})
    dataset = PackedDataset(parse_sources([f"{file}=1" for file in files]), processor, options(max_steps=9))
    orders = {tuple(map(int, dataset.epoch_order(*which))) for which in itertools.product((0, 1), repeat=3)}
    assert len(orders) == 8, "of source, seed and epoch"
