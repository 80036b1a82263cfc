"""Draws 30 pictures with questions, fine-tunes a model on them with LoRA, and asks it about one.

    python -m examples.finetune_30_records [--checkpoint DIR] [--output DIR] [--max-steps N]

Without a checkpoint it takes a tiny one of random weights: seconds on a CPU, in which it learns how to answer and
hardly to look; that takes a model that sees already. What is given to `train.main` below are
options of its command line.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

import infer
import phi4rv
from train.main import main as train
from train.synthetic.records import tokenizer_corpus
from train.synthetic.tiny_model import build_tiny_model

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220)}
SHAPES = ("circle", "square")
QUESTION = "<image>\nWhat is in the picture?"


def draw(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """A shape somewhere on white, 96 by 96 pixels."""
    image = Image.new("RGB", (96, 96), "white")
    left, top, size = rng.randint(4, 40), rng.randint(4, 40), rng.randint(32, 48)
    pen, box = ImageDraw.Draw(image), (left, top, left + size, top + size)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=COLOURS[colour])
    return image


def write_records(folder: Path, count: int = 30) -> Path:
    """Pictures, and beside them the JSON Lines file of docs/data-formats.md."""
    rng, lines = random.Random(0), []
    for number in range(count):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        draw(colour, shape, rng).save(folder / f"{number}.png")
        answer = f"<nothink>A {colour} {shape}."
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": [turns]}) + "\n")
    data = folder / "records.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    return data


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.finetune_30_records", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="tiny, of random weights, unless given")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder; a temporary one unless given")
    parser.add_argument("--max-steps", default="40", metavar="N")
    args = parser.parse_args(argv)
    output = args.output or Path(tempfile.mkdtemp(prefix="finetune-"))
    output.mkdir(exist_ok=True)
    data, run, checkpoint = write_records(output), output / "run", args.checkpoint or output / "base"
    if not args.checkpoint:
        phi4rv.save(*build_tiny_model(0, tokenizer_corpus()), checkpoint)

    options = ["--stage", "2", "--checkpoint", str(checkpoint), "--data", str(data), "--output", str(run)]
    options += ["--lora-rank", "16", "--lora-targets", "qkv_proj,o_proj,gate_up_proj,down_proj,lm_head"]
    options += ["--lr", "5e-3", "--warmup", "5", "--global-batch", "4", "--sequence-length", "1024"]
    options += ["--max-steps", args.max_steps]
    if status := train(options):
        raise SystemExit(status)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")

    model, processor = phi4rv.load(checkpoint)
    phi4rv.merge_adapter(model, run / "adapter")
    prompt = phi4rv.Prompt(QUESTION, images=[draw("green", "circle", random.Random(1))], mode="nothink")
    [answer] = infer.Engine((model, processor)).generate([prompt], infer.SamplingParams(max_new_tokens=16))
    print(f"asked about a green circle: {answer.text}")


if __name__ == "__main__":
    main()
