"""Filling sequences: the fullest subset, nothing lost, and 99 % of the default data's rows."""

import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.data.mixture import mixture
from phi4rv.config import Config
from phi4rv.processing.chat_template import Message
from train import recipe
from train.data.packing import WINDOW, balance_rows, fullest_subset, imbalance, pack_sequences
from train.data.reader import SampleInfo
from train.data.stream import StepStream
from train.recipe import Stage
from train.synthetic import tokenizer_corpus
from train.synthetic.records import make_record
from train.synthetic.tiny_model import build_tiny_model


def identity(n: int) -> int:
    return n


def fill(lengths: list[int], capacity: int) -> list[list[int]]:
    """Groups of indices into ``lengths``."""
    return list(pack_sequences(range(len(lengths)), lengths.__getitem__, capacity))


def best_sum(lengths: list[int], room: int) -> int:
    subsets = itertools.product((0, 1), repeat=len(lengths))
    sums = (sum(n for n, taken in zip(lengths, chosen, strict=True) if taken) for chosen in subsets)
    return max(total for total in sums if total <= room)


@pytest.mark.parametrize("seed", range(60))
def test_fullest_is_the_best_of_all_subsets(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(0, 9))]
    room = rng.randint(0, 120)
    taken = fullest_subset(lengths, room)
    assert taken == sorted(set(taken)), "an index twice, or out of order"
    assert sum(lengths[i] for i in taken) == best_sum(lengths, room)


@pytest.mark.parametrize(
    ("lengths", "room", "taken"),
    [
        ([], 10, []),
        ([11, 12], 10, []),
        ([3, 3, 3], 0, []),
        ([10], 10, [0]),
        ([5, 5, 5], 10, [0, 1]),  # the early ones among equals
        ([9, 4, 6, 1], 10, [1, 2]),  # likewise: 9 and 1 came later to the same sum
        ([7, 10**6, 3], 10, [0, 2]),
    ],
)
def test_fullest_at_its_edges(lengths: list[int], room: int, taken: list[int]) -> None:
    assert fullest_subset(lengths, room) == taken


@pytest.mark.parametrize(("count", "capacity"), [(0, 50), (1, 50), (127, 50), (128, 64), (700, 50), (700, 2048)])
def test_every_sample_once_and_no_row_too_long(count: int, capacity: int) -> None:
    rng = random.Random(count)
    lengths = [rng.randint(1, 50) for _ in range(count)]
    groups = fill(lengths, capacity)
    assert sorted(itertools.chain(*groups)) == list(range(count))
    assert all(0 < sum(lengths[i] for i in group) <= capacity for group in groups)
    assert groups == fill(lengths, capacity), "not deterministic"


def test_order_is_nearly_kept() -> None:
    """The oldest that waits is always in the next row, and nothing overtakes more than a window."""
    rng = random.Random(3)
    lengths = [rng.randint(1, 400) for _ in range(1000)]
    waiting = set(range(1000))
    for group in fill(lengths, 1000):
        assert min(waiting) in group
        assert max(group) - min(waiting) < 2 * WINDOW
        assert group == sorted(group)
        waiting -= set(group)


def test_no_more_than_a_window_is_read_ahead() -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        for read in itertools.count(1):
            yield 1 + read * 7 % 90

    given = 0
    for group in itertools.islice(pack_sequences(endless(), identity, 100), 200):
        given += len(group)
        assert read - given < WINDOW


@pytest.mark.parametrize("place", [0, 5, 400])
def test_a_sample_over_the_capacity_is_an_error(place: int) -> None:
    lengths = [10] * 500
    lengths[place] = 101
    with pytest.raises(ValueError, match="101 tokens does not fit a sequence of 100"):
        fill(lengths, 100)


@pytest.fixture(scope="module")
def processor():
    return build_tiny_model(0, tokenizer_corpus())[1]


@pytest.mark.parametrize("number", [2, 3])
def test_rows_of_the_default_data_are_99_percent_full(processor, number: int) -> None:
    """Over all rows that do not meet the data's end: a run repeats the data, so it meets that end nowhere."""
    stage = recipe.stage(number, True, {})
    lengths = []
    for index in range(800):
        record = make_record(number, "train", 0, index)
        grids = [processor.grid(*picture.draw().size) for picture in record.images]
        turns = [Message(r, t) for turn in record.turns for r, t in zip(("user", "assistant"), turn, strict=True)]
        lengths.append(len(processor.tokens(turns, grids, labelled=True)))
    groups = fill(lengths, stage.sequence_length)
    inner = [group for group in groups if max(group) < len(lengths) - WINDOW]
    filling = sum(lengths[i] for group in inner for i in group) / (len(inner) * stage.sequence_length)
    assert len(inner) > 20
    assert filling >= 0.99


# The report's mixture


class Measured(StepStream):
    """Steps of the published model's sizes from samples that are lengths alone."""

    def __init__(self, chosen: Stage) -> None:
        self.dataset = SimpleNamespace(
            stage=chosen, processor=SimpleNamespace(config=Config()), skip_counts={}, lines=[]
        )
        self.step, self.cursors, self.drawn, self.buffer = 0, [], [], []

    def samples(self) -> Iterator[Any]:
        for sample in mixture(0, self.dataset.stage.sequence_length):
            grids = tuple((1, n) for n in sample.patches)
            yield SampleInfo(None, 0, 2, sample.length, grids, sample.labelled, sample.thinking)


@pytest.fixture(scope="module")
def reports_steps() -> list[Any]:
    return list(itertools.islice(Measured(recipe.stage(2, False, {})).steps(), 3))


def test_the_mixture_is_what_it_says() -> None:
    samples = list(itertools.islice(mixture(), 20_000))
    mean = sum(s.length for s in samples) / len(samples)
    assert mean == pytest.approx(188.5e9 / 62.8e6, rel=0.03)
    assert sum(s.thinking for s in samples) / len(samples) == pytest.approx(0.2, abs=0.01)
    assert all(256 <= n <= 3600 for s in samples for n in s.patches)


def test_steps_of_the_reports_mixture_are_full(reports_steps: list[Any]) -> None:
    for step in reports_steps:
        samples = sum(map(len, step))
        assert 1920 <= samples < 1920 * 1.12
        assert len(step) % 64 == 0
        assert sum(len(p) for sequence in step for p in sequence) >= 0.99 * 8192 * len(step)


@pytest.mark.parametrize("world", [2, 8, 64])
def test_ranks_have_the_same_cost_within_3_percent(reports_steps: list[Any], world: int) -> None:
    for step in reports_steps:
        shares = balance_rows(step.row_flops, world)
        assert sorted(row for rows in shares for row in rows) == list(range(len(step)))
        assert {len(rows) for rows in shares} == {len(step) // world}
        assert imbalance(step.row_flops, shares) <= 0.03
        # Ranks that exchange weights layer by layer wait for each other in every row.
        together = sum(max(step.row_flops[rows[place]] for rows in shares) for place in range(len(step) // world))
        assert together * world / sum(step.row_flops) - 1 <= 0.03


def test_240_ranks_as_the_report_had() -> None:
    [step] = itertools.islice(Measured(recipe.stage(2, False, {"sequence_multiple": 240})).steps(), 1)
    assert len(step) % 240 == 0
    assert imbalance(step.row_flops, balance_rows(step.row_flops, 240)) <= 0.03


@pytest.mark.parametrize(("rows", "world"), [(0, 3), (2, 3), (3, 3), (7, 3), (64, 64), (65, 64)])
def test_every_row_has_one_rank(rows: int, world: int) -> None:
    costs = [float(random.Random(i).randint(90, 110)) for i in range(rows)]
    shares = balance_rows(costs, world)
    assert len(shares) == world
    assert sorted(row for mine in shares for row in mine) == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert balance_rows(costs, 1) == [list(range(rows))], "one rank keeps the order"


def test_unequal_costs_are_shared_better_than_in_turn() -> None:
    costs = [float(10 + 9 * (i % 4)) for i in range(32)]
    assert imbalance(costs, balance_rows(costs, 4)) == 0
    assert imbalance(costs, [list(range(rank, 32, 4)) for rank in range(4)]) > 0.5


@pytest.mark.parametrize(("batch", "multiple"), [(4, 1), (16, 1), (31, 1), (32, 2), (1024, 64), (1920, 64)])
def test_the_multiple_follows_from_the_batch_alone(batch: int, multiple: int) -> None:
    assert recipe.stage(2, False, {"global_batch": batch}).multiple() == multiple
    assert recipe.stage(2, False, {"global_batch": batch, "sequence_multiple": 7}).multiple() == 7
