"""The drawn charts and scenes: what is asked of them agrees with what is on them."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import numpy as np

from train.synthetic.charts import Bar, Chart, random_scene
from train.synthetic.drawing import COLOURS, GLYPHS, Style


def test_chart_answers_and_pixels_agree() -> None:
    """A bar's colour, read off the pixels, is as high as its value on the scale of 10."""
    bars = tuple(Bar(*bar) for bar in (("red", "A", 7), ("blue", "B", 2), ("green", "C", 10)))
    chart = Chart(Style((160, 128), dark=False, shade=240), "Sales", bars)
    pixels = np.asarray(chart.draw()).astype(int)
    heights = [np.any((pixels == COLOURS[bar.colour]).all(axis=2), axis=1).sum() for bar in bars]
    assert np.abs(np.array(heights) / heights[2] - [0.7, 0.2, 1.0]).max() < 0.02
    answers = dict(turn for seed in range(60) for turn in chart.questions(Random(seed)))
    final = {question: answer.split("</think>")[1] for question, answer in answers.items()}
    assert final["Which bar is the tallest?"] == final["Which bar is the highest?"] == "green"
    assert final["Which bar is the shortest?"] == "blue"
    assert final["What is the value of B?"] == final["How high is the blue bar?"] == "2"
    assert final["Which is larger, red or blue?"] == "red"
    assert final["How many bars are above 5?"] == "2" and final["How many bars are above 7?"] == "1"


def test_scene_counts_agree_with_the_shapes() -> None:
    seen: Counter[str] = Counter()
    for seed in range(600):
        scene = random_scene(Random(seed), False)
        for question, answer in scene.questions(Random(seed)):
            final = answer.split("</think>")[1]
            if match := re.fullmatch(r"How many (.+) are there\?", question):
                words = match[1].split()
                colour = words[0] if words[0] in COLOURS else ""
                noun = next((name for name in GLYPHS if words[-1] in (f"{name}s", f"{name}es")), "")
                right = [s for s in scene.shapes if colour in ("", s.colour) and noun in ("", s.glyph)]
                assert final == str(len(right)), question
                seen[final] += 1
            elif match := re.fullmatch(r"Which is larger, the (.+) or the (.+)\?", question):
                (one,), (two,) = ([s for s in scene.shapes if s.name == name] for name in match.groups())
                assert final == f"the {max(one, two, key=lambda s: s.side).name}"
                seen["larger"] += 1
            else:
                names = re.fullmatch(r"Are there more (.+) or (.+)\?", question).groups()
                numbers = [sum(n in (f"{s.name}s", f"{s.name}es") for s in scene.shapes) for n in names]
                assert numbers[0] != numbers[1] and final == names[numbers[1] > numbers[0]]
                seen["more"] += 1
    assert min(seen[key] for key in ("0", "1", "2", "3", "4", "larger", "more")) > 10, seen
