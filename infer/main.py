"""``python -m infer.main --checkpoint DIR --image a.png --prompt "…"``: answers printed as they are written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import phi4rv
from infer.draw_boxes import draw_answer
from infer.engine.engine import Engine
from infer.engine_arguments import engine_config_of, engine_options, load_model, model_options
from infer.requests.outputs import Generation, StreamEvent
from infer.requests.sampling_params import MAX_LOGPROBS, MAX_SEED, MAX_VALUE, SamplingParams
from phi4rv.command_line import JSON, MAX_NEW_TOKENS, MOST, SEED, Number, OneOf, Parser, exit_status
from phi4rv.errors import UserError
from phi4rv.processing.answers import THINK_END, find_boxes, find_points, pixel_box
from phi4rv.processing.chat_template import IMAGE_TOKEN, MODES, THINK
from phi4rv.processing.images import open_image


def make_parser() -> Parser:
    parser = Parser("infer.main", "Asks a checkpoint about pictures, and prints the answers as they are written.")
    model_options(parser.section("model"))
    _question_options(parser.section("question and answer"))
    _sampling_options(parser.section("sampling"))
    engine_options(parser.section("engine"))
    return parser


def _question_options(add: Callable[..., None]) -> None:
    add("--prompt", action="append", required=True, metavar="TEXT", help="question; repeat it to ask several at once")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help=f"picture; one for each {IMAGE_TOKEN} mark of the prompts, in order; without a mark it goes in front",
        unset="none",
    )
    add("--mode", kind=OneOf(MODES), default="auto", help="think first, answer directly, or let the model decide")
    add("--max-new-tokens", kind=Number(int, 1, MOST), default=4096, help=MAX_NEW_TOKENS)
    add(
        "--max-thinking-tokens",
        kind=Number(int, 0, MOST),
        help="tokens after which a thought is ended and the answer begins",
        unset="no limit of its own",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends the answer; repeatable",
        unset="none",
    )
    add("--json-schema", metavar="FILE", help="file with a JSON schema that the answer fits", unset="none")
    add("--regex", metavar="PATTERN", help="regular expression that the whole answer matches", unset="none")
    add(
        "--logprobs",
        kind=Number(int, 0, MAX_LOGPROBS),
        help="with --json: most probable tokens to tell beside each token's own log-probability",
        unset="no log-probabilities",
    )
    add("--json", action="store_true", help=f"{JSON}; printed, one object a prompt, a line each")
    add(
        "--draw",
        metavar="PNG",
        help="write the first picture with its answer's boxes and points on it",
        unset="no picture",
    )


def _sampling_options(add: Callable[..., None]) -> None:
    add("--temperature", kind=Number(float, 0, MAX_VALUE), default=0.0, help="what logits are divided by; 0: greedy")
    add(
        "--top-k",
        kind=Number(int, 0, below=MAX_SEED + 1),
        default=0,
        help="most probable tokens that are kept; 0: every",
    )
    add(
        "--top-p",
        kind=Number(float, above=0, high=1),
        default=1.0,
        help="probability that the kept tokens reach together, the most probable first; 1: every token",
    )
    add(
        "--min-p",
        kind=Number(float, 0, 1),
        default=0.0,
        help="tokens at least this share as probable as the best are kept; 0: every token",
    )
    add(
        "--repetition-penalty",
        kind=Number(float, 1e-30, MAX_VALUE),
        default=1.0,
        help="factor against tokens that prompt or answer hold already (Keskar et al. 2019); 1: none",
    )
    add("--seed", kind=Number(int, 0, below=MAX_SEED + 1), default=0, help=f"{SEED}; prompt i draws with seed + i")


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
    return exit_status(lambda: run(make_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
