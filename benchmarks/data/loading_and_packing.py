"""What loading costs on one core, and what padding would have cost: ``python -m benchmarks.data [--json FILE]``.

- **padding**: the share of tokens and patches that would be padding, on the samples of ``mixture.py``: in
  micro-batches padded to their longest sample, as a plain collator makes them, and with every image padded to 3600
  patches, as the published code does. Ours is 0. ``operations`` is what a step so padded multiplies, with the
  output layer on every token, over what ours does.
- **packing**: milliseconds for each sample to fill sequences of 8192 and to share a step out, how full the sequences
  are, and how much longer than the mean the busiest of 2, 8 and 64 ranks works.
- **loading**: images a second and core, from JPEG files and JSON lines to the batch that the model takes: ours
  beside a plain PyTorch DataLoader with transformers' image processor and tokenizer, each in its own process
  (0 workers, by the processor's time, which neighbours do not lengthen) and in one worker (by the clock). The peer
  pads to 3600 patches and to the longest sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.data.mixture import SampleLengths, mixture
from benchmarks.images import MAX_PATCHES, MIN_PATCHES, synthetic_image
from benchmarks.jobs import ROOT
from benchmarks.kernels.timing import relative_iqr
from benchmarks.options import json_option
from benchmarks.report.result_files import write_results
from benchmarks.report.rows import Row
from phi4rv.batch import NO_LABEL
from phi4rv.command_line import Parser, exit_status
from phi4rv.config import Config
from phi4rv.processing.processor import Processor
from train import recipe
from train.data.flops import flops
from train.data.loader import prefetch
from train.data.packed_dataset import PackedDataset
from train.data.packing import balance_rows, imbalance, pack_sequences
from train.data.stream import global_batches

CHECKPOINT = ROOT / "tests" / "data" / "tiny-checkpoint"
SIZES = [(1280, 720), (1024, 680), (640, 480), (300, 200)]
MICRO_BATCH = 4  # samples of a padded micro-batch; of this mixture a sequence of 8192 holds 3.7
IMAGES, ROUNDS = 24, 5
WORLDS = (2, 8, 64)


def padding(samples: list[SampleLengths]) -> dict[str, Any]:
    """Shares of padding, and the operations of a padded step over those of a packed one."""
    config = Config()
    groups = [samples[i : i + MICRO_BATCH] for i in range(0, len(samples), MICRO_BATCH)]
    patches = [n for s in samples for n in s.patches]
    labelled = sum(s.labelled for s in samples)
    ours = flops(config, [s.length for s in samples], patches, labelled)
    longest = [max(s.length for s in group) for group in groups for _ in group]
    padded = flops(config, longest, [MAX_PATCHES for _ in patches], sum(longest))
    return {
        "benchmark": "data",
        "case": "padding",
        "samples": len(samples),
        "tokens": 1 - sum(s.length for s in samples) / sum(longest),
        "patches": 1 - sum(patches) / (MAX_PATCHES * len(patches)),
        "operations": padded.total / ours.total,
        "ours": 0.0,
    }


def packing(steps: int = 2) -> dict[str, Any]:
    """Time to pack and share out full steps of the report's stage 2."""
    stage, config = recipe.stage(2, False, {}), Config()
    rows = pack_sequences(mixture(), lambda s: s.length, stage.sequence_length)
    drawn = _seconds(lambda: list(islice(mixture(), 2000))) / 2000  # making up the lengths is no part of it
    samples, seconds, full, worst = 0, 0.0, 0, dict.fromkeys(WORLDS, 0.0)
    sequences = 704  # near 1920 samples of the report's mean length, and a multiple of 64
    for _ in range(steps):
        begun = time.perf_counter()
        step = list(islice(rows, sequences))
        costs = [
            flops(config, [s.length for s in r], [n for s in r for n in s.patches], sum(s.labelled for s in r))
            for r in step
        ]
        totals = [cost.total for cost in costs]
        shares = {world: balance_rows(totals, world) for world in WORLDS}
        seconds += time.perf_counter() - begun
        samples += sum(map(len, step))
        full += sum(s.length for r in step for s in r)
        worst = {world: max(worst[world], imbalance(totals, shares[world])) for world in WORLDS}
    return {
        "benchmark": "data",
        "case": "packing",
        "samples": samples,
        "ms_per_sample": 1e3 * (seconds / samples - drawn),
        "filling": full / (steps * sequences * stage.sequence_length),
        **{f"imbalance_{world}": worst[world] for world in WORLDS},
    }


def make_data(folder: Path) -> Path:
    """JPEG images of four sizes, each with a question and an answer of 60 words."""
    path = folder / "data.jsonl"
    with path.open("w") as lines:
        for i in range(IMAGES):
            name = f"{i}.jpg"
            synthetic_image(*SIZES[i % len(SIZES)]).save(folder / name, quality=90)
            turns = [("human", f"<image>\nWhat is in picture {i}?"), ("gpt", "<nothink>" + "A thing of note. " * 15)]
            said = [{"from": who, "value": text} for who, text in turns]
            lines.write(json.dumps({"image": name, "conversations": [said]}) + "\n")
    return path


def phi4rv_loader(path: Path, processor: Processor, workers: int) -> Iterator[int]:
    """The number of images of each row."""
    stage = recipe.stage(2, False, {"sequence_length": 8192, "global_batch": IMAGES, "max_steps": 10**6})
    dataset = PackedDataset([path], processor, stage, workers=workers)
    try:
        for ready in prefetch(global_batches(dataset, 0)(), dataset, 0, 1):
            for batch in ready.batches:
                yield len(batch.grids)
    finally:
        dataset.close()


class PlainDataset(Dataset):
    """What one would write with transformers: a sample is tensors, its image padded to 3600 patches."""

    def __init__(self, path: Path):
        from transformers import PreTrainedTokenizerFast
        from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

        self.records = [json.loads(line) for line in path.read_text().splitlines()]
        self.folder = path.parent
        self.images = Siglip2ImageProcessorPil()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json"))
        self.tokenizer.chat_template = (CHECKPOINT / "chat_template.jinja").read_text()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[t["from"]], "content": t["value"]} for t in record["conversations"][0]]
        text = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = torch.tensor(text["input_ids"]), torch.tensor(text["assistant_masks"]).bool()
        with Image.open(self.folder / record["image"]) as image:
            pixels = self.images.preprocess(image.convert("RGB"), max_num_patches=MAX_PATCHES, return_tensors="pt")
        return {"input_ids": ids, "labels": ids.where(mask, NO_LABEL), "pixels": pixels["pixel_values"][0]}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([s["input_ids"] for s in samples], batch_first=True),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=NO_LABEL),
        "pixels": torch.stack([s["pixels"] for s in samples]),
    }


def plain_loader(path: Path, workers: int) -> Iterator[int]:
    loader = DataLoader(
        PlainDataset(path),
        batch_size=MICRO_BATCH,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    while True:
        for batch in loader:
            yield len(batch["pixels"])


def _rates(counts: Iterator[int], clock: Callable[[], float]) -> list[float]:
    """Images a second, of each of ROUNDS, after one that starts the workers and fills what is read ahead."""
    rates = []
    for _ in range(1 + ROUNDS):
        begun, total = clock(), 0
        while total < IMAGES:
            total += next(counts)
        rates.append(total / (clock() - begun))
    counts.close()  # type: ignore[attr-defined]
    return rates[1:]


def loading(workers: int) -> dict[str, Any]:
    """Images a second of both loaders, one after the other, since either reads ahead while idle."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_data(Path(folder))
        config = dataclasses.replace(
            Config.from_folder(CHECKPOINT), min_num_patches=MIN_PATCHES, max_num_patches=MAX_PATCHES
        )
        processor = Processor.from_folder(CHECKPOINT, config)
        clock = time.perf_counter if workers else time.process_time
        rates = {
            "ours": _rates(phi4rv_loader(path, processor, workers), clock),
            "peer": _rates(plain_loader(path, workers), clock),
        }
    found = {name: statistics.median(taken) for name, taken in rates.items()}
    return {
        "benchmark": "data",
        "case": "loading",
        "workers": workers,
        "ours_images_per_second": found["ours"],
        "peer_images_per_second": found["peer"],
        "ratio": found["ours"] / found["peer"],
        "spread": relative_iqr(rates["ours"]),
    }


def _seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def run() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        samples = list(islice(mixture(), 20_000))
        return [padding(samples), packing(), loading(0), loading(1)]
    finally:
        torch.set_num_threads(threads)


def table_rows(records: list[dict[str, Any]]) -> list[Row]:
    """Shares in percent. What is counted has no noise."""
    found = []
    for r in records:
        if r["case"] == "padding":
            padded, exact = (f"to the longest of {MICRO_BATCH}", f"to {MAX_PATCHES} patches"), {"noise": 0.0}
            found += [
                Row("data", "padded tokens", 0.0, "%", peer=padded[0], peer_value=100 * r["tokens"], **exact),
                Row("data", "padded patches", 0.0, "%", peer=padded[1], peer_value=100 * r["patches"], **exact),
                Row("data", "operations of a step, over those needed", 1.0, "x", peer="padded",
                    peer_value=r["operations"], headline=True, **exact),
            ]  # fmt: skip
        elif r["case"] == "packing":
            found += [
                Row("data", "packing a sample", r["ms_per_sample"], "ms", headline=True),
                Row(
                    "data",
                    "filling of sequences",
                    100 * r["filling"],
                    "%",
                    lower_is_better=False,
                    noise=0.0,
                    headline=True,
                ),
                *(
                    Row("data", f"busiest of {n} ranks, above the mean", 100 * r[f"imbalance_{n}"], "%", noise=0.0)
                    for n in WORLDS
                ),
            ]
        else:
            workers = f"{r['workers'] or 'no'} worker{'s' * (r['workers'] != 1)}"
            found.append(
                Row(
                    "data", f"loading, {workers}", r["ours_images_per_second"], "pictures/s", lower_is_better=False,
                    peer="DataLoader, transformers", peer_value=r["peer_images_per_second"], noise=r.get("spread"),
                    headline=True,
                )
            )  # fmt: skip
    return found


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        if record["case"] == "padding":
            lines += [
                f"padding, {record['samples']} samples: ours 0; to the longest of {MICRO_BATCH} {record['tokens']:.1%} "
                f"of the tokens; to {MAX_PATCHES} patches {record['patches']:.1%} of the patches",
                f"operations of the padded step: {record['operations']:.2f} times ours",
            ]
        elif record["case"] == "packing":
            shares = ", ".join(f"{record[f'imbalance_{world}']:.2%} ({world})" for world in WORLDS)
            lines += [
                f"packing: {record['ms_per_sample']:.3f} ms a sample, sequences {record['filling']:.2%} full",
                f"busiest rank over the mean (ranks): {shares}",
            ]
        else:
            lines.append(
                f"loading, {record['workers']} workers: {record['ours_images_per_second']:.1f} images a second, "
                f"DataLoader with transformers {record['peer_images_per_second']:.1f}: {record['ratio']:.1f} times"
            )
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser("benchmarks.data", "Times loading and packing, beside their peers.")
    json_option(parser.add)
    return parser


def command(args: argparse.Namespace) -> None:
    records = run()
    if args.json:
        write_results(args.json, {"data": records})
    print(table(records))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
