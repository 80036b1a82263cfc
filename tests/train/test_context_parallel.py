"""Ranks that share a row against one that has it whole: loss and gradients in float64, and runs of the program."""

import traceback
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from phi4rv.batch import NO_LABEL, PackedBatch, Sample, pack
from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.images import PATCH_DIM
from tests.processes import finish, read_log, run, start, until_step_three
from tests.small import mixed_records, picture, record, saved_bytes, small_checkpoint, small_config, write_jsonl
from tests.train.test_fsdp import assert_close
from train.distributed.context_parallel import (
    check_heads,
    init_context_parallel,
    kv_head_index,
    local_heads,
    shard_sequence,
)
from train.distributed.fsdp import with_dummy_image
from train.distributed.ranks import Ranks, init_distributed
from train.figures.metrics import read_metrics
from train.synthetic.tiny_model import init_weights

# Documents of a row: tokens, and where in it images begin, with their rows and columns.
ROWS: dict[str, list[tuple[int, list[tuple[int, int, int]]]]] = {
    "cut inside a document": [(12, [])],
    "cut inside an image": [(14, [(2, 2, 5)])],
    "an image on both sides, one on a cut": [(10, [(1, 1, 3)]), (3, []), (17, [(0, 2, 3), (8, 3, 3)])],
    "an image in the last part alone": [(15, []), (6, [(1, 2, 2)])],
    "an odd number of tokens": [(5, []), (6, [(1, 1, 2)]), (2, [])],
    "documents of one token": [(1, [])] * 7,
    "one token": [(1, [])],
    "fewer tokens than ranks": [(2, []), (1, [])],
}


def made(name: str) -> PackedBatch:
    generator = torch.Generator().manual_seed(len(name))
    samples = []
    for length, images in ROWS[name]:
        ids = torch.randint(0, 1000, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.7, ids, NO_LABEL)
        places = [torch.arange(begin, begin + rows * cols) for begin, rows, cols in images]
        grids = torch.tensor([image[1:] for image in images], dtype=torch.int32).view(-1, 2)
        patches = torch.randn(sum(map(len, places)), PATCH_DIM, generator=generator)
        positions = torch.cat([torch.zeros(0, dtype=torch.int64), *places])
        samples.append(Sample(ids, labels, patches, grids, positions, reasoning=length % 2 == 0))
    return pack(samples)


def text(length: int) -> Sample:
    ids, nothing = torch.arange(length), torch.zeros(0, dtype=torch.int64)
    return Sample(ids, ids, torch.zeros(0, PATCH_DIM), torch.zeros(0, 2, dtype=torch.int32), nothing)


@pytest.mark.parametrize(("name", "count"), [*product(ROWS, (2, 3, 4))])
def test_parts_make_the_row(name: str, count: int) -> None:
    row = made(name)
    parts = shard_sequence(row, count)
    assert max(len(p.input_ids) for p in parts) - min(len(p.input_ids) for p in parts) <= 1
    for field in ("input_ids", "positions", "labels"):
        assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(row, field)), field
    assert torch.equal(torch.cat([p.targets() for p in parts]), row.targets())
    assert torch.equal(torch.cat([p.reasoning_rows() for p in parts]), row.reasoning_rows())
    starts = list(parts[0].bounds[:-1])
    assert torch.equal(
        torch.cat([p.image_positions + s for p, s in zip(parts, starts, strict=True)]), row.image_positions
    )
    assert torch.equal(torch.cat([p.drop_dummy_patches(p.patches) for p in parts]), row.patches)
    shown = {int(i) for i in torch.bucketize(row.image_positions, row.cu_seqlens[1:], right=True)}
    assert shown == {number for number, (_, images) in enumerate(ROWS[name]) if images}
    for part, (begin, end) in zip(parts, pairwise(parts[0].bounds), strict=True):
        # Images are whole, and no image is here that has no token here.
        assert part.grids.prod(1).tolist() == part.cu_patches.diff().tolist()
        assert len(part.patches) == int(part.cu_patches[-1])
        assert part.max_patches == max(part.grids.prod(1).tolist(), default=0)
        firsts = row.image_positions[row.cu_patches[:-1].long()]
        here = (firsts < end) & (firsts + row.grids.prod(1) > begin)
        assert torch.equal(part.grids, row.grids[here])
        assert part.input_ids.untyped_storage().nbytes() == part.input_ids.nbytes, "a view sends the whole row"
        assert part.patches.untyped_storage().nbytes() == part.patches.nbytes


@pytest.mark.parametrize(("heads", "keys", "size"), [(40, 10, n) for n in (1, 2, 4, 5, 8, 10, 20, 40)] + [(6, 2, 3)])
def test_each_query_head_reads_its_key_head(heads: int, keys: int, size: int) -> None:
    seen = []
    for rank in range(size):
        queries, keyed = local_heads(rank, size, heads, keys)
        read = kv_head_index(rank, size, heads, keys)
        each, rest = divmod(heads // size, len(read))  # attention's rule: query head h reads key head h // each
        assert rest == 0
        for number, head in enumerate(range(queries.start, queries.stop)):
            assert keyed.start + read[number // each] == head // (heads // keys)
            seen.append(head)
        assert {*range(keyed.stop - keyed.start)} == {*read}, "a key head is sent that nobody reads"
        assert keys % size or read == [*range(keys // size)], "repeated without need"
    assert seen == list(range(heads))


def test_wrong_numbers_of_heads_and_processes() -> None:
    with pytest.raises(UserError, match="--context: 4 processes cannot share 2 query heads evenly; give one of 1, 2"):
        check_heads(small_config(), 4)
    with pytest.raises(UserError, match=r"--context: 6 process.es. cannot share rows 4 at a time; give a divisor of 6"):
        init_context_parallel(4, Ranks(0, 6))
    with pytest.raises(UserError, match=r"12 process.es. in 2 replicas .* 4 at a time; give a divisor of 6"):
        init_context_parallel(4, Ranks(0, 12), replicas=2)
    with pytest.raises(UserError, match=r"--context: 1 process.es. cannot share rows 0 at a time"):
        init_context_parallel(0, Ranks())
    assert init_context_parallel(1, Ranks(0, 6), replicas=4).size == 1


def model_of(heads: int, keys: int, trains: str) -> Phi4RV:
    config = replace(small_config(), hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=keys)
    model = empty_model(config, "cpu", torch.float32).to_empty(device="cpu")
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(trains))
    return model.double()


def gradients(model: Phi4RV, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Also, under ``loss``, what the batch adds to loss and labelled tokens, in all and of those that reason."""
    total, sums = model.loss_sum_by_mode(batch)
    if total.requires_grad:
        total.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found | {"loss": sums}


def compare(arguments: Any) -> int:
    try:
        compare_parts(*arguments)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def compare_parts(size: int, cases: list[tuple[int, int, str, str]]) -> None:
    """In each process: the sums over all of them are what one has of the whole row."""
    cp = init_context_parallel(size, init_distributed(torch.device("cpu")))
    for heads, keys, trains, checkpointing in cases:
        model = model_of(heads, keys, trains)
        for name in ROWS:
            row = made(name)
            expected = gradients(model, with_dummy_image(row))
            model.set_checkpointing(checkpointing)
            found = gradients(model, with_dummy_image(cp.shard(row)))
            model.set_checkpointing("none")
            summed = torch.cat([ours.flatten() for ours in found.values()])
            dist.all_reduce(summed)
            parts = summed.split([ours.numel() for ours in found.values()])
            for (parameter, whole), ours in zip(expected.items(), parts, strict=True):
                # float64's rounding, of sums in another order.
                torch.testing.assert_close(
                    ours.view_as(whole),
                    whole,
                    rtol=1e-9,
                    atol=1e-11,
                    msg=lambda m, what=f"{name}, {heads} heads, {keys} keys, {trains}, {parameter}": f"{what}: {m}",
                )
    model, long = model_of(4 * size, size, ""), pack([text(300), text(212)])
    kept = [saved_bytes(partial(model.loss_sum, with_dummy_image(b)), model) for b in (long, cp.shard(long))]
    assert kept[1] < 1.02 / size * kept[0], "a part keeps more than its share of the activations"
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, [(2, 1, "", "none"), (4, 2, "", "full"), (6, 3, "", "none"), (4, 2, "projector.", "full")]),
        (3, [(6, 2, "", "none"), (3, 3, "vision.", "full")]),
        (4, [(8, 2, "", "full"), (12, 3, "", "none"), (4, 1, "projector.", "none")]),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_row(size: int, cases: list[Any], tmp_path: Path) -> None:
    """Key heads that the ranks divide, and that they do not; the projector alone, whose gradient comes from others."""
    status = finish(start(size, tmp_path / "log", (size, cases), compare))
    assert status == [0] * size, read_log(tmp_path / "log")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Five steps, four of them of three rows, which two cannot share evenly; most have images, of which one breaks off
    behind its header.
    """
    folder = tmp_path_factory.mktemp("inputs")
    lines = mixed_records(folder, 9) + [record(f"Say {i}. " * (i % 4 + 1), f"<nothink>{i}.") for i in range(8)]
    broken = folder / picture(folder, "broken.png", 60, 60)
    broken.write_bytes(broken.read_bytes()[:100])
    lines.insert(2, record("<image> What?", "<nothink>Nothing.", broken.name))
    data = write_jsonl(folder / "data.jsonl", lines)
    line = ["--checkpoint", small_checkpoint(folder), "--data", data, "--device", "cpu", "--stage", 2, "--skip-bad"]
    line += ["--max-steps", 5, "--global-batch", 6, "--sequence-length", 128, "--warmup", 1, "--lr", 1e-3, "--seed", 3]
    return [*line, "--save-every", 2]


@pytest.fixture(scope="module")
def single(inputs: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("single")
    assert run(1, output / "log", [*inputs, "--output", output / "out"]) == [0], read_log(output / "log")
    return output / "out"


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ["--shard", "optimizer", "--checkpointing", "full", "--workers", 1]),
        (4, ["--shard", "none"]),
        (4, ["--shard", "gradients"]),
        (4, ["--shard", "full", "--replicas", 2, "--checkpointing", "full"]),
    ],
)
def test_processes_that_share_rows_are_one(
    inputs: list[Any], single: Path, tmp_path: Path, world: int, options: list[Any]
) -> None:
    """float32; the tolerances are ``test_parallel``'s: sums over ranks, in another order."""
    log, output = tmp_path / "log", tmp_path / "out"
    argv = [*inputs, "--output", output, "--context", 2, *options]
    assert run(world, log, argv) == [0] * world, "".join(read_log(log, rank) for rank in range(world))
    assert_close(output, single)
    assert "context parallel: 2 processes share each packed row" in read_log(log)
    assert "data: 1 bad" in read_log(log), "a row is read by one of the ranks that share it"
    pairs = zip(read_metrics(output / "metrics.jsonl"), read_metrics(single / "metrics.jsonl"), strict=True)
    for ours, theirs in pairs:
        for name in ("labelled", "labelled_reasoning", "tokens", "images", "operations"):
            assert ours[name] == theirs[name]
        assert ours["tflops"] * ours["seconds"] * world == pytest.approx(theirs["tflops"] * theirs["seconds"])


@pytest.mark.parametrize(("before", "after"), [((2, 2, "full"), (1, 1, "none")), ((2, 1, "none"), (4, 2, "full"))])
def test_goes_on_under_another_context(
    inputs: list[Any], single: Path, tmp_path: Path, before: tuple[int, int, str], after: tuple[int, int, str]
) -> None:
    log, output = tmp_path / "log", tmp_path / "out"

    def argv(context: int, shard: str) -> list[str]:
        return [str(a) for a in [*inputs, "--output", output, "--resume", "--context", context, "--shard", shard]]

    terminated = start(before[0], log, argv(*before[1:]), until_step_three)
    assert finish(terminated) == [143] * before[0], read_log(log)
    assert (output / "step-3").is_dir() and not (output / "model").exists()
    assert run(after[0], log, argv(*after[1:])) == [0] * after[0], read_log(log)
    assert_close(output, single)


@pytest.mark.parametrize("options", [["--lora-rank", 4, "--lora-targets", "qkv_proj,fc1"], ["--stage", 1]])
def test_what_a_stage_trains_alone(inputs: list[Any], tmp_path: Path, options: list[Any]) -> None:
    """Adapters; the projector, where a rank whose part has no image has the gradients of the other's to send."""
    figures = []
    for world in (1, 2):
        log, output = tmp_path / f"log-{world}", tmp_path / str(world)
        argv = [*inputs, "--output", output, "--context", world, "--max-steps", 3, *options]
        assert run(world, log, argv) == [0] * world, read_log(log)
        figures.append([(e["loss"], e["grad_norm"]) for e in read_metrics(output / "metrics.jsonl") if "loss" in e])
    assert len(figures[0]) == 3
    for ours, theirs in zip(*figures, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_wrong_options(inputs: list[Any], tmp_path: Path) -> None:
    for world, context, words in (
        (3, 2, "--context: 3 process(es) cannot share rows 2"),
        (4, 4, "share 2 query heads"),
    ):
        log = tmp_path / f"log-{world}"
        argv = [*inputs, "--output", tmp_path / f"out-{world}", "--context", context]
        assert run(world, log, argv) == [2] * world, read_log(log)
        assert words in read_log(log) and "Traceback" not in read_log(log)
