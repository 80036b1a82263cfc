"""The reader by way of its buffers, with copies that come as late as a GPU's may, against the files' own tensors."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phi4rv import UserError
from phi4rv.checkpoint import tensor_reader
from phi4rv.checkpoint.tensor_reader import StagingBuffers, TensorInfo, read_header, read_staged, read_tensors

CHUNK_BYTES, BUFFERS, PREFETCH_BYTES = 1000, 4, 2500
CPU = torch.device("cpu")
KINDS = [*tensor_reader.DTYPES.values()]


class LateCopy:
    """A copy that happens when somebody waits for it: until then the target holds rubbish."""

    def __init__(self, buffer: Tensor, target: Tensor):
        self.buffer, self.target, self.lock = buffer, target, threading.Lock()
        target.fill_(0xA5)

    def synchronize(self) -> None:
        with self.lock:
            if self.target is not None:
                self.target.copy_(self.buffer)
            self.target = None


class LateStaging(StagingBuffers):
    def __init__(self) -> None:
        self.free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(BUFFERS):
            self.free.put((torch.full((CHUNK_BYTES,), 0x5A, dtype=torch.uint8), None))
        self.said: list[str] = []

    def wait_for_compute(self) -> None:
        self.said.append("wait_for_compute")

    def copy_async(self, buffer: Tensor, target: Tensor) -> LateCopy:
        return LateCopy(buffer, target)

    def wait_for_copy(self, event: LateCopy) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        self.said.append("synchronize")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in (
        ("CHUNK_BYTES", CHUNK_BYTES),
        ("BUFFERS", BUFFERS),
        ("THREADS", 3),
        ("PREFETCH_BYTES", PREFETCH_BYTES),
    ):
        monkeypatch.setattr(tensor_reader, name, value)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert threading.active_count() == threads, "a thread was left behind"
    assert len(os.listdir("/proc/self/fd")) == files, "a file was left open"


def rubbish(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bytes, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    for length in shape:
        size *= length
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files: every dtype, lengths around CHUNK_BYTES, nothing, and a scalar."""
    shapes = [
        (3, 5),
        (40, 50),
        (),
        (0, 4),
        (CHUNK_BYTES - 1,),
        (CHUNK_BYTES,),
        (CHUNK_BYTES + 1,),
        (2 * CHUNK_BYTES + 500,),
    ]
    made = {
        f"{dtype}-{number}".removeprefix("torch."): rubbish(*shape, dtype=dtype, seed=number)
        for dtype in KINDS
        for number, shape in enumerate(shapes)
    }
    names = list(made)
    save_file({n: made[n] for n in names[::2]}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({n: made[n] for n in names[1::2]}, tmp_path / "b.safetensors")
    return tmp_path


def in_folder(folder: Path) -> tuple[list[TensorInfo], dict[str, Tensor]]:
    """In an order that is not the files', and the tensors themselves."""
    files = sorted(folder.glob("*.safetensors"))
    items = sorted((item for file in files for item in read_header(file)), key=lambda item: item.name)
    return items, {name: t for file in files for name, t in load_file(file).items()}


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, which NaN would hide."""
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.mark.parametrize("late", [True, False])
def test_every_byte_in_the_order_asked_for(folder: Path, late: bool) -> None:
    items, right = in_folder(folder)
    given = [
        (item.name, t.clone())
        for item, t in (read_staged(items, CPU, LateStaging()) if late else read_tensors(items, CPU))
    ]
    assert [name for name, _ in given] == [item.name for item in items] and len(given) == 8 * len(KINDS)
    assert [name for name, t in given if not same(t, right[name])] == []


def test_reads_that_stop_short_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, views, place: whole(f, [views[0][:77]], place))
    items, right = in_folder(folder)
    assert [item.name for item, t in read_staged(items, CPU, LateStaging()) if not same(t, right[item.name])] == []


def test_what_is_on_its_way_is_bounded(folder: Path) -> None:
    """Behind the tensor in hand: less than PREFETCH_BYTES bytes and one more tensor, but at least one."""
    items, _ = in_folder(folder)
    sizes, staging = [item.size for item in items], LateStaging()
    most = 0
    for number, _ in enumerate(read_staged(items, CPU, staging)):
        begun = staging.said.count("wait_for_compute")
        assert begun >= min(len(items), number + 2), "the next one is under way while this one is used"
        behind = sizes[number + 1 : begun]
        assert sum(behind[:-1]) < PREFETCH_BYTES
        most = max(most, len(behind))
    assert most > 3 and staging.said.count("synchronize") == 1


def test_nothing_asked_for_gives_nothing() -> None:
    assert list(read_staged([], CPU, LateStaging())) == list(read_tensors([], CPU)) == []


@pytest.mark.parametrize("size", [10, 3000, 20_000])
def test_a_file_that_is_cut_while_it_is_read(folder: Path, size: int) -> None:
    items, _ = in_folder(folder)
    file = folder / "b.safetensors"
    os.truncate(file, size)
    with pytest.raises(UserError, match=rf"^{file}: ends inside \w+-\d: it was cut while it was read$"):
        list(read_staged(items, CPU, LateStaging()))


def test_a_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be read \(Input/output error\)$"):
        list(read_staged(in_folder(folder)[0], CPU, LateStaging()))


def test_who_stops_early_leaves_nothing_running(folder: Path) -> None:
    staging = LateStaging()
    tensors = read_staged(in_folder(folder)[0], CPU, staging)
    next(tensors)
    tensors.close()
    assert staging.said[-1] == "synchronize"


def test_inside_inference_mode(folder: Path) -> None:
    """Which reaches the calling thread alone: others may not write to tensors made in it."""
    items, right = in_folder(folder)
    with torch.inference_mode():
        assert all(same(t, right[item.name]) for item, t in read_staged(items, CPU, LateStaging()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pieces; the device is kept busy with each tensor while the next ones come."""
    monkeypatch.undo()
    right = {f"{i}": rubbish(size, dtype=torch.int8, seed=i) for i, size in enumerate([10**8, 5, 3 * 10**7] * 4)}
    save_file(right, tmp_path / "a.safetensors")
    items = read_header(tmp_path / "a.safetensors")
    busy = torch.randn(4096, 4096, device="cuda")
    kept = {}
    for item, tensor in read_tensors(items, "cuda"):
        for _ in range(5):
            busy = busy @ busy / busy.norm()
        kept[item.name] = tensor.clone()
    assert [name for name, t in kept.items() if not torch.equal(t.cpu(), right[name])] == []
