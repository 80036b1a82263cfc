"""``python -m infer.main --checkpoint DIR --image a.png --prompt "…"``: answers printed as they are written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import phi4rv
from infer.draw_boxes import draw_answer
from infer.engine.engine import Engine
from infer.engine_arguments import engine_config_of, engine_options, load_model, model_options
from infer.requests.outputs import Generation, StreamEvent
from infer.requests.sampling_params import SamplingParams
from phi4rv.command_line import Parser, exit_status
from phi4rv.errors import UserError
from phi4rv.processing.answers import THINK_END, find_boxes, find_points, pixel_box
from phi4rv.processing.chat_template import IMAGE_TOKEN, MODES, THINK
from phi4rv.processing.images import open_image


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m infer.main", description="Ask a checkpoint about pictures.")
    add = parser.add_argument
    model_options(parser)
    add("--image", action="append", default=[], metavar="FILE", help="one for each <image> mark, in order")
    add("--prompt", action="append", required=True, metavar="TEXT", help="repeat it to ask several at once")
    add("--mode", default="auto", choices=MODES, help="think first, answer directly, or let the model decide")
    add("--max-new-tokens", type=int, default=4096, metavar="N")
    add("--max-thinking-tokens", type=int, metavar="N", help="then the thought is ended and the answer begins")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0, help="0 keeps every token")
    add("--min-p", type=float, default=0.0, help="keeps tokens at least this share as probable as the best")
    add("--repetition-penalty", type=float, default=1.0, metavar="X")
    add("--seed", type=int, default=0, help="prompt i draws with seed + i")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer where it says this")
    add("--json-schema", metavar="FILE", help="the answer is JSON that fits the schema in this file")
    add("--regex", metavar="PATTERN", help="the answer matches this")
    add("--logprobs", type=int, metavar="N", help="with --json: each token's log-probability and the N best")
    engine_options(parser)
    add("--json", action="store_true", help="one JSON object a prompt, a line each")
    add("--draw", metavar="PNG", help="write the picture with the answer's boxes on it")
    return parser.parse_args(argv)


def sampling_params_of(args: argparse.Namespace) -> SamplingParams:
    names = (
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"),
        *("max_new_tokens", "logprobs", "max_thinking_tokens", "regex"),
    )
    schema = Path(args.json_schema).read_text(encoding="utf-8") if args.json_schema else None
    return SamplingParams(**{name: getattr(args, name) for name in names}, stop=tuple(args.stop), json_schema=schema)


def split_images(texts: Sequence[str], images: Sequence[Any]) -> list[list[Any]]:
    """The images of each prompt, taken in order by its marks. UserError unless all are used."""
    marks = [text.count(IMAGE_TOKEN) for text in texts]
    if sum(marks) != len(images):
        raise UserError(
            f"--image: {len(images)} given for {sum(marks)} {IMAGE_TOKEN} mark(s) in the prompt(s); give one for each"
        )
    remaining = iter(images)
    return [[next(remaining) for _ in range(n)] for n in marks]


def prompts_of(args: argparse.Namespace) -> list[phi4rv.Prompt]:
    """One Prompt for each ``--prompt``. A single one without marks gets its images in front."""
    texts = list(args.prompt)
    if len(texts) == 1 and IMAGE_TOKEN not in texts[0]:
        texts = [f"{IMAGE_TOKEN}\n" * len(args.image) + texts[0]]
    images = [open_image(path) for path in args.image]
    return [phi4rv.Prompt(text, own, args.mode) for text, own in zip(texts, split_images(texts, images), strict=True)]


def as_json(generation: Generation, processor: phi4rv.Processor) -> dict[str, Any]:
    """The object that ``--json`` prints. ``boxes`` are pixels of the prompt's first image."""
    boxes = find_boxes(generation.text)
    images = generation.prompt.images
    size = open_image(images[0]).size if images else None
    decoding = generation.total_seconds - generation.first_token_seconds
    made: dict[str, Any] = {
        "text": generation.text,
        "thinking": generation.thinking,
        "token_ids": generation.token_ids,
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "image_tokens": generation.image_tokens,
        "finish_reason": generation.finish_reason,
        "boxes": [pixel_box(box, *size) for box in boxes] if size else [],
        "normalized_boxes": boxes,
        "timing": {
            "queue_seconds": generation.queue_seconds,
            "first_token_seconds": generation.first_token_seconds,
            "total_seconds": generation.total_seconds,
            "tokens_per_second": (len(generation.token_ids) - 1) / decoding if decoding > 0 else None,
        },
    }
    if generation.logprobs:
        made["logprobs"] = [
            {"token": processor.decode([p.token_id]), "logprob": p.logprob, "top": dict(_spelled(p.top, processor))}
            for p in generation.logprobs
        ]
    return made


def _spelled(top: Sequence[tuple[int, float]], processor: phi4rv.Processor) -> list[tuple[str, float]]:
    return [(processor.decode([token]), value) for token, value in top]


class Printer:
    """Prints one answer as it comes, a thought between its tags in front."""

    def __init__(self) -> None:
        self.thinking = False

    def __call__(self, event: StreamEvent) -> None:
        if event.thinking:
            self._print(event.thinking if self.thinking else f"{THINK}\n{event.thinking}")
            self.thinking = True
        if event.text:
            self._print(f"\n{THINK_END}\n{event.text}" if self.thinking else event.text)
            self.thinking = False
        if event.generation:
            self._print(f"\n{THINK_END}\n" if self.thinking else "\n")

    @staticmethod
    def _print(text: str) -> None:
        print(text, end="", flush=True)


def write_drawing(path: Path, generations: Sequence[Generation]) -> None:
    """The first picture of the first prompt that has one, with that prompt's boxes and points."""
    shown = next((g for g in generations if g.prompt.images), None)
    if shown is None:
        raise UserError("--draw: there is no picture to draw on; give one with --image")
    boxes, points = find_boxes(shown.text), find_points(shown.text)
    try:
        draw_answer(open_image(shown.prompt.images[0]), boxes, points).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--draw {path}: cannot be written ({error}); give a .png in a folder that exists") from None
    if not boxes and not points:
        print("--draw: the answer names no box and no point; the picture is written as it is", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    sampling_params, engine_config = sampling_params_of(args), engine_config_of(args)
    if args.draw and not args.image:
        raise UserError("--draw: there is no picture to draw on; give one with --image")
    prompts = prompts_of(args)
    model, processor = load_model(args)
    engine = Engine((model, processor), config=engine_config)
    if len(prompts) == 1 and not args.json:
        printer = Printer()
        for event in engine.stream(prompts[0], sampling_params):
            printer(event)
            generation = event.generation
        assert generation is not None
        generations = [generation]
    else:
        progress = len(prompts) > 1 and sys.stderr.isatty()
        generations = engine.generate(prompts, sampling_params, progress)
        for generation in generations:
            if args.json:
                print(json.dumps(as_json(generation, processor), ensure_ascii=False))
            else:
                Printer()(StreamEvent(0, (), generation.thinking or "", generation.text, generation=generation))
    if args.draw:
        write_drawing(Path(args.draw), generations)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
