"""At the end of a run: the loss curve, and the scores on held-out questions."""

from __future__ import annotations

import random
from pathlib import Path

from infer.heldout import Question, Scores, answers, score, shuffle_images
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.processor import Processor
from train.figures.curves import Run, draw_curves
from train.figures.metrics import METRICS, MetricsLogger, read_metrics
from train.figures.prediction_sheet import prediction_sheet


def write_final_report(
    model: Phi4RV, processor: Processor, output: Path, questions: list[Question], logger: MetricsLogger
) -> None:
    """Loss curve and, with held-out data, scores."""
    steps = [entry for entry in read_metrics(output / METRICS) if "loss" in entry]
    if steps:  # none if metrics.jsonl was moved away
        draw_curves(output / "loss.png", [Run(str(output), steps)], ["loss"])
    if questions:
        scores = evaluate(model, processor, questions, output)
        logger.write(scores)
        print(score_table(scores))
    print(f"written: {', '.join(str(p) for p in sorted(output.iterdir()) if not p.name.startswith('.'))}")


def evaluate(model: Phi4RV, processor: Processor, questions: list[Question], output: Path) -> dict[str, Scores]:
    """Scores on the held-out questions with their own images and with others'; writes the sheet of predictions."""
    given = answers(model, processor, questions)
    # A random sample, so that the sheet shows charts and screens.
    order = random.Random(0).sample(range(len(questions)), len(questions))
    prediction_sheet(output / "predictions.png", [questions[i] for i in order], [given[i] for i in order])
    mixed = shuffle_images(questions)
    return {"heldout": score(questions, given), "shuffled": score(mixed, answers(model, processor, mixed))}


def score_table(scores: dict[str, Scores]) -> str:
    rows = [f"{'':22}{'own picture':>14}{'shuffled':>12}"]
    own, other = scores["heldout"], scores["shuffled"]
    for name in ("point_in_box", "iou", "exact_match"):
        count = own["texts" if name == "exact_match" else "boxes"]
        if count:
            rows.append(f"{name:14}({count:4d}){'':2}{own[name]:>14.3f}{other[name]:>12.3f}")
    return "\n".join(rows)
