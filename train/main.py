"""``torchrun train/main.py --stage 2``: one stage of the recipe, from data to a measured model.

Without ``--data`` it trains on images that it draws itself, without ``--checkpoint`` a tiny model with random
weights. Leaves ``metrics.jsonl``, ``step-N/``, ``model/``, ``loss.png`` and ``predictions.png`` in its output folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infer.heldout import Question
from phi4rv.checkpoint.huggingface import load
from phi4rv.command_line import exit_status, usable_device
from phi4rv.config import DTYPES, read_json
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.processor import Processor
from phi4rv.processing.records import read_records
from train import recipe
from train.anomalies import SkippedSteps, check_weights
from train.build import build
from train.checkpoints import checkpointer
from train.data.mixture import DataSource, parse_sources
from train.data.packed_dataset import PackedDataset
from train.data.stream import GlobalBatch, count_steps, global_batches
from train.distributed.context_parallel import init_context_parallel
from train.distributed.fsdp import device_mesh, to_local
from train.distributed.ranks import Ranks, init_distributed, new_all_gather
from train.distributed.watchdog import EXIT_SIGTERM, SigtermHandler, Terminated, watchdog
from train.figures.final_report import write_final_report
from train.figures.metrics import METRICS, MetricsLogger
from train.optimizers.adamw import AdamW
from train.optimizers.layerwise import LayerwiseAdamW
from train.options import arguments, make_parser
from train.planning.hardware import peak_tflops
from train.synthetic import write_dataset
from train.trainer import train

__all__ = ["main", "make_parser"]

CACHE = ".index"  # in the output folder: unpacked .gz files, and where each image of an archive lies


def pick_device(name: str | None) -> torch.device:
    if name is None and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = usable_device(name or "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def output_folder(args: argparse.Namespace) -> Path:
    """Creates the folder to write to; UserError if that fails, or if it holds a run and ``--resume`` is not given."""
    output = args.output
    if output is None:
        names = [Path("out") / f"stage-{args.stage}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000)))]
        taken = [name for name in names if name.exists()]
        output = taken[-1] if args.resume and taken else next(name for name in names if not name.exists())
    if not args.resume and ((output / METRICS).exists() or checkpointer.latest_step(output)):
        raise UserError(f"--output: {output} already holds a run; continue it with --resume, or name another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}); name another folder") from None
    checkpointer.remove_partial(output)
    return output


def data_files(args: argparse.Namespace, output: Path, ranks: Ranks) -> tuple[list[DataSource], Path | None]:
    """Training data and the held-out file; the built-in data is generated first where no ``--data`` is given."""
    if args.data:
        return parse_sources(args.data), args.heldout
    folder = output / "data"
    counts = dict(zip(("train", "heldout"), recipe.EMBEDDED_RECORDS[args.stage], strict=True))
    paths = {split: folder / f"stage{args.stage}-{split}.jsonl" for split in counts}
    if ranks.is_main_process:
        for split, count in counts.items():
            write_dataset(folder, args.stage, split, count, args.seed)
    ranks.barrier()
    return parse_sources([paths["train"]]), args.heldout or paths["heldout"]


def open_dataset(
    args: argparse.Namespace,
    sources: list[DataSource],
    processor: Processor,
    stage: recipe.Stage,
    cache: Path,
    ranks: Ranks,
) -> PackedDataset:
    """The dataset on every rank; rank 0 unpacks and indexes the files first, the others then find them in ``cache``."""
    # A group of its own: the loader's thread communicates while the training thread does.
    all_gather = new_all_gather(ranks)

    def open_here() -> PackedDataset:
        return PackedDataset(
            sources,
            processor,
            stage,
            args.skip_bad,
            workers=args.workers,
            cache=cache,
            timeout=args.image_timeout,
            rank=ranks.rank,
            world_size=ranks.world_size,
            all_gather=all_gather,
        )

    dataset = open_here() if ranks.is_main_process else None
    ranks.barrier()
    return dataset or open_here()


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    ranks = init_distributed(device)
    with watchdog(ranks):
        run_stage(args, device, ranks)


def run_stage(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    overrides = {name: getattr(args, name) for name in recipe.options()}
    stage = recipe.stage(args.stage, not args.data, overrides)
    mesh = device_mesh(ranks, args.replicas, device) if args.shard != "none" else None
    shard = args.shard if mesh else "none"
    cp = init_context_parallel(args.context, ranks, args.replicas)
    output = Path(ranks.broadcast(str(output_folder(args)) if ranks.is_main_process else None))
    log = print if ranks.is_main_process else (lambda *words: None)
    sources, heldout = data_files(args, output, ranks)
    save = ranks.broadcast(checkpointer.latest_step(output) if args.resume else None)
    for incomplete in checkpointer.incomplete_steps(output) if args.resume else []:
        log(f"{incomplete}: incomplete save, ignored")
    dtype = DTYPES[args.dtype] if args.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    run_options = {
        "stage": args.stage,
        "seed": args.seed,
        "data": [str(path) for source in sources for path in source.files],
        "shares": [source.share for source in sources],
        "checkpoint": str(args.checkpoint) if args.checkpoint else None,
        "dtype": str(dtype),
        "skip_bad": args.skip_bad,
    }
    torch.manual_seed(args.seed * 100_003 + ranks.rank)  # for what may draw random numbers later; saves hold the state
    model, processor, optimizer = build(args, stage, device, dtype, save, mesh, ranks)
    if save:
        checkpointer.resume(save, model, optimizer, ranks, run_options)
        if ranks.is_main_process:
            checkpointer.truncate_metrics(output / METRICS, optimizer.steps)
    elif args.resume and ranks.is_main_process:
        (output / METRICS).unlink(missing_ok=True)
        log(f"no step-N in {output} yet: starting from the beginning")
    check_weights(local_parameters(model), str(save or args.checkpoint or "the model"))
    dataset = open_dataset(args, sources, processor, stage, output / CACHE, ranks)
    questions = (
        [Question.from_record(record) for record in read_records(heldout)] if heldout and ranks.is_main_process else []
    )
    saved_state = read_json(save / checkpointer.STATE) if save else {}
    position = saved_state.get("position")
    if position and not ranks.is_main_process:
        position["unreadable"] = 0  # the save has the sum over the ranks
    make_batches = global_batches(dataset, args.seed, position)
    if len(dataset) > 100_000 and not (stage.max_steps or save):
        log("measuring every record once, to count the steps; --max-steps avoids that")
    total = stage.max_steps or saved_state.get("steps") or count_steps(dataset, args.seed)
    if ranks.is_main_process:
        print_summary(args, model, optimizer, dtype, ranks)
        print(f"{len(dataset)} records, {total} steps, output in {output}")

    logger = MetricsLogger(output / METRICS, optimizer.steps, total) if ranks.is_main_process else None
    saver, sigterm = checkpointer.AsyncCheckpointer(output, ranks, args.keep), SigtermHandler()
    skipped_steps = SkippedSteps(saver.latest, lambda: check_weights(local_parameters(model), "the model in memory"))
    last_batch: GlobalBatch | None = None

    def save_step() -> None:
        assert last_batch is not None
        unreadable = sum(ranks.all_gather(dataset.unreadable))
        data_position = last_batch.position | {"unreadable": unreadable}
        saver.save(model, processor, optimizer, dtype, {**run_options, "position": data_position, "steps": total})

    def on_step(metrics: dict[str, Any], batch: GlobalBatch) -> None:
        nonlocal last_batch
        last_batch = batch
        if logger:
            logger.log_step(metrics)
        skipped_steps.add(metrics)
        if args.save_every and batch.step % args.save_every == 0:
            save_step()

    def should_stop() -> bool:
        return sigterm.received or saver.failure is not None

    try:
        done = train(
            model,
            optimizer,
            dataset,
            make_batches,
            total,
            ranks,
            on_step,
            peak_tflops=args.peak_tflops or peak_tflops(device),
            shard=shard,
            should_stop=should_stop,
            cp=cp,
        )
        saver.wait()
        if not done:
            save_step()
            saver.wait()
            raise Terminated
        sigterm.close()
        dataset.unreadable = sum(dataset.all_gather(dataset.unreadable))
        checkpointer.save_final_model(output, model, processor, stage, dtype, ranks, run_options["checkpoint"])
        if logger:
            logger.bar.close()
            if mesh and questions:
                model = load(output / checkpointer.MODEL, device, dtype, args.kernels)[0]
            write_final_report(model, processor, output, questions, logger)
            log(f"data: {dataset.summary()}")
    finally:
        sigterm.close()
        saver.close()
        dataset.close()
        if logger:
            logger.close()
    ranks.barrier()  # the others wait while rank 0 evaluates


def print_summary(
    args: argparse.Namespace, model: Phi4RV, optimizer: AdamW | LayerwiseAdamW, dtype: torch.dtype, ranks: Ranks
) -> None:
    """Prints what is about to run."""
    stage = optimizer.stage
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in optimizer.params.values())
    print(f"stage {args.stage}: {stage}")
    print(f"{parameters:,} parameters, {trained:,} trained, {dtype} on {model.device}, {ranks.world_size} process(es)")
    if args.shard != "none" and ranks.world_size > 1:
        print(f"sharded: {args.shard}, {args.replicas} replica(s) of {ranks.world_size // args.replicas} process(es)")
    if args.context > 1:
        print(f"context parallel: {args.context} processes share each packed row")
    if stage.multiple() % (ranks.world_size // args.context):
        print(f"uneven load: steps of {stage.multiple()} sequences or a multiple; see --sequence-multiple")
    print(f"kernels: {model.ops}")


def local_parameters(model: Phi4RV) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and this rank's shard of every parameter."""
    return ((name, to_local(p.detach())) for name, p in model.named_parameters())


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return exit_status(lambda: run(arguments(argv)), "stopped; continue with --resume from the last save")
    except Terminated:
        print("saved; continue with --resume", file=sys.stderr)
        return EXIT_SIGTERM
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
