"""Questions of several kinds with their right answers: read, made up, sampled, and scored."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from infer.heldout import Question, score
from phi4rv.errors import UserError
from phi4rv.processing.answers import Answer
from phi4rv.processing.image_files import ImageFiles
from phi4rv.processing.processor import Processor, Prompt
from phi4rv.processing.records import parse_line
from train.data.line_index import JsonLines
from train.synthetic.charts import random_chart, random_scene
from train.synthetic.records import Record, as_json, with_opening
from train.synthetic.screens import random_screen

# What the embedded generator draws.
GENERATORS = {"chart": random_chart, "scene": random_scene, "screen": random_screen}


@dataclass(frozen=True)
class ProtocolQuestion:
    """A question of one kind; ``where``: its line, ``file.jsonl:12``."""

    kind: str
    where: str
    question: Question

    def prompt(self, mode: str) -> Prompt:
        return replace(self.question.prompt, mode=mode)

    def right(self, given: Answer) -> bool:
        """The centre of the answer's first box in the right one; where that has no box, the same text, without case
        and the white space around it (``infer/heldout.py``).
        """
        scores = score([self.question], [given])
        return bool(scores["point_in_box"] if scores["boxes"] else scores["exact_match"])


def read_questions(path: Path) -> list[ProtocolQuestion]:
    """Of a file in the format of training records, gzipped or not, whose objects have a ``kind`` too: the first
    question of each conversation. UserError naming the line that is wrong.
    """
    files, found = ImageFiles(), []
    with tempfile.TemporaryDirectory() as unpacked:
        for line in JsonLines([path], Path(unpacked)):
            content = line.read()
            records = parse_line(content, line.where, path.parent, files)
            kind = json.loads(content).get("kind")
            if not isinstance(kind, str) or not kind.strip():
                raise UserError(f"{line.where}: 'kind' is {kind!r}; name the kind of question: chart or screen, say")
            found += [ProtocolQuestion(kind.strip(), line.where, Question.from_record(record)) for record in records]
    return found


def make_questions(folder: Path, count: int, seed: int) -> Path:
    """``count`` questions of each kind that the embedded generator has, and their pictures, written to ``folder``."""
    lines = []
    for kind, make in GENERATORS.items():
        for index in range(count):
            rng = Random(f"{kind}/{seed}/{index}")
            picture, name = make(rng, True), f"{kind}-{index:04}.png"
            picture.draw().save(folder / name, compress_level=1)
            record = Record((picture,), with_opening("<image>\n", picture.questions(rng)[:1]))
            lines.append(json.dumps({"kind": kind, **as_json(record, [name])}) + "\n")
    path = folder / "questions.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def sample(questions: Sequence[ProtocolQuestion], count: int, seed: int) -> list[ProtocolQuestion]:
    """``count`` of each kind at random, or all where there are fewer: kind after kind, each in the file's order."""
    kinds = {a.kind: [b for b in questions if b.kind == a.kind] for a in questions}
    drawn = {kind: sorted(Random(seed).sample(range(len(same)), min(count, len(same)))) for kind, same in kinds.items()}
    return [kinds[kind][index] for kind, indices in drawn.items() for index in indices]


def check_questions(questions: Sequence[ProtocolQuestion], processor: Processor) -> None:
    """UserError for a picture that cannot be read, or a question over the window, before any is asked."""
    for a in questions:
        try:
            processor([a.prompt("think")])
        except UserError as error:
            raise UserError(f"{a.where}: {error}") from None
