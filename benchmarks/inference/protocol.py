"""The protocol of the report's Figure 2: accuracy against the time and the tokens that answers take.

``python -m benchmarks.inference --protocol [QUESTIONS.jsonl] --checkpoint DIR [--samples 100] [--modes auto think
nothink] [--max-new-tokens 4096] [--chart figure2.png] [--json FILE]``

The report took 100 samples of each of four benchmarks (ChartQA, MathVista, MMMU, ScreenSpot), asked one after another,
batch one, greedily, with at most 4096 new tokens, and averaged accuracy, wall-clock time and number of tokens over the
four. Here the questions are those of a JSON Lines file in the format of training records with a ``kind`` beside
(``chart``, ``mathematics``, ``multi-discipline``, ``screen``, or any other name), or made up by the embedded generator;
and every engine that is installed (vLLM only where ``--engines`` names it) answers all of them in every mode. Time is
from prompt and encoded picture to the whole answer. A right answer that is a box is met by a box whose centre lies in
it, any other by the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.inference.figure2 import draw
from benchmarks.inference.protocol_engines import ENGINES, ProtocolConfig, answer_all, installed
from benchmarks.inference.questions import ProtocolQuestion, check_questions, make_questions, read_questions, sample
from benchmarks.jobs import run_in_process, run_inline
from benchmarks.report.result_files import write_results
from infer.quantization.weight_loader import load
from phi4rv.command_line import (
    CHART,
    CHECKPOINT,
    MAX_NEW_TOKENS,
    MOST,
    SAMPLES,
    SEED,
    WEIGHTS,
    Number,
    OneOf,
    dtype_option,
    kernels_option,
)
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.processing.chat_template import MODES

Record = dict[str, Any]
MAX_SECONDS = 7 * 86400.0  # seconds of one engine
MEAN = "mean of kinds"


def add_options(add: Callable[..., None]) -> None:
    add(
        "--protocol",
        nargs="?",
        const="",
        metavar="JSONL",
        help="ask questions: the file's, or made-up ones if none is named",
        unset="speed is measured",
    )
    add(
        "--checkpoint",
        kind=Path,
        metavar="DIR",
        help=f"{CHECKPOINT}; in the Hugging Face layout, needed with --protocol",
        unset="none",
    )
    add("--samples", kind=Number(int, 1, MOST), default=100, help=f"{SAMPLES}; of each kind of question")
    add("--modes", nargs="+", kind=OneOf(MODES), default=list(MODES), help="modes of thinking that are asked in")
    add("--max-new-tokens", kind=Number(int, 1, MOST), default=4096, help=MAX_NEW_TOKENS)
    add(
        "--engines",
        nargs="+",
        kind=OneOf(tuple(ENGINES)),
        default=[name for name in installed() if name != "vLLM"],
        help="who answers; vLLM runs the code that lies in the checkpoint's folder",
        unset="those that are installed, without vLLM",
    )
    add("--weights", metavar="FORMATS", help=f"{WEIGHTS}; of phi4rv's engine", unset="as the checkpoint has them")
    dtype_option(add, "of all weights that are not quantised", "the checkpoint's")
    kernels_option(add)
    add("--seed", kind=Number(int, 0, below=2**32), default=0, help=f"{SEED}; questions and samples")
    add("--chart", kind=Path, metavar="PNG", help=f"{CHART}; accuracy against time and tokens", unset="not drawn")
    add("--answers", kind=Path, metavar="JSONL", help="file that each answer is added to as it comes", unset="none")


def command(args: argparse.Namespace) -> None:
    """UserError for a wrong argument, file or checkpoint, before anything is asked."""
    if args.checkpoint is None:
        raise UserError("--checkpoint: missing; name the folder of the model that is to answer")
    if args.chart and args.chart.suffix.lower() != ".png":
        raise UserError(f"--chart: {args.chart} must end in .png")
    missing = [name for name in args.engines if name not in installed()]
    if missing:
        raise UserError(f"--engines: {', '.join(missing)} is not installed")
    _, processor = load(args.checkpoint, "meta", kernels="torch", weights=args.weights)
    with open_questions(args) as questions:
        check_questions(questions, processor)
        result = run(config_from_args(args), questions, args.engines, args.answers)
    if args.json:
        write_results(args.json, {"protocol": result})
    print(table(result))
    if args.chart and result["rows"]:
        draw(args.chart, result)
        print(f"written: {args.chart}")
    if "phi4rv" in result["failed"]:
        raise UserError(f"phi4rv did not answer: {result['failed']['phi4rv']}")


def config_from_args(args: argparse.Namespace) -> ProtocolConfig:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype] if args.dtype else None
    modes = tuple(dict.fromkeys(args.modes))
    return ProtocolConfig(args.checkpoint, modes, args.max_new_tokens, device, dtype, args.kernels, args.weights)


@contextlib.contextmanager
def open_questions(args: argparse.Namespace) -> Iterator[list[ProtocolQuestion]]:
    """The samples that are asked; made-up ones lie in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.protocol) if args.protocol else make_questions(Path(folder), args.samples, args.seed)
        yield sample(read_questions(path), args.samples, args.seed)


def run(
    config: ProtocolConfig, questions: Sequence[ProtocolQuestion], engines: Sequence[str], answers: Path | None = None
) -> Record:
    """Every engine, on a GPU in a process of its own: what each kind of question took, and why an engine failed."""
    call = run_in_process if config.device == "cuda" else run_inline
    results: list[Record] = []
    failed = {}
    for name in engines:
        found, reason = call(answer_all, (name, config, questions, answers), MAX_SECONDS)
        if reason:
            failed[name] = reason
        else:
            results += found
    about = {"device": config.device, "max_new_tokens": config.new, "weights": config.weights}
    return {**about, "rows": summary(results), "failed": failed}


def summary(results: Sequence[Record]) -> list[Record]:
    """Of each engine and mode the means over each kind's questions, and then the means of these."""
    rows = []
    for engine, mode in dict.fromkeys((r["engine"], r["mode"]) for r in results):
        own = [r for r in results if (r["engine"], r["mode"]) == (engine, mode)]
        kinds = []
        for kind in dict.fromkeys(r["kind"] for r in own):
            same = [r for r in own if r["kind"] == kind]
            values = {key: mean(r[source] for r in same) for key, source in AVERAGED.items()}
            kinds.append({"engine": engine, "mode": mode, "kind": kind, "questions": len(same), **values})
        means = {key: mean(row[key] for row in kinds) for key in AVERAGED}
        rows += [*kinds, {"engine": engine, "mode": mode, "kind": MEAN, "questions": len(own), **means}]
    return rows


AVERAGED = {"accuracy": "right", "seconds": "seconds", "tokens": "tokens"}


def table(result: Record) -> str:
    width = max([len(row["kind"]) for row in result["rows"]], default=4)
    lines = [f"{'':12} {'':8} {'':{width}} questions  accuracy   seconds    tokens"]
    for row in result["rows"]:
        lines.append(
            f"{row['engine']:12} {row['mode']:8} {row['kind']:{width}} {row['questions']:9} {row['accuracy']:9.3f} "
            f"{row['seconds']:9.3f} {row['tokens']:9.1f}"
        )
    return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in result["failed"].items())])
