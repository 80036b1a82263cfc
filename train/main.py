"""``torchrun train/main.py --stage 2``: one stage of the recipe, from data to a measured model.

Without ``--data`` it trains on the pictures it draws itself, without ``--checkpoint`` a tiny model from random
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
from train.anomalies import Streak, check_weights
from train.build import build
from train.checkpoints import checkpointer
from train.data.corpus import Corpus
from train.data.mixture import Source, sources
from train.data.stream import Step, count_steps, run_steps
from train.distributed.context_parallel import join_context
from train.distributed.fsdp import device_mesh, local
from train.distributed.ranks import Ranks, gatherer, join_ranks
from train.distributed.watchdog import TERMINATED, Terminate, Terminated, watched
from train.figures.final_report import finish
from train.figures.metrics import METRICS, Progress
from train.optimizers.adamw import Optimizer
from train.optimizers.layerwise import Layerwise
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
    """The folder to write to, created; UserError if it cannot be, or holds a run that is not to be resumed."""
    output = args.output
    if output is None:
        names = [Path("out") / f"stage-{args.stage}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000)))]
        taken = [name for name in names if name.exists()]
        output = taken[-1] if args.resume and taken else next(name for name in names if not name.exists())
    if not args.resume and ((output / METRICS).exists() or checkpointer.newest_step(output)):
        raise UserError(f"--output: {output} holds a run already; go on with --resume, or name another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}); name another folder") from None
    checkpointer.remove_broken(output)
    return output


def data_files(args: argparse.Namespace, output: Path, ranks: Ranks) -> tuple[list[Source], Path | None]:
    """Training data and the held-out file, drawn and written first where the embedded data is used."""
    if args.data:
        return sources(args.data), args.heldout
    folder = output / "data"
    counts = dict(zip(("train", "heldout"), recipe.EMBEDDED_RECORDS[args.stage], strict=True))
    paths = {split: folder / f"stage{args.stage}-{split}.jsonl" for split in counts}
    if ranks.first:
        for split, count in counts.items():
            write_dataset(folder, args.stage, split, count, args.seed)
    ranks.from_first(None)
    return sources([paths["train"]]), args.heldout or paths["heldout"]


def open_corpus(
    args: argparse.Namespace, data: list[Source], processor: Processor, stage: recipe.Stage, cache: Path, ranks: Ranks
) -> Corpus:
    """The corpus on every rank; the first unpacks what has to be, the others find it."""
    # The loader's thread exchanges while the training thread does.
    gather = gatherer(ranks)

    def corpus() -> Corpus:
        options = {"workers": args.workers, "cache": cache, "timeout": args.image_timeout}
        return Corpus(
            data, processor, stage, args.skip_bad, rank=ranks.rank, world=ranks.world, gather=gather, **options
        )

    made = corpus() if ranks.first else None
    ranks.from_first(None)
    return made or corpus()


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    ranks = join_ranks(device)
    with watched(ranks):
        run_stage(args, device, ranks)


def run_stage(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    overrides = {name: getattr(args, name) for name in recipe.options()}
    stage = recipe.stage(args.stage, not args.data, overrides)
    mesh = device_mesh(ranks, args.replicas, device) if args.shard != "none" else None
    shard = args.shard if mesh else "none"
    context = join_context(args.context, ranks, args.replicas)
    output = Path(ranks.from_first(str(output_folder(args)) if ranks.first else None))
    say = print if ranks.first else (lambda *words: None)
    data, heldout = data_files(args, output, ranks)
    step = ranks.from_first(checkpointer.newest_step(output) if args.resume else None)
    for broken in checkpointer.broken_steps(output) if args.resume else []:
        say(f"{broken}: not a whole save, left out")
    dtype = DTYPES[args.dtype] if args.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    told = {
        "stage": args.stage,
        "seed": args.seed,
        "data": [str(path) for source in data for path in source.files],
        "shares": [source.share for source in data],
        "checkpoint": str(args.checkpoint) if args.checkpoint else None,
        "dtype": str(dtype),
        "skip_bad": args.skip_bad,
    }
    torch.manual_seed(args.seed * 100_003 + ranks.rank)  # for what may be drawn later on; saves hold the state
    model, processor, optimizer = build(args, stage, device, dtype, step, mesh, ranks)
    if step:
        checkpointer.resume(step, model, optimizer, ranks, told)
        if ranks.first:
            checkpointer.trim_metrics(output / METRICS, optimizer.steps)
    elif args.resume and ranks.first:
        (output / METRICS).unlink(missing_ok=True)
        say(f"no step-N in {output} yet: starting at the beginning")
    check_weights(weights(model), str(step or args.checkpoint or "the model"))
    corpus = open_corpus(args, data, processor, stage, output / CACHE, ranks)
    questions = [Question.of(record) for record in read_records(heldout)] if heldout and ranks.first else []
    before = read_json(step / checkpointer.STATE) if step else {}
    position = before.get("position")
    if position and not ranks.first:
        position["unreadable"] = 0  # the save has the sum over the ranks
    source = run_steps(corpus, args.seed, position)
    if len(corpus) > 100_000 and not (stage.max_steps or step):
        say("measuring every record once, to count the steps; --max-steps spares that")
    total = stage.max_steps or before.get("steps") or count_steps(corpus, args.seed)
    if ranks.first:
        announce(args, model, optimizer, dtype, ranks)
        print(f"{len(corpus)} records, {total} steps, output in {output}")

    progress = Progress(output / METRICS, optimizer.steps, total) if ranks.first else None
    saver, terminate = checkpointer.Saver(output, ranks, args.keep), Terminate()
    streak = Streak(saver.newest, lambda: check_weights(weights(model), "the model in memory"))
    peak = args.peak_tflops or peak_tflops(device)
    taken: Step | None = None

    def save() -> None:
        assert taken is not None
        place = corpus.place(taken.position) | {"unreadable": sum(ranks.gather(corpus.unreadable))}
        saver.begin(model, processor, optimizer, dtype, {**told, "position": place, "steps": total})

    def on_step(metrics: dict[str, Any], step: Step) -> None:
        nonlocal taken
        taken = step
        if progress:
            progress.step(metrics)
        streak.add(metrics)
        if args.save_every and step.number % args.save_every == 0:
            save()

    def stop() -> bool:
        return terminate.asked or saver.failure is not None

    try:
        done = train(
            model, optimizer, corpus, source, total, ranks, on_step, peak=peak, shard=shard, stop=stop, context=context
        )
        saver.wait()
        if not done:
            save()
            saver.wait()
            raise Terminated
        terminate.close()
        corpus.unreadable = sum(corpus.gather(corpus.unreadable))
        checkpointer.save_result(output, model, processor, stage, dtype, ranks, told["checkpoint"])
        if progress:
            progress.bar.close()
            if mesh and questions:
                model = load(output / checkpointer.MODEL, device, dtype, args.kernels)[0]
            finish(model, processor, output, questions, progress)
            say(f"data: {corpus.summary()}")
    finally:
        terminate.close()
        saver.close()
        corpus.close()
        if progress:
            progress.close()
    ranks.from_first(None)  # the others wait while the first measures


def announce(
    args: argparse.Namespace, model: Phi4RV, optimizer: Optimizer | Layerwise, dtype: torch.dtype, ranks: Ranks
) -> None:
    """What is about to run, for people to check."""
    stage = optimizer.stage
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in optimizer.params.values())
    print(f"stage {args.stage}: {stage}")
    print(f"{parameters:,} parameters, {trained:,} trained, {dtype} on {model.device}, {ranks.world} process(es)")
    if args.shard != "none" and ranks.world > 1:
        print(f"sharded: {args.shard}, over {ranks.world // args.replicas} process(es), {args.replicas} time(s)")
    if args.context > 1:
        print(f"context: {args.context} process(es) share a row")
    if stage.multiple() % (ranks.world // args.context):
        print(f"unequal shares: steps of {stage.multiple()} sequences or a multiple; see --sequence-multiple")
    print(f"kernels: {model.ops}")


def weights(model: Phi4RV) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and this rank's part of every parameter."""
    return ((name, local(p.detach())) for name, p in model.named_parameters())


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return exit_status(lambda: run(arguments(argv)), "stopped; go on with --resume from the last save")
    except Terminated:
        print("saved; go on with --resume", file=sys.stderr)
        return TERMINATED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
