"""``python -m infer.main --checkpoint DIR --image a.png --prompt "…"``: answers printed as they are written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import phi4rv
from infer.draw import draw_answer
from infer.engine import Generation, generate
from infer.sampling import Sampling
from phi4rv.answers import pixel_box
from phi4rv.chat import IMAGE_MARK, MODES
from phi4rv.command import Parser, exit_status, usable_device
from phi4rv.config import DTYPES
from phi4rv.errors import UserError
from phi4rv.images import open_image
from phi4rv.lora import merge_adapter
from phi4rv.ops import KERNELS


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m infer.main", description="Ask a checkpoint about pictures.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a folder in the published layout")
    add("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's layout, merged into the weights as they are loaded")
    add("--image", action="append", default=[], metavar="FILE", help="one for each <image> mark, in order")
    add("--prompt", action="append", required=True, metavar="TEXT", help="repeat it to ask several at once")
    add("--mode", default="auto", choices=MODES, help="think first, answer directly, or let the model decide")
    add("--max-new-tokens", type=int, default=4096, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="0 keeps every token")
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, help="the checkpoint's unless given")
    add("--device", help="cuda where there is one, else cpu")
    add("--kernels", metavar="KIND", help=f"one of {', '.join(KERNELS)}; exceptions behind it: triton,adamw=torch")
    add("--json", action="store_true", help="one JSON object a prompt, a line each")
    add("--draw", metavar="PNG", help="write the picture with the answer's boxes on it")
    return parser.parse_args(argv)


def split_images(texts: Sequence[str], images: Sequence[Any]) -> list[list[Any]]:
    """The images of each prompt, taken in order by its marks. UserError unless all are used."""
    marks = [text.count(IMAGE_MARK) for text in texts]
    if sum(marks) != len(images):
        raise UserError(
            f"--image: {len(images)} given for {sum(marks)} {IMAGE_MARK} mark(s) in the prompt(s); give one for each"
        )
    remaining = iter(images)
    return [[next(remaining) for _ in range(n)] for n in marks]


def prompts_of(args: argparse.Namespace) -> list[phi4rv.Prompt]:
    """One Prompt for each ``--prompt``. A single one without marks gets its images in front."""
    texts = list(args.prompt)
    if len(texts) == 1 and IMAGE_MARK not in texts[0]:
        texts = [f"{IMAGE_MARK}\n" * len(args.image) + texts[0]]
    images = [open_image(path) for path in args.image]
    return [phi4rv.Prompt(text, own, args.mode) for text, own in zip(texts, split_images(texts, images), strict=True)]


def as_json(generation: Generation, processor: phi4rv.Processor) -> dict[str, Any]:
    """The object that ``--json`` prints. ``boxes`` are pixels of the prompt's first image."""
    answer = generation.answer(processor)
    images = generation.prompt.images
    size = open_image(images[0]).size if images else None
    new = len(generation.token_ids)
    return {
        "text": answer.text,
        "thinking": answer.thinking,
        "token_ids": generation.token_ids,
        "prompt_tokens": generation.prompt_tokens,
        "image_tokens": generation.image_tokens,
        "finish_reason": generation.finish_reason,
        "boxes": [pixel_box(box, *size) for box in answer.boxes] if size else [],
        "normalized_boxes": answer.boxes,
        "timing": {
            "prefill_seconds": generation.prefill_seconds,
            "decode_seconds": generation.decode_seconds,
            "tokens_per_second": new / generation.decode_seconds if generation.decode_seconds else None,
        },
    }


class Stream:
    """Prints the text of one prompt as its tokens come; a character waits until all its bytes are there."""

    def __init__(self, processor: phi4rv.Processor):
        self.processor, self.ids, self.printed = processor, [], ""  # type: tuple[Any, list[int], str]

    def __call__(self, number: int, token: int) -> None:
        self.ids.append(token)
        text = self.processor.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text

    def end(self) -> None:
        print(self.processor.decode(self.ids)[len(self.printed) :], flush=True)


def write_drawing(path: Path, generations: Sequence[Generation], processor: phi4rv.Processor) -> None:
    """The first picture of the first prompt that has one, with that prompt's boxes and points."""
    shown = next((g for g in generations if g.prompt.images), None)
    if shown is None:
        raise UserError("--draw: there is no picture to draw on; give one with --image")
    answer = shown.answer(processor)
    try:
        draw_answer(open_image(shown.prompt.images[0]), answer.boxes, answer.points).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--draw {path}: cannot be written ({error}); give a .png in a folder that exists") from None
    if not answer.boxes and not answer.points:
        print("--draw: the answer names no box and no point; the picture is written as it is", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.draw and not args.image:
        raise UserError("--draw: there is no picture to draw on; give one with --image")
    prompts = prompts_of(args)
    dtype = DTYPES[args.dtype] if args.dtype else None
    device = usable_device(args.device) if args.device else None
    model, processor = phi4rv.load(args.checkpoint, device, dtype, args.kernels)
    if args.adapter:
        merge_adapter(model, args.adapter)
    stream = Stream(processor) if not args.json and len(prompts) == 1 else None
    generations = generate(model, processor, prompts, args.max_new_tokens, sampling, stream)
    if stream:
        stream.end()
    for generation in generations:
        if args.json:
            print(json.dumps(as_json(generation, processor), ensure_ascii=False))
        elif not stream:
            print(processor.decode(generation.token_ids))
    if args.draw:
        write_drawing(Path(args.draw), generations, processor)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
