"""Inference, batch one: ``python -m benchmarks.inference [--json FILE] …``, and the report's protocol.

The full-size model with random weights made on the GPU (fewer decoder layers where memory asks for it), in processes of
their own: the engine with each kind of kernels, with weights in bf16, fp8 and int4, and ``transformers`` on the same
weights (``benchmarks/inference/contenders.py`` says how). vLLM takes part where it is installed.

- decode: tokens/s at 4096 tokens of context, GB/s of the bytes that a step must read
  (``benchmarks/inference/roofline.py``) and their share of the copy rate measured in the same run, time between
  tokens (median, 99th percentile), joules a token by the driver's counter.
- first token: of one image of 3600 patches and 256 tokens of text, and the share of the measured product rate.
- tower: tower and projector on 3600 patches.
- second question: the first token of another question about the same picture.
- at once: new tokens/s of 64 requests over those of one.
- load: the checkpoint from the page cache, and the share of the copy rate from pinned memory to the GPU.

On a CPU a tiny model shows that everything runs; its times say nothing.

``--protocol [QUESTIONS.jsonl] --checkpoint DIR`` asks questions instead: ``benchmarks/inference/protocol.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.inference import protocol
from benchmarks.inference.cases import measure
from benchmarks.inference.roofline import FULL, TINY, Record, Shapes, cache_bytes, with_rates
from benchmarks.inference.table import goals, table, table_rows
from benchmarks.jobs import run_in_process, run_inline
from benchmarks.kernels import timing
from benchmarks.options import json_option, layers_option, seconds_option
from benchmarks.report.result_files import write_results
from phi4rv.command_line import Parser, exit_status
from phi4rv.config import Config
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops import cuda
from phi4rv.ops.registry import Operations
from train.synthetic.tiny_model import tiny_config

__all__ = ["goals", "main", "run", "table", "table_rows"]

# In this order. The kernels, behind a comma the format of the weights.
CONTENDERS = {
    "cuda": (
        "cuda", "transformers", "cuda, fp8", "cuda, int4", "triton", "load", "triton, fp8", "triton, int4",
        "transformers, static cache", "transformers, flash-attn", "vLLM",
    ),
    "cpu": ("torch", "transformers", "torch, fp8", "torch, int8", "torch, int4", "load", "transformers, static cache"),
}  # fmt: skip
MAX_SECONDS = 100.0  # seconds of one contender
RESERVED_BYTES = 6 << 30  # bytes of the GPU's memory for its context, activations and what is not counted
UPLOAD_BYTES = {"cuda": 1 << 30, "cpu": 1 << 20}  # bytes


def device_rates(device: str) -> Record:
    """Measured rates, bytes/s and FLOP/s: ``copy`` on the device, ``product``, ``upload`` to it; and its memory."""
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    return {**timing.ceilings(device), "upload": upload_rate(device), "memory": memory}


def upload_rate(device: str) -> float:
    """Bytes/s of a copy from pinned memory; on a CPU from its memory to its memory."""
    source = torch.empty(UPLOAD_BYTES[device], dtype=torch.uint8, pin_memory=device == "cuda")
    target = torch.empty_like(source, device=device)
    copy = timing.milliseconds({"": lambda i: target.copy_(source, non_blocking=True)}, device=device)[""]
    return len(source) / copy.ms * 1e3


def num_parameters(config: Config, layers: int) -> int:
    with torch.device("meta"):
        model = Phi4RV(dataclasses.replace(config, num_hidden_layers=layers), Operations("torch"))
    return sum(p.numel() for p in model.parameters())


def layers_that_fit(config: Config, shapes: Shapes, memory: int) -> int:
    """Decoder layers, from 1 to the model's own: weights in 16 bits, the cache of all requests at once, and that of the
    second engine, in ``memory`` bytes without SPARE.
    """
    tokens = shapes.many * (shapes.prompt + shapes.answer + 64) + config.context

    def needed(layers: int) -> int:
        cut = dataclasses.replace(config, num_hidden_layers=layers)
        return 2 * num_parameters(config, layers) + cache_bytes(cut, tokens)

    one, two = needed(1), needed(2)
    return max(1, min(1 + (memory - RESERVED_BYTES - one) // (two - one), config.num_hidden_layers))


def folder_with_space(size: int) -> Path | None:
    """A folder that holds ``size`` bytes, in memory if there is one."""
    folders = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    return next((f for f in folders if f.is_dir() and shutil.disk_usage(f).free > size), None)


def unavailable_reason(contender: str, device: torch.device, folder: Path | None) -> str | None:
    """Why a contender cannot run here."""
    kernels, _, _ = contender.partition(", ")
    for package in ("transformers", "vllm"):
        if kernels.lower() == package and importlib.util.find_spec(package) is None:
            return f"{kernels} is not installed"
    if contender.endswith("flash-attn") and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if contender in ("load", "vLLM") and folder is None:
        return "neither /dev/shm nor the folder of temporary files has room for a checkpoint"
    return cuda.unavailable_reason(device) if kernels == "cuda" else None


def run(
    seconds: float = math.inf, layers: int = 0, on_result: Callable[[Record], None] = lambda result: None
) -> Record:
    """All contenders, one after another, within ``seconds``. ``on_result`` gets the result so far after each."""
    device, deadline = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic() + min(seconds, 1e6)
    config, shapes, call = (Config(), FULL, run_in_process) if device == "cuda" else (tiny_config(), TINY, run_inline)
    about, reason = call(device_rates, (device,), deadline - time.monotonic())
    if about is None:
        raise RuntimeError(f"the device's rates: {reason}")
    if device == "cuda":
        layers = layers or layers_that_fit(config, shapes, about["memory"])
        config = dataclasses.replace(config, num_hidden_layers=layers)
    result: Record = {"device": device, "layers": config.num_hidden_layers, **about, **dataclasses.asdict(shapes)}
    result["sides"] = {contender: {"reason": "out of time"} for contender in CONTENDERS[device]}
    parent = folder_with_space(
        5 * num_parameters(config, config.num_hidden_layers)
    )  # of 2 or 4 bytes a weight, and some more
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for contender in CONTENDERS[device]:
            left = deadline - time.monotonic()
            reason = unavailable_reason(contender, torch.device(device), parent) or (
                None if left > 0 else "out of time"
            )
            if reason is None:
                arguments = (contender, config, device, shapes, Path(folder) / contender)
                found, reason = call(measure, arguments, min(left, MAX_SECONDS))
                shutil.rmtree(Path(folder) / contender, ignore_errors=True)
            cases = {"reason": reason} if reason else with_rates(contender, found, config, shapes, about)
            result["sides"][contender] = cases
            on_result(result)
    return result


def make_parser() -> Parser:
    parser = Parser("benchmarks.inference", "Times inference, beside its peers, or asks the report's questions.")
    json_option(parser.add)
    seconds_option(parser.add, "what does not fit in it is left out")
    layers_option(parser.add, default=0)
    protocol.add_options(parser.section("the report's protocol"))
    return parser


def command(args: argparse.Namespace) -> None:
    if args.protocol is not None:
        protocol.command(args)
        return
    if args.checkpoint:
        raise UserError("--checkpoint: goes with --protocol; speed is measured with random weights")

    def on_result(result: Record) -> None:
        if args.json:
            write_results(args.json, {"inference": {**result, "goals": goals(result)}})

    print(table(run(args.seconds, args.layers, on_result)))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: command(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
