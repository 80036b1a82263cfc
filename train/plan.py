"""``python -m train.plan --gpus 240 --gpu h100 --stage 2``: will it fit, and how long will it take."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from phi4rv.command_line import CHECKPOINT, JSON, MOST, Number, OneOf, Parser, exit_status
from phi4rv.config import Config
from phi4rv.errors import UserError
from phi4rv.model.activation_checkpointing import CHECKPOINTING
from train import recipe
from train.distributed.fsdp import SHARDS
from train.figures.metrics import is_finite, read_metrics
from train.options import checkpointing_option, shard_option, stage_option
from train.planning import duration, memory
from train.planning.hardware import GPU, GPUS
from train.planning.memory import DataStats, ParameterCounts, RunConfig
from train.planning.table import GIGA, format_plan
from train.recipe import Stage

# The report's tables: samples and tokens of each stage. Its run: GPUs, their kind, days (the model card).
REPORTED = {1: (2.0e6, 1.4e9), 2: (62.8e6, 188.5e9), 3: (3.2e6, 12e9)}
REPORT_RUN = (240, "b200", 4.0)
# Shares of the tokens that the report does not give: assumptions, each an option, or taken from --measured.
IMAGE_SHARE, LABELLED_SHARE, EFFICIENCY = 0.5, 0.25, 0.4
SOME, SHARE = Number(int, 1, MOST), Number(float, 1e-6, 1)
RANK = "rank of the adapters that train in place of the weights"
LORA_RANK = 16  # of the adapters that --gpus 1 looks at


def make_parser() -> Parser:
    parser = Parser("train.plan", "Computes memory, communication and time of a run.")
    _run_options(parser.section("run"))
    _assumptions(parser.section("hardware and assumptions"))
    parser.add("--json", action="store_true", help=f"{JSON}; printed")
    return parser


def _run_options(add: Callable[..., None]) -> None:
    add("--gpus", kind=SOME, required=True, help="GPUs that the run has")
    stage_option(add)
    add(
        "--checkpoint",
        kind=Path,
        metavar="DIR",
        help=f"{CHECKPOINT}; its config.json alone is read",
        unset="the published model's configuration",
    )
    shard_option(add, unset="all that can be, the first that fits is chosen")
    checkpointing_option(add, unset="all, the first that fits is chosen")
    add("--sequences-per-gpu", kind=SOME, default=1, help="packed sequences that a GPU takes at a time")
    recipe.add_option(add, "optimizer", unset="adamw; with --gpus 1 both")
    recipe.add_option(
        add, "lora_rank", "--lora", help=RANK, kind=SOME, unset=f"no adapters; with --gpus 1 also {LORA_RANK}"
    )
    recipe.add_option(add, "frozen_weights", default="dtype", unset="dtype; with --gpus 1 all")
    for name in ("sequence_length", "global_batch"):
        recipe.add_option(add, name, unset=recipe.defaults(name, embedded=False))


def _assumptions(add: Callable[..., None]) -> None:
    add("--gpu", kind=OneOf(tuple(GPUS)), default="h100", help="kind of the GPUs (train/planning/hardware.py)")
    add(
        "--memory",
        kind=Number(float, above=0),
        metavar="GB",
        help="GB of a GPU's memory",
        unset="what its maker states",
    )
    add("--image-share", kind=Number(float, 0, 1), help="share of the tokens that are patches", unset=f"{IMAGE_SHARE}")
    add("--labelled-share", kind=SHARE, help="share of the tokens that have a label", unset=f"{LABELLED_SHARE}")
    add("--efficiency", kind=SHARE, help="share of a GPU's peak that the products reach", unset=f"{EFFICIENCY}")
    add(
        "--measured",
        kind=Path,
        metavar="FILE",
        help="metrics.jsonl of a run, to take efficiency and shares from",
        unset="none, they are assumed",
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """UserError for options that do not go together."""
    args = make_parser().parse_args(argv)
    if args.optimizer == "layerwise" and (args.gpus > 1 or args.lora_rank):
        raise UserError("--optimizer: layerwise is for one GPU and for training the weights themselves")
    if args.shard not in (None, "none") and args.lora_rank:
        raise UserError(f"--shard: {args.shard} is for a model that trains itself; leave it or --lora-rank out")
    if args.frozen_weights != "dtype" and not args.lora_rank:
        raise UserError(f"--frozen-weights: {args.frozen_weights} needs adapters to train: give --lora-rank")
    return args


def measured(path: Path) -> dict[str, float]:
    """Efficiency and shares of a run, over all its steps but the first tenth. Efficiency: model FLOPs over what the
    devices would have done at their peak in the same time. MFU does not count recomputation: a run with full
    checkpointing makes other configurations look slower than they are.
    """
    if not path.is_file():
        raise UserError(f"--measured: {path} is no file; give a run's metrics.jsonl")
    entries = [e for e in read_metrics(path) if is_finite(e.get("mfu")) and is_finite(e.get("operations"))]
    steps = [e for e in entries if e["mfu"] > 0]
    if not steps:
        raise UserError(
            f"--measured: {path} has no step with an mfu; train on a GPU of planning/hardware.py or with --peak-tflops"
        )
    steps = steps[-(-len(steps) // 10) if len(steps) > 1 else 0 :]
    total = {name: sum(e[name] for e in steps) for name in ("operations", "tokens", "patches", "labelled")}
    efficiency = total["operations"] / sum(e["operations"] / e["mfu"] for e in steps)
    if efficiency > 1:
        raise UserError(f"--measured: {path} has an mfu of {efficiency:.2f}; its --peak-tflops was too small")
    return {
        "efficiency": efficiency,
        "image_share": total["patches"] / total["tokens"],
        "labelled_share": total["labelled"] / total["tokens"],
    }


def candidates(args: argparse.Namespace) -> Iterator[RunConfig]:
    """Configurations to consider, the least extra work first: recomputation costs more than communication."""
    requested = RunConfig(args.gpus, rows=args.sequences_per_gpu, frozen_weights=args.frozen_weights)
    kinds = [args.checkpointing] if args.checkpointing else CHECKPOINTING
    if args.gpus > 1 or args.lora_rank or args.optimizer:
        base = replace(requested, lora_rank=args.lora_rank or 0, optimizer=args.optimizer or "adamw")
        shards: Sequence[str] = SHARDS[1:] if args.gpus > 1 and not args.lora_rank else ["none"]
        shards = [args.shard] if args.shard else shards
        for kind, shard in product(kinds, shards):
            yield replace(base, checkpointing=kind, shard=shard)
        return
    for optimizer, kind in product(recipe.OPTIMIZERS, kinds):
        yield replace(requested, optimizer=optimizer, checkpointing=kind)
    for frozen, kind in product(memory.FROZEN_BYTES, kinds):
        yield replace(requested, lora_rank=LORA_RANK, frozen_weights=frozen, checkpointing=kind)


def option_line(run_config: RunConfig) -> str:
    """As options of ``train/main.py``."""
    options = [f"--shard {run_config.shard}"] if run_config.gpus > 1 else []
    if run_config.lora_rank:
        options.append(f"--lora-rank {run_config.lora_rank}")
        options += [f"--frozen-weights {run_config.frozen_weights}"] if run_config.frozen_weights != "dtype" else []
    elif run_config.gpus == 1:
        options.append(f"--optimizer {run_config.optimizer}")
    return " ".join([*options, f"--checkpointing {run_config.checkpointing}"])


def mean_sample(number: int, shares: dict[str, float]) -> DataStats:
    samples, tokens = REPORTED[number]
    mean = tokens / samples
    return DataStats(samples, mean, shares["image_share"] * mean, shares["labelled_share"] * mean)


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """The whole plan, as plain data."""
    overrides = {"sequence_length": args.sequence_length, "global_batch": args.global_batch}
    stage = recipe.stage(args.stage, False, overrides)
    config = Config.from_folder(args.checkpoint) if args.checkpoint else Config()
    defaults = {"image_share": IMAGE_SHARE, "labelled_share": LABELLED_SHARE, "efficiency": EFFICIENCY}
    found = measured(args.measured) if args.measured else {}
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    shares = {**defaults, **found, **given}

    def origin(name: str) -> str:
        return "given" if name in given else "measured" if name in found else "assumed"

    data, counts = mean_sample(args.stage, shares), ParameterCounts.of(config, stage)
    gpu = replace(GPUS[args.gpu], memory=args.memory or GPUS[args.gpu].memory)
    rows: list[dict[str, Any]] = []
    considered: list[RunConfig] = []
    for run_config in candidates(args):
        parts = memory.memory_by_kind(config, stage, counts, data, run_config)
        time = duration.step_time(config, stage, counts, data, run_config, gpu, shares["efficiency"])
        total = sum(parts.values())
        row = {
            "options": option_line(run_config),
            "memory": parts,
            "total": total,
            "fits": total <= gpu.memory * GIGA,
        }
        rows.append(row | {"step_seconds": time.step, "days": time.days, "setting": asdict(run_config)})
        considered.append(run_config)
    fitting = [number for number, row in enumerate(rows) if row["fits"]]
    chosen = considered[fitting[0] if fitting else -1]
    trained = args.lora_rank * counts.lora_dims if args.lora_rank else counts.trained
    return {
        "gpus": args.gpus,
        "gpu": args.gpu,
        "gpu_stated": asdict(gpu),
        "stage": args.stage,
        "sequence_length": stage.sequence_length,
        "global_batch": stage.global_batch,
        "parameters": counts.all,
        "trained": trained,
        "sample": asdict(data),
        "shares": {name: {"value": value, "from": origin(name)} for name, value in shares.items()},
        "settings": rows,
        "equal_shares": f"--sequence-multiple {args.gpus}" if stage.multiple() % args.gpus else None,
        "first_fit": option_line(chosen) if fitting else None,
        "chosen": details(config, stage, counts, data, chosen, gpu, shares["efficiency"]),
        "report": report_run(shares),
    }


def details(
    config: Config,
    stage: Stage,
    counts: ParameterCounts,
    data: DataStats,
    run_config: RunConfig,
    gpu: GPU,
    efficiency: float,
) -> dict[str, Any]:
    """Communication and time of one configuration, and its days at other efficiencies."""
    rows, times = duration.micro_batches(stage, data, run_config)
    sent = duration.collective_bytes(counts, run_config, times) if run_config.gpus > 1 else {}
    inside, across, _ = duration.link_seconds(sum(sent.values()), gpu, run_config.gpus)
    time = duration.step_time(config, stage, counts, data, run_config, gpu, efficiency)
    useful = duration.sample_flops(config, stage, data, run_config)[0] * stage.global_batch
    tries = sorted({0.1, 0.2, 0.3, 0.4, 0.5, round(efficiency, 4)})
    days = {x: duration.step_time(config, stage, counts, data, run_config, gpu, x).days for x in tries}
    return {
        "options": option_line(run_config),
        "rows_per_gpu": rows,
        "micro_steps": times,
        "sent": sent,
        "to_own_node": inside,
        "to_other_nodes": across,
        "compute_seconds": time.compute,
        "link_seconds": time.communication,
        "update_seconds": time.update,
        "step_seconds": time.step,
        "steps": time.steps,
        "days": time.days,
        "days_nothing_hidden": time.days_without_overlap,
        "tokens_per_second": stage.global_batch * data.tokens / time.step,
        "useful_tflops": useful / time.step / run_config.gpus / 1e12,
        "days_by_efficiency": days,
    }


def report_run(shares: dict[str, float]) -> dict[str, float]:
    """Throughput and MFU of the report's run of the published model: by 6 FLOPs a parameter and token (Kaplan et al.
    2020), and by model FLOPs, with the assumed shares.
    """
    gpus, kind, days = REPORT_RUN
    config, tokens = Config(), sum(tokens for _, tokens in REPORTED.values())
    seconds, peak = gpus * days * 86400 * 1e12, GPUS[kind].tflops
    reported = {n: recipe.STAGES[n] for n in REPORTED}
    stages = {n: (stage, ParameterCounts.of(config, stage), mean_sample(n, shares)) for n, stage in reported.items()}
    useful = sum(d.samples * duration.sample_flops(config, s, d, RunConfig())[0] for s, _, d in stages.values())
    six = 6.0 * stages[2][1].all * tokens
    share = useful / seconds / peak
    times = [duration.step_time(config, s, z, d, RunConfig(gpus), GPUS[kind], share) for s, z, d in stages.values()]
    return {
        "days_planned": sum(time.days for time in times),
        "gpus": gpus,
        "days": days,
        "tokens": tokens,
        "tflops_6pd": six / seconds,
        "share_6pd": six / seconds / peak,
        "tflops_useful": useful / seconds,
        "share_useful": share,
    }


def run(argv: Sequence[str] | None) -> None:
    args = arguments(argv)
    made = plan(args)
    print(json.dumps(made, indent=2) if args.json else format_plan(made))


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
