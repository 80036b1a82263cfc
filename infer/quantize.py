"""``python -m infer.quantize --checkpoint DIR --output DIR --weights int4``: a quantised folder, and what it costs.

The whole checkpoint is loaded, in its own dtype. Each layer's error is measured on prompts and the answers to them, the
logits' on held-out questions and the answers given before, or without those on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infer.heldout import SAMPLING_PARAMS, Question, generate, score
from infer.quantization.calibration import (
    LayerError,
    LayerInputs,
    collect_inputs,
    compute_logits,
    layer_error,
    logits_error,
    quantize_calibrated,
)
from infer.quantization.weight_loader import save
from infer.requests.outputs import Generation
from infer.requests.sampling_params import SamplingParams
from phi4rv.checkpoint.huggingface import hf_name, load
from phi4rv.command_line import (
    CHECKPOINT,
    HELDOUT,
    MAX_NEW_TOKENS,
    MOST,
    OUTPUT,
    SAMPLES,
    WEIGHTS,
    Number,
    Parser,
    device_options,
    exit_status,
    usable_device,
)
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.ops.low_precision import QuantizedWeight
from phi4rv.processing.processor import Processor, Prompt
from phi4rv.processing.records import read_records
from phi4rv.quantization.quantized_linear import parse_formats, quantize_in_chunks, quantize_layers, quantized_layers

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What pictures without questions are asked, one after another.
ASKED = (
    ("Describe this picture.", "nothink"),
    ("Read out all the text in this picture.", "nothink"),
    ("Where is the largest thing in this picture? Answer with its box.", "nothink"),
    ("What is happening here, and how can you tell?", "think"),
)


def make_parser() -> Parser:
    parser = Parser("infer.quantize", "Quantises a checkpoint, and measures what that costs.")
    add = parser.add
    add("--checkpoint", required=True, kind=Path, metavar="DIR", help=f"{CHECKPOINT}; in the Hugging Face layout")
    add("--output", required=True, kind=Path, metavar="DIR", help=f"{OUTPUT}; a new folder, which infer reads")
    add("--weights", required=True, metavar="FORMATS", help=WEIGHTS)
    add(
        "--calibration",
        kind=Path,
        metavar="PATH",
        help="folder of pictures, or JSONL of records, by which scales are chosen",
        unset="none, scales by the weights alone",
    )
    add(
        "--heldout",
        kind=Path,
        metavar="FILE",
        help=f"{HELDOUT}; before and after",
        unset="none, a drawn picture and the calibration's prompts",
    )
    add(
        "--samples",
        kind=Number(int, 1, MOST),
        default=64,
        help=f"{SAMPLES}; of --calibration and of --heldout, the first",
    )
    add(
        "--max-new-tokens",
        kind=Number(int, 1, MOST),
        default=SAMPLING_PARAMS.max_new_tokens,
        help=f"{MAX_NEW_TOKENS}; to measure on",
    )
    add("--report", kind=Path, metavar="FILE", help="file that the figures are written to, as JSON", unset="none")
    device_options(add, "of all weights that are not quantised", "the checkpoint's")
    return parser


def quantise(
    model: Phi4RV, formats: dict[str, str], inputs: dict[str, LayerInputs], choose_scales: bool
) -> list[LayerError]:
    """Quantises the model's layers in place; the error of each. ``choose_scales``: by ``inputs``."""
    errors = []

    def rounded(name: str, weight: Tensor, format: str) -> QuantizedWeight:
        seen = inputs[name]
        q = quantize_calibrated(weight, format, seen.gram) if choose_scales else quantize_in_chunks(weight, format)
        path = hf_name(name + ".weight").removesuffix(".weight")
        errors.append(layer_error(path, weight, q, torch.cat(seen.rows)))
        return q

    quantize_layers(model, formats, rounded)
    return errors


def questions_of(path: Path, count: int) -> list[Question]:
    """The first ``count`` of a file of records."""
    return [Question.from_record(record) for record in islice(read_records(path), count)]


def prompts_of(path: Path | None, count: int) -> list[Prompt]:
    """Prompts to look at the layers' inputs on: records', a folder's pictures under ASKED, or a drawn picture."""
    if path is None:
        return [_asked(picture, *asked) for picture, asked in zip(cycle([_drawn()]), ASKED)]
    if not path.is_dir():
        return [question.prompt for question in questions_of(path, count)]
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    if not pictures:
        raise UserError(f"--calibration: {path} holds no pictures ({', '.join(PICTURES)})")
    return [_asked(picture, *asked) for picture, asked in zip(pictures[:count], cycle(ASKED))]


def _asked(picture: Path | Image.Image, text: str, mode: str) -> Prompt:
    return Prompt(f"<image>\n{text}", [picture], mode)


def _drawn() -> Image.Image:
    """Noise in blocks of many sizes."""
    noise = np.random.default_rng(0)
    layers = [noise.random((384 // n, 512 // n, 3)).repeat(n, 0).repeat(n, 1) for n in (1, 4, 16, 64)]
    return Image.fromarray((255 * np.mean(layers, axis=0)).astype(np.uint8))


def compare(
    processor: Processor, questions: Sequence[Question], before: Sequence[Generation], after: Sequence[Generation]
) -> dict[str, Any]:
    """What became of the answers: how many are the same to the token, the mean number of tokens before the first
    difference of the others, and the scores (``heldout.score``) before and after.
    """
    pairs = [(a.token_ids, b.token_ids) for a, b in zip(before, after, strict=True)]
    common = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) for a, b in pairs
    ]
    parted = [n for n, (a, b) in zip(common, pairs, strict=True) if a != b]
    return {
        "questions": len(questions),
        "same_answers": len(pairs) - len(parted),
        "tokens_before_difference": sum(parted) / len(parted) if parted else None,
        "before": score(questions, [g.answer(processor) for g in before]),
        "after": score(questions, [g.answer(processor) for g in after]),
    }


def held_bytes(model: Phi4RV) -> int:
    """Of all weights."""
    tensors: list[Tensor] = [*model.parameters()]
    for layer in quantized_layers(model).values():
        tensors += [t for t in (layer.quantized.data, layer.quantized.scales, layer.quantized.zeros) if t is not None]
    return sum(t.nbytes for t in tensors)


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines: the layers by part and name, the worst of each kind, logits and answers."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in report["layers"]:
        kinds.setdefault(layer["layer"].rpartition(".")[2], []).append(layer)
    lines = [f"{'layers':<14}{'number':>7}  {'format':<10}{'weight':>8}{'output':>8}{'worst':>8}  relative error"]
    for kind, layers in kinds.items():
        weight, output = (sum(x[k] for x in layers) / len(layers) for k in ("weight_error", "output_error"))
        worst = max(x["output_error"] for x in layers)
        lines.append(f"{kind:<14}{len(layers):>7}  {layers[0]['format']:<10}{weight:>8.4f}{output:>8.4f}{worst:>8.4f}")
    logits = report["logits"]
    lines.append(f"logits: relative error {logits['relative']:.4f}, KL {logits['kl']:.2g} nats, same first token ")
    lines[-1] += f"{logits['same_first']:.3f}"
    if found := report.get("heldout"):
        lines.append(f"answers: {found['same_answers']} of {found['questions']} the same to the token")
        for name in ("exact_match", "point_in_box", "iou"):
            if found["before"][name] is not None:
                lines.append(f"{name}: {found['before'][name]:.3f} before, {found['after'][name]:.3f} after")
    lines.append(f"weights: {report['bytes_before'] / 1e9:.3f} GB before, {report['bytes_after'] / 1e9:.3f} GB after")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    formats = parse_formats(args.weights)
    sampling_params = SamplingParams(max_new_tokens=args.max_new_tokens)
    if args.output.exists():
        raise UserError(f"--output: {args.output} exists already; name a new folder")
    if args.report and not args.report.parent.is_dir():
        raise UserError(f"--report: {args.report.parent} is no folder; name a file in one that exists")
    prompts = prompts_of(args.calibration, args.samples)
    questions = questions_of(args.heldout, args.samples) if args.heldout else []
    device = usable_device(args.device) if args.device else None
    model, processor = load(args.checkpoint, device, DTYPES[args.dtype] if args.dtype else None, args.kernels)
    size = held_bytes(model)
    answered = generate(model, processor, prompts, sampling_params)
    inputs = collect_inputs(model, processor, answered, formats)
    asked = [question.prompt for question in questions]
    before = generate(model, processor, asked, sampling_params) if asked else answered
    logits = compute_logits(model, processor, before)
    layers = quantise(model, formats, inputs, args.calibration is not None)
    report: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "weights": args.weights,
        "calibration": str(args.calibration) if args.calibration else None,
        "prompts": len(prompts),
        "bytes_before": size,
        "bytes_after": held_bytes(model),
        "logits": logits_error(compute_logits(model, processor, before), logits),
        "layers": [asdict(layer) for layer in layers],
    }
    if asked:
        after = generate(model, processor, asked, sampling_params)
        report["heldout"] = compare(processor, questions, before, after)
    save(model, processor, args.output)
    if args.report:
        args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(summary(report))
    print(f"written: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
