"""How fast a checkpoint loads from the page cache: ``python -m benchmarks.loading [--layers N] [--json FILE]``.

A folder in the Hugging Face layout with the 15 B model's tower, projector, vocabulary and N of its 40 decoder layers is
written (zeros: the bytes' values cost nothing) and loaded again and again, so that it lies in the page cache:

- **ours**: ``phi4rv.load``, from the call to the last weight on the device;
- **int4**: ``weight_loader.load`` with the decoder's layers quantised as they are read, by the published bytes;
- **safetensors**: ``load_file`` of every file to the device, what others do.

``share`` is a rate over that of copies from one pinned buffer to the device, the goal at least GOAL. The fixed time
of a call (meta model, tokenizer, pinned buffers) weighs more the smaller N is. On a CPU it only proves that it runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import phi4rv
from benchmarks.options import json_option, layers_option
from benchmarks.report.result_files import write_results
from benchmarks.report.rows import Row
from infer.quantization import weight_loader
from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.checkpoint.huggingface import write_checkpoint as write_checkpoint
from phi4rv.checkpoint.tensor_reader import CHUNK_BYTES
from phi4rv.command_line import Parser, exit_status
from phi4rv.config import Config
from train.synthetic import tokenizer_corpus
from train.synthetic.tiny_model import build_tiny_model

LAYERS = 8  # 9 GB
GOAL = 0.8
ROUNDS = 3
COPIES = 256  # of PIECE bytes


def write_zero_checkpoint(folder: Path, config: Config) -> int:
    """A checkpoint of zeros in bfloat16; its bytes."""
    model = empty_model(config, "cpu", torch.bfloat16, "torch")
    _, processor = build_tiny_model(0, tokenizer_corpus(), "torch")
    write_checkpoint(model, processor, folder, lambda name, p: torch.zeros(p.shape, dtype=torch.bfloat16))
    return sum(p.nbytes for p in model.parameters())


def copy_rate(device: torch.device) -> float:
    """Bytes a second from a pinned buffer to the device."""
    buffer = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=device)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(buffer, non_blocking=True)

    return COPIES * CHUNK_BYTES / fastest_seconds(copies, device)


def fastest_seconds(load: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of ROUNDS calls, after one that warms up."""
    taken = []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        load()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def run(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """The loads in turn; each rate is of the published bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_zero_checkpoint(folder, config)
        copies = copy_rate(device)
        cases: dict[str, Callable[[], Any]] = {
            "ours": lambda: phi4rv.load(folder, device),
            "int4": lambda: weight_loader.load(folder, device, weights="int4"),
            "safetensors": lambda: [load_file(file, device=str(device)) for file in folder.glob("*.safetensors")],
        }
        seconds = {case: fastest_seconds(load, device) for case, load in cases.items()}
    met = size / seconds["ours"] >= GOAL * copies
    goal = {"goal": GOAL, "verdict": "met" if met else "missed"}
    return [
        {
            "benchmark": "loading",
            "case": case,
            "device": str(device),
            "layers": config.num_hidden_layers,
            "bytes": size,
            "seconds": taken,
            "rate": size / taken,
            "copy_rate": copies,
            "share": size / taken / copies,
            **(goal if case == "ours" else {}),
        }
        for case, taken in seconds.items()
    ]


def table_rows(records: list[dict[str, Any]]) -> list[Row]:
    """GB/s beside safetensors, and with the decoder quantised on the way."""
    found = {record["case"]: record for record in records}
    ours, others = found["ours"], found["safetensors"]
    size = f"{ours['layers']} decoder layers to {ours['device'].partition(':')[0]}"
    return [
        Row(
            "loading", size + ("" if case == "ours" else f", {case}"), found[case]["rate"] / 1e9, "GB/s",
            lower_is_better=False, peer="safetensors", peer_value=others["rate"] / 1e9, share=found[case]["share"],
            ceiling="upload",
            goal=f"{GOAL:.0%} of upload" if case == "ours" else None, verdict=found[case].get("verdict"), headline=True,
        )
        for case in ("ours", "int4")
    ]  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    first = records[0]
    lines = [
        f"{first['bytes'] / 1e9:.1f} GB, {first['layers']} decoder layers, to {first['device']}; copies from a pinned "
        f"buffer: {first['copy_rate'] / 1e9:.1f} GB/s; goal: ours at {GOAL:.0%} of that, {first['verdict']}"
    ]
    for record in records:
        rate, share = record["rate"] / 1e9, record["share"]
        lines.append(f"  {record['case']:<12}{record['seconds']:7.2f} s {rate:7.1f} GB/s {share:7.1%} of the copies")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser("benchmarks.loading", "Times how fast a checkpoint loads, beside its peers.")
    layers_option(parser.add, low=1, default=LAYERS)
    json_option(parser.add)
    return parser


def command(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records = run(replace(Config(), num_hidden_layers=args.layers), device)
    if args.json:
        write_results(args.json, {"loading": records})
    print(table(records))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
