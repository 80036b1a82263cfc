"""How long the step loop stands still for a save: ``python -m benchmarks.saving [--json FILE]``.

The embedded default's tiny model on the CPU takes one and the same step again and again, and is saved in turn by

- **ours**: ``AsyncCheckpointer``, which copies everything and writes the copies on a thread. Its stall is the time of
  ``save`` and what the steps take longer than usual until the thread has ended;
- **torch.save** of the same tensors in the loop, the plainest way, which does not wait for the disk;
- **dcp.save** of them in the loop (torch.distributed.checkpoint), which does.

Their stall is the call. ``share`` is a stall over the time of SAVE_EVERY steps, the goal at most GOAL. A larger model
on a GPU is not measured: the copies cross the bus there, and a step takes longer for each byte of the state.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.kernels.timing import relative_iqr
from benchmarks.options import json_option
from benchmarks.report.result_files import write_results
from benchmarks.report.rows import Row
from phi4rv.batch import PackedBatch
from phi4rv.command_line import Parser, exit_status
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.processor import Processor
from train import recipe
from train.checkpoints.checkpointer import AsyncCheckpointer, state_dict
from train.data.loader import prefetch
from train.data.packed_dataset import PackedDataset
from train.data.stream import global_batches
from train.distributed.ranks import Ranks
from train.optimizers.adamw import AdamW
from train.synthetic import tokenizer_corpus, write_dataset
from train.synthetic.tiny_model import build_tiny_model
from train.trainable import set_trainable
from train.trainer import train_step

SAVE_EVERY = 200  # steps, as the example of docs/many-gpus.md
GOAL = 0.02
ROUNDS, STEPS_BETWEEN = 7, 2
RECORDS = 64


def first_step(folder: Path, processor: Processor, stage: recipe.Stage) -> list[PackedBatch]:
    """The rows of the first step of the embedded data."""
    write_dataset(folder, 2, "train", RECORDS, seed=0)
    dataset = PackedDataset([folder / "stage2-train.jsonl"], processor, stage)
    try:
        for ready in prefetch(global_batches(dataset, 0)(), dataset, 0, 1):
            return list(ready.batches)
        raise AssertionError("no step in the embedded data")
    finally:
        dataset.close()


class TrainingLoop:
    """A step loop that somebody saves."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model: Phi4RV
        self.model, self.processor = build_tiny_model(0, tokenizer_corpus(), "torch")
        stage = recipe.stage(2, True, {})
        self.optimizer = AdamW(set_trainable(self.model, stage), stage, self.model.ops)
        self.rows = first_step(folder / "data", self.processor, stage)
        self.checkpointer = AsyncCheckpointer(folder / "ours", Ranks(), keep=1)
        (folder / "ours").mkdir()

    def step(self) -> None:
        train_step(self.model, self.optimizer, self.rows, 1e-5, Ranks())

    def save(self) -> None:
        self.checkpointer.save(self.model, self.processor, self.optimizer, torch.float32, {})

    def torch_save(self) -> None:
        torch.save(state_dict(self.model, self.optimizer), self.folder / "torch.pt")

    def dcp_save(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one process, and of a folder that it replaces
            dcp.save(state_dict(self.model, self.optimizer), checkpoint_id=self.folder / "dcp", no_dist=True)

    def is_writing(self) -> bool:
        return self.checkpointer.is_writing()

    def wait(self) -> None:
        self.checkpointer.wait()

    def size(self) -> int:
        """Bytes of a save."""
        return sum(t.numel() * t.element_size() for t in state_dict(self.model, self.optimizer).values())


def stall(loop: TrainingLoop, rounds: int) -> dict[str, Any]:
    """Milliseconds that a save costs the loop, the medians of so many, taken in turn."""
    usual, begins, slowed = [], [], []
    peers: dict[str, list[float]] = {"torch_save": [], "dcp_save": []}
    loop.step()
    for _ in range(rounds):
        begins.append(_seconds(loop.save))
        slowed.append([])
        while loop.is_writing():
            slowed[-1].append(_seconds(loop.step))
        loop.wait()
        usual += [_seconds(loop.step) for _ in range(STEPS_BETWEEN)]
        for name, times in peers.items():
            times.append(_seconds(getattr(loop, name)))
            usual += [_seconds(loop.step) for _ in range(STEPS_BETWEEN)]
    step = statistics.median(usual)
    ours = [begin + sum(taken) - len(taken) * step for begin, taken in zip(begins, slowed, strict=True)]
    stalls = {"ours": statistics.median(ours)} | {name: statistics.median(times) for name, times in peers.items()}
    return {
        "benchmark": "saving",
        "case": "stall",
        "rounds": rounds,
        "save_every": SAVE_EVERY,
        "bytes": loop.size(),
        "step_ms": 1e3 * step,
        "ours_begin_ms": 1e3 * statistics.median(begins),
        "steps_beside_the_write": sum(map(len, slowed)) / rounds,
        **{f"{name}_ms": 1e3 * seconds for name, seconds in stalls.items()},
        **{f"{name}_share": seconds / (SAVE_EVERY * step) for name, seconds in stalls.items()},
        "spread": relative_iqr(ours),
        "goal": GOAL,
        "verdict": "met" if stalls["ours"] < GOAL * SAVE_EVERY * step else "missed",
    }


def _seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def run(rounds: int = ROUNDS) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return [stall(TrainingLoop(Path(folder)), rounds)]
    finally:
        torch.set_num_threads(threads)


def table_rows(records: list[dict[str, Any]]) -> list[Row]:
    """The stall of a save beside the shorter of the others'."""
    found = []
    for r in records:
        peer = min(("torch_save", "dcp_save"), key=lambda name: r[f"{name}_ms"])
        found.append(
            Row(
                "saving", f"stall of a save of {r['bytes'] / 1e6:.1f} MB", r["ours_ms"], "ms",
                peer=peer.replace("_", "."), peer_value=r[f"{peer}_ms"], noise=r.get("spread"), headline=True,
                goal=f"≤ {r['goal']:.0%} of {r['save_every']} steps", verdict=r["verdict"],
            )
        )  # fmt: skip
    return found


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        every, step = record["save_every"], record["step_ms"]
        lines.append(
            f"a save of {record['bytes'] / 1e6:.1f} MB, every {every} steps of {step:.0f} ms; "
            f"goal: a stall under {record['goal']:.0%}, {record['verdict']}"
        )
        for name, title in (("ours", "ours"), ("torch_save", "torch.save"), ("dcp_save", "dcp.save")):
            lines.append(f"  {title:10} {record[f'{name}_ms']:7.1f} ms {record[f'{name}_share']:8.3%} of the time")
        lines.append(
            f"  ours: begin {record['ours_begin_ms']:.1f} ms, "
            f"then {record['steps_beside_the_write']:.1f} steps beside the writing thread"
        )
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser("benchmarks.saving", "Times what a save costs the step loop, beside its peers.")
    json_option(parser.add)
    return parser


def command(args: argparse.Namespace) -> None:
    records = run()
    if args.json:
        write_results(args.json, {"saving": records})
    print(table(records))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
