"""Held-out questions, asked with their own picture and with another's, and what the answers score.

What a model scores with the pictures shuffled is what it guesses without looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infer.engine.config import Limits
from infer.engine.engine import Engine
from infer.requests.request import Generation, Options
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.answers import Answer, Box, parse_answer
from phi4rv.processing.chat_template import IMAGE_TOKEN, THINK
from phi4rv.processing.image_files import ImageFiles
from phi4rv.processing.processor import Processor, Prompt
from phi4rv.processing.records import Record

OPTIONS = Options(max_new_tokens=64)
TOGETHER = 50  # questions
FILES = ImageFiles()
Scores = dict[str, float | int | None]


@dataclass(frozen=True)
class Question:
    """The first question of a record, in the mode of its right answer, and that answer."""

    prompt: Prompt
    right: Answer

    @staticmethod
    def of(record: Record) -> Question:
        number = next(i for i, turn in enumerate(record.turns) if turn.role == "assistant")
        *before, asked = record.turns[:number]
        said = record.turns[number].content
        images = [FILES.source(path) for path in record.images[: asked.content.count(IMAGE_TOKEN)]]
        mode = "think" if said.lstrip().startswith(THINK) else "nothink"
        text = [*before, asked] if before else asked.content
        return Question(Prompt(text, images, mode), parse_answer(said))

    def with_images(self, images: Sequence[Any]) -> Question:
        return Question(Prompt(self.prompt.text, images, self.prompt.mode), self.right)


def shuffled(questions: Sequence[Question]) -> list[Question]:
    """Each question with the pictures of the next one that shows as many."""
    out = []
    for i, question in enumerate(questions):
        later = [*questions[i + 1 :], *questions[:i]]
        count = len(question.prompt.images)
        other = next((q for q in later if len(q.prompt.images) == count), question)
        out.append(question.with_images(other.prompt.images))
    return out


def generations(
    model: Phi4RV, processor: Processor, prompts: Sequence[Prompt], options: Options = OPTIONS
) -> list[Generation]:
    """Greedy answers, TOGETHER at a time at most, in a cache of two windows: training may hold most of the memory."""
    limits = Limits(max_running=TOGETHER, cache_tokens=2 * model.config.context)
    return Engine((model, processor), limits=limits).generate(prompts, options)


def answers(model: Phi4RV, processor: Processor, questions: Sequence[Question]) -> list[Answer]:
    return [g.answer(processor) for g in generations(model, processor, [q.prompt for q in questions])]


def score(questions: Sequence[Question], given: Sequence[Answer]) -> Scores:
    """Means over the questions: ``point_in_box`` and ``iou`` where the answer is a box, ``exact_match`` elsewhere.

    point_in_box (ScreenSpot): the centre of the answer's first box lies in the right one. Text is compared
    without case and without the white space around it. No box, or no text, scores 0. None where nothing was asked.
    """
    boxes = [(q.right.boxes[0], a.boxes[:1]) for q, a in zip(questions, given, strict=True) if q.right.boxes]
    texts = [(q.right.text, a.text) for q, a in zip(questions, given, strict=True) if not q.right.boxes]
    return {
        "boxes": len(boxes),
        "point_in_box": _mean([bool(found) and centre_in(found[0], right) for right, found in boxes]),
        "iou": _mean([iou(found[0], right) if found else 0.0 for right, found in boxes]),
        "texts": len(texts),
        "exact_match": _mean([right.strip().lower() == said.strip().lower() for right, said in texts]),
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
