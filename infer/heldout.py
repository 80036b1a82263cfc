"""Evaluation on held-out questions, with their own images and with those of other questions.

The score with shuffled images is what the model reaches by guessing, without looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.outputs import Generation
from infer.requests.sampling_params import SamplingParams
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.answers import Answer, Box, parse_answer
from phi4rv.processing.chat_template import IMAGE_TOKEN, THINK
from phi4rv.processing.image_files import ImageFiles
from phi4rv.processing.processor import Processor, Prompt
from phi4rv.processing.records import Record

SAMPLING_PARAMS = SamplingParams(max_new_tokens=64)
MAX_RUNNING = 50  # questions at once
IMAGE_FILES = ImageFiles()
Scores = dict[str, float | int | None]


@dataclass(frozen=True)
class Question:
    """The first question of a record, in the mode of its reference answer, and that answer."""

    prompt: Prompt
    reference: Answer

    @staticmethod
    def from_record(record: Record) -> Question:
        first_answer = next(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
        *history, user = record.turns[:first_answer]
        answer = record.turns[first_answer].content
        images = [IMAGE_FILES.source(path) for path in record.images[: user.content.count(IMAGE_TOKEN)]]
        mode = "think" if answer.lstrip().startswith(THINK) else "nothink"
        text = [*history, user] if history else user.content
        return Question(Prompt(text, images, mode), parse_answer(answer))

    def with_images(self, images: Sequence[Any]) -> Question:
        return Question(Prompt(self.prompt.text, images, self.prompt.mode), self.reference)


def shuffle_images(questions: Sequence[Question]) -> list[Question]:
    """Each question with the images of the next one that has as many."""
    out = []
    for i, question in enumerate(questions):
        later = [*questions[i + 1 :], *questions[:i]]
        count = len(question.prompt.images)
        other = next((q for q in later if len(q.prompt.images) == count), question)
        out.append(question.with_images(other.prompt.images))
    return out


def generate(
    model: Phi4RV,
    processor: Processor,
    prompts: Sequence[Prompt],
    sampling_params: SamplingParams = SAMPLING_PARAMS,
) -> list[Generation]:
    """Answers, in a KV cache of two context windows: training may hold most of the memory."""
    config = EngineConfig(max_running=MAX_RUNNING, cache_tokens=2 * model.config.context)
    return Engine((model, processor), config=config).generate(prompts, sampling_params)


def answers(model: Phi4RV, processor: Processor, questions: Sequence[Question]) -> list[Answer]:
    return [g.answer(processor) for g in generate(model, processor, [q.prompt for q in questions])]


def score(questions: Sequence[Question], given: Sequence[Answer]) -> Scores:
    """Means over the questions: ``point_in_box`` and ``iou`` where the answer is a box, ``exact_match`` elsewhere.

    point_in_box (ScreenSpot): the centre of the answer's first box lies in the reference's. Text is compared
    without case and without the white space around it. No box, or no text, scores 0. None without such questions.
    """
    pairs = list(zip(questions, given, strict=True))
    boxes = [(q.reference.boxes[0], a.boxes[:1]) for q, a in pairs if q.reference.boxes]
    texts = [(q.reference.text, a.text) for q, a in pairs if not q.reference.boxes]
    return {
        "boxes": len(boxes),
        "point_in_box": _mean([bool(found) and centre_in(found[0], reference) for reference, found in boxes]),
        "iou": _mean([iou(found[0], reference) if found else 0.0 for reference, found in boxes]),
        "texts": len(texts),
        "exact_match": _mean([reference.strip().lower() == text.strip().lower() for reference, text in texts]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def centre_in(box: Box, target: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return target[0] <= x <= target[2] and target[1] <= y <= target[3]


def iou(a: Box, b: Box) -> float:
    """Area of the intersection over that of the union; 0 for two empty boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = _area(a) + _area(b) - both
    return both / union if union else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
