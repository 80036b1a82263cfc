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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from phi4rv.checkpoint import load
from phi4rv.command import Parser, exit_status, usable_device
from phi4rv.config import DTYPES, read_json
from phi4rv.errors import UserError
from phi4rv.model import Phi4RV
from phi4rv.ops import KERNELS
from phi4rv.processor import Processor
from phi4rv.recompute import CHECKPOINTING
from train import recipe, saving
from train.build import build
from train.context import join_context
from train.data import Corpus
from train.guard import Streak, check_weights
from train.hardware import peak_tflops
from train.heldout import Question, Scores, answers, score, shuffled
from train.metrics import Progress, read_metrics
from train.parallel import SHARDS, device_mesh, local
from train.plot import METRICS, Run, draw
from train.ranks import Ranks, gatherer, join_ranks
from train.records import read_records
from train.sheet import prediction_sheet
from train.sources import Source, sources
from train.stream import Step, count_steps, run_steps
from train.synthetic import write_dataset
from train.trainer import train
from train.watch import TERMINATED, Terminate, Terminated, watched

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
    add("--keep", type=int, default=saving.KEEP_ALL, metavar="N", help="saves kept, the newest ones; 0: all")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the newest step-N in the output folder")
    add("--skip-bad", action="store_true", help="count and skip bad records instead of stopping at the first")
    add("--workers", type=int, default=0, metavar="N", help="processes that tokenize and decode; 0: a thread")
    add("--image-timeout", type=float, default=60.0, metavar="S", help="seconds an image may take in a worker")
    add("--shard", choices=SHARDS, default="none", help="what the processes share out: ZeRO-1, -2 or -3")
    add(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="copies of the sharded model (HSDP)",
    )
    add("--context", type=int, default=1, metavar="N", help="processes that share each row of tokens (all-to-all)")
    add("--device", help="cuda where there is one, else cpu")
    add("--dtype", choices=DTYPES, help="of weights and activations: bfloat16 on a GPU, float32 on a CPU")
    add("--kernels", metavar="KIND", help=f"one of {', '.join(KERNELS)}; exceptions behind it: triton,adamw=torch")
    add("--peak-tflops", type=float, metavar="X", help="of a device, for MFU; default: train/hardware.py's, by name")
    add(
        "--checkpointing",
        choices=CHECKPOINTING,
        default="none",
        help="what is not kept is computed twice (phi4rv/recompute.py)",
    )
    add("--compile", action="store_true", help="the layers of tower and decoder by torch.compile")
    fields = parser.add_argument_group("the stage's hyperparameters (train/recipe.py), each to be overridden")
    for name, kind in recipe.options().items():
        fields.add_argument("--" + name.replace("_", "-"), type=kind)
    args = parser.parse_args(argv)
    for name in ("save_every", "keep"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} must be 0 or more")
    if args.shard == "none" and args.replicas != 1:
        raise UserError(f"--replicas: {args.replicas} copies, but nothing is sharded between them; give --shard too")
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (args.resume and args.output):
        raise UserError("--resume: needed with torchrun --max-restarts, and --output too: a restart goes on from there")
    if args.peak_tflops is not None and not 0 < args.peak_tflops < math.inf:
        raise UserError(f"--peak-tflops: {args.peak_tflops} must be above 0")
    if args.workers < 0:
        raise UserError(f"--workers: {args.workers} must be 0 or more")
    if not 0 < args.image_timeout < float("inf"):
        raise UserError(f"--image-timeout: {args.image_timeout} must be a number above 0")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed: {args.seed} must be in [0, 2^32)")
    return args


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
    ranks = join_ranks(device)
    with watched(ranks):
        run_stage(args, device, ranks)


def run_stage(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> None:
    overrides = {name: getattr(args, name) for name in recipe.options()}
    stage = recipe.stage(args.stage, not args.data, overrides)
    shard = args.shard if ranks.world > 1 else "none"
    mesh = device_mesh(ranks, args.replicas, device) if shard != "none" else None
    context = join_context(args.context, ranks, args.replicas)
    output = Path(ranks.from_first(str(output_folder(args)) if ranks.first else None))
    say = print if ranks.first else (lambda *words: None)
    data, heldout = data_files(args, output, ranks)
    step = ranks.from_first(saving.newest_step(output) if args.resume else None)
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
        saving.resume(step, model, optimizer, ranks, told)
        if ranks.first:
            saving.trim_metrics(output / METRICS, optimizer.steps)
    elif args.resume and ranks.first:
        (output / METRICS).unlink(missing_ok=True)
        say(f"no step-N in {output} yet: starting at the beginning")
    check_weights(weights(model), str(step or args.checkpoint or "the model"))
    corpus = open_corpus(args, data, processor, stage, output / CACHE, ranks)
    questions = [Question.of(record) for record in read_records(heldout)] if heldout and ranks.first else []
    before = read_json(step / saving.STATE) if step else {}
    position = before.get("position")
    if position and not ranks.first:
        position["unreadable"] = 0  # the save has the sum over the ranks
    source = run_steps(corpus, args.seed, position)
    if len(corpus) > 100_000 and not (stage.max_steps or step):
        say("measuring every record once, to count the steps; --max-steps spares that")
    total = stage.max_steps or before.get("steps") or count_steps(corpus, args.seed)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in optimizer.params.values())
    say(f"stage {args.stage}: {stage}")
    say(f"{parameters:,} parameters, {trained:,} trained, {dtype} on {device}, {ranks.world} process(es)")
    if mesh:
        say(f"sharded: {shard}, over {mesh['shard'].size()} process(es), {args.replicas} time(s)")
    say(f"kernels: {model.ops}")
    say(f"{len(corpus)} records, {total} steps, output in {output}")
    if context.size > 1:
        say(f"context: {context.size} process(es) share a row")
    if stage.multiple() % (ranks.world // context.size):
        say(f"unequal shares: steps of {stage.multiple()} sequences or a multiple; see --sequence-multiple")

    progress = Progress(output / METRICS, optimizer.steps, total) if ranks.first else None
    saver, terminate = saving.Saver(output, ranks, args.keep), Terminate()
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
        done = train(model, optimizer, corpus, source, total, ranks, on_step, peak, shard, stop, context)
        saver.wait()
        if not done:
            save()
            saver.wait()
            raise Terminated
        terminate.close()
        corpus.unreadable = sum(corpus.gather(corpus.unreadable))
        saving.save_result(output, model, processor, stage, dtype, ranks, told["checkpoint"])
        if progress:
            progress.bar.close()
            if mesh and questions:
                model = load(output / saving.MODEL, device, dtype, args.kernels)[0]
            finish(model, processor, output, questions, progress)
            say(f"data: {corpus.summary()}")
    finally:
        terminate.close()
        saver.close()
        corpus.close()
        if progress:
            progress.close()
    ranks.from_first(None)  # the others wait while the first measures


def weights(model: Phi4RV) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and this rank's part of every parameter."""
    return ((name, local(p.detach())) for name, p in model.named_parameters())


def finish(model: Phi4RV, processor: Processor, output: Path, questions: list[Question], progress: Progress) -> None:
    """Loss curve and, where there is held-out data, its scores."""
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
    except Terminated:
        print("saved; go on with --resume", file=sys.stderr)
        return TERMINATED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
