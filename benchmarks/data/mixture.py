"""Samples in the proportions of the report's stage 2, by length alone: what packing and padding are measured on.

The report states that a fifth of the samples carry reasoning traces, that images hold 256 to 3600 patches and that
a sample has 3000 tokens on the mean (Table 3). The rest is assumed here, as log-normal (median, deviation of the
logarithm) or uniform:

================ ====== ================= ================ ==========================
kind             share  question, tokens  answer, tokens   patches
================ ====== ================= ================ ==========================
reasoning         0.20  150, 0.6          2000, 0.6        1600, 0.6; a fifth: none
computer use      0.35   90, 0.6           100, 0.8        2000 to 3600, uniform
other pictures    0.40   90, 0.8           200, 1.0        2000, 0.6
text              0.05  250, 1.0           400, 1.0        none
================ ====== ================= ================ ==========================
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

MIN_PATCHES, MAX_PATCHES = 256, 3600  # patches of an image
TEMPLATE_TOKENS = 20  # tokens of the chat's frame


class SampleLengths(NamedTuple):
    """length: tokens, images included; patches: of each image; labelled: tokens of the answer."""

    length: int
    patches: tuple[int, ...]
    labelled: int
    thinking: bool


def mixture(seed: int = 0, longest: int = 8192) -> Iterator[SampleLengths]:
    """Samples without end; those over ``longest`` are left out, as in a run."""
    rng = random.Random(seed)

    def spread(median: float, deviation: float) -> float:
        return rng.lognormvariate(math.log(median), deviation)

    while True:
        kind = rng.random()
        if kind < 0.20:
            question, answer = spread(150, 0.6), spread(2000, 0.6)
            patches = spread(1600, 0.6) if rng.random() < 0.8 else 0.0
        elif kind < 0.55:
            question, answer, patches = spread(90, 0.6), spread(100, 0.8), rng.uniform(2000, MAX_PATCHES)
        elif kind < 0.95:
            question, answer, patches = spread(90, 0.8), spread(200, 1.0), spread(2000, 0.6)
        else:
            question, answer, patches = spread(250, 1.0), spread(400, 1.0), 0.0
        images = (min(MAX_PATCHES, max(MIN_PATCHES, int(patches))),) if patches else ()
        labelled = int(answer) + 2
        sample = SampleLengths(TEMPLATE_TOKENS + int(question) + labelled + sum(images), images, labelled, kind < 0.20)
        if sample.length <= longest:
            yield sample
