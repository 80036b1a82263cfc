"""``torchrun train/main.py --stage 2``: one stage of the recipe, from data to a measured model.

Without ``--data`` it trains on the pictures it draws itself, without ``--checkpoint`` a tiny model from random
weights. Leaves ``metrics.jsonl``, ``step-N/``, ``model/``, ``loss.png`` and ``predictions.png`` in its output folder.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import phi4rv
from phi4rv.checkpoint import load
from phi4rv.command import Parser, exit_status, usable_device
from phi4rv.config import DTYPES, read_json
from phi4rv.errors import UserError
from phi4rv.model import Phi4RV
from phi4rv.ops import KERNELS
from phi4rv.processor import Processor
from train import recipe, saving
from train.data import Corpus, alone
from train.guard import Streak, check_weights
from train.hardware import peak_tflops
from train.heldout import Question, Scores, answers, score, shuffled
from train.metrics import Progress, read_metrics
from train.optimizer import Optimizer
from train.plot import METRICS, Run, draw
from train.records import read_records
from train.sheet import prediction_sheet
from train.sources import Source, sources
from train.stream import Step, count_steps, run_steps
from train.synthetic import texts, write_dataset
from train.tiny import tiny_model
from train.trainer import Ranks, train, trainable

CACHE = ".index"  # in the output folder: unpacked .gz files, and where each image of an archive lies


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="train/main.py", description=__doc__.split("\n")[0].split(": ")[1])
    add = parser.add_argument
    add(
        "--stage",
        type=int,
        default=2,
        help="1 projector only, 2 instruction tuning, 3 long context and several images",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="published layout; without it a tiny model from random weights",
    )
    add(
        "--data",
        nargs="+",
        metavar="FILE[=WEIGHT]",
        help="JSONL records (.gz too), files, folders or patterns; without it the embedded generator's",
    )
    add("--heldout", type=Path, metavar="FILE", help="JSONL records to measure on at the end")
    add("--output", type=Path, metavar="DIR", help="default: out/stage-N, numbered on if it is taken")
    add(
        "--save-every",
        type=int,
        default=0,
        metavar="N",
        help="steps between saves; 0 saves only the model at the end",
    )
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the newest step-N in the output folder")
    add("--skip-bad", action="store_true", help="count and skip bad records instead of stopping at the first")
    add("--workers", type=int, default=0, metavar="N", help="processes that tokenize and decode; 0: a thread")
    add("--image-timeout", type=float, default=60.0, metavar="S", help="seconds an image may take in a worker")
    add("--device", help="cuda where there is one, else cpu")
    add("--dtype", choices=DTYPES, help="of weights and activations: bfloat16 on a GPU, float32 on a CPU")
    add("--kernels", metavar="KIND", help=f"one of {', '.join(KERNELS)}; exceptions behind it: triton,adamw=torch")
    add("--peak-tflops", type=float, metavar="X", help="of a device, for MFU; default: train/hardware.py's, by name")
    fields = parser.add_argument_group("the stage's hyperparameters (train/recipe.py), each to be overridden")
    for name, kind in recipe.options().items():
        fields.add_argument("--" + name.replace("_", "-"), type=kind)
    args = parser.parse_args(argv)
    if args.save_every < 0:
        raise UserError(f"--save-every: {args.save_every} must be 0 or more")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops: {args.peak_tflops} must be above 0")
    if args.workers < 0:
        raise UserError(f"--workers: {args.workers} must be 0 or more")
    if not 0 < args.image_timeout < float("inf"):
        raise UserError(f"--image-timeout: {args.image_timeout} must be a number above 0")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed: {args.seed} must be in [0, 2^32)")
    return args


def join_ranks(device: torch.device) -> Ranks:
    """Joins torchrun's other processes, if there are any."""
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if ranks.world > 1:
        # The others wait at the next exchange while the first saves and measures.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return ranks


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
    if not args.resume and ((output / METRICS).exists() or saving.newest_step(output)):
        raise UserError(f"--output: {output} holds a run already; go on with --resume, or name another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error.strerror}); name another folder") from None
    saving.remove_broken(output)
    return output


def on_first(ranks: Ranks, value: Any) -> Any:
    """The first rank's ``value``, on all of them; every rank waits here for it."""
    box = [value]
    if ranks.world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


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
    on_first(ranks, None)
    return sources([paths["train"]]), args.heldout or paths["heldout"]


def open_corpus(
    args: argparse.Namespace, data: list[Source], processor: Processor, stage: recipe.Stage, cache: Path, ranks: Ranks
) -> Corpus:
    """The corpus on every rank; the first unpacks what has to be, the others find it."""
    gather = alone
    if ranks.world > 1:
        # The loader's thread exchanges while the training thread does: each needs a group of its own.
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))

        def gather(value: Any) -> list[Any]:
            parts = [None] * ranks.world
            dist.all_gather_object(parts, value, group=group)
            return parts

    def corpus() -> Corpus:
        options = {"workers": args.workers, "cache": cache, "timeout": args.image_timeout}
        return Corpus(
            data, processor, stage, args.skip_bad, rank=ranks.rank, world=ranks.world, gather=gather, **options
        )

    made = corpus() if ranks.first else None
    on_first(ranks, None)
    return made or corpus()


def starting_model(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, step: Path | None
) -> tuple[Phi4RV, Processor]:
    """The model to go on from: a save of this run, the checkpoint, or random weights."""
    source = step / saving.MODEL if step else args.checkpoint
    if source:
        return load(source, device, dtype, args.kernels)
    model, processor = tiny_model(args.seed, texts(), args.kernels)
    return model.to(device, dtype), processor


def measure(model: Phi4RV, processor: Processor, questions: list[Question], output: Path) -> dict[str, Scores]:
    """Scores on the held-out questions with their own pictures and with others', and the sheet of predictions."""
    given = answers(model, processor, questions)
    # Charts and screens come in no order; whoever looks at the sheet should see both.
    order = random.Random(0).sample(range(len(questions)), len(questions))
    prediction_sheet(output / "predictions.png", [questions[i] for i in order], [given[i] for i in order])
    mixed = shuffled(questions)
    return {"heldout": score(questions, given), "shuffled": score(mixed, answers(model, processor, mixed))}


def report(scores: dict[str, Scores]) -> str:
    rows = [f"{'':22}{'own picture':>14}{'shuffled':>12}"]
    own, other = scores["heldout"], scores["shuffled"]
    for name in ("point_in_box", "iou", "exact_match"):
        count = own["texts" if name == "exact_match" else "boxes"]
        if count:
            rows.append(f"{name:14}({count:4d}){'':2}{own[name]:>14.3f}{other[name]:>12.3f}")
    return "\n".join(rows)


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    overrides = {name: getattr(args, name) for name in recipe.options()}
    stage = recipe.stage(args.stage, not args.data, overrides)
    ranks = join_ranks(device)
    output = Path(on_first(ranks, str(output_folder(args)) if ranks.first else None))
    say = print if ranks.first else (lambda *words: None)
    data, heldout = data_files(args, output, ranks)
    step = saving.newest_step(output) if args.resume else None
    dtype = DTYPES[args.dtype] if args.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    model, processor = starting_model(args, device, dtype, step)
    check_weights(model.named_parameters(), str(step or args.checkpoint or "the model"))
    optimizer = Optimizer(trainable(model, stage), stage, model.ops)
    told = {
        "stage": args.stage,
        "seed": args.seed,
        "data": [str(path) for source in data for path in source.files],
        "shares": [source.share for source in data],
        "checkpoint": str(args.checkpoint) if args.checkpoint else None,
        "dtype": str(dtype),
        "skip_bad": args.skip_bad,
    }
    if step:
        saving.resume(step, optimizer, told)
        if ranks.first:
            saving.trim_metrics(output / METRICS, optimizer.steps)
    elif args.resume and ranks.first:
        (output / METRICS).unlink(missing_ok=True)
        say(f"no step-N in {output} yet: starting at the beginning")
    corpus = open_corpus(args, data, processor, stage, output / CACHE, ranks)
    questions = [Question.of(record) for record in read_records(heldout)] if heldout and ranks.first else []
    before = read_json(step / saving.STATE) if step else {}
    source = run_steps(corpus, args.seed, before.get("position"))
    total = stage.max_steps or before.get("steps") or count_steps(corpus, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in optimizer.params.values())
    say(f"stage {args.stage}: {stage}")
    say(f"{parameters:,} parameters, {trained:,} trained, {dtype} on {device}, {ranks.world} process(es)")
    say(f"kernels: {model.ops}")
    say(f"{len(corpus)} records, {total} steps, output in {output}")
    if stage.multiple() % ranks.world:
        say(f"unequal shares: steps of {stage.multiple()} sequences or a multiple; see --sequence-multiple")

    progress = Progress(output / METRICS, optimizer.steps, total) if ranks.first else None
    streak = Streak(
        lambda: saving.newest_step(output), lambda: check_weights(model.named_parameters(), "the model in memory")
    )
    peak = args.peak_tflops or peak_tflops(device)

    def on_step(metrics: dict[str, Any], taken: Step) -> None:
        if progress:
            progress.step(metrics)
        streak.add(metrics)
        if progress and args.save_every and taken.number % args.save_every == 0:
            place = {"position": corpus.place(taken.position), "steps": total}
            saving.save_step(output, model, processor, optimizer, {**told, **place})

    try:
        train(model, optimizer, corpus, source, total, ranks, on_step, peak)
        corpus.unreadable = sum(corpus.gather(corpus.unreadable))
        if progress:
            finish(model, processor, output, questions, progress)
            say(f"data: {corpus.summary()}")
    finally:
        corpus.close()
        if progress:
            progress.close()
    on_first(ranks, None)  # the others wait while the first measures


def finish(model: Phi4RV, processor: Processor, output: Path, questions: list[Question], progress: Progress) -> None:
    """Model, loss curve and, where there is held-out data, its scores."""
    progress.bar.close()
    phi4rv.save(model, processor, output / saving.MODEL)
    steps = [entry for entry in read_metrics(output / METRICS) if "loss" in entry]
    if steps:  # somebody may have taken metrics.jsonl away
        draw(output / "loss.png", [Run(str(output), steps)], ["loss"])
    if questions:
        scores = measure(model, processor, questions, output)
        progress.write(scores)
        print(report(scores))
    print(f"written: {', '.join(str(p) for p in sorted(output.iterdir()) if not p.name.startswith('.'))}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return exit_status(lambda: run(arguments(argv)), "stopped; go on with --resume from the last save")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
