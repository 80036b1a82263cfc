"""The next token: exact probabilities, and draws that follow them."""

import math
from collections import Counter

import pytest
import torch

from infer.sampling import Sampling, next_token
from phi4rv.errors import UserError

LOGITS = [1.5, -0.5, 3.0, 2.0, 2.0, -4.0, 0.0, 2.9]


def expected(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """By the definitions, in float64: temperature, the k largest, then the smallest set that reaches p."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def drawn(logits: list[float], sampling: Sampling, count: int) -> Counter[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return Counter(next_token(torch.tensor(logits), sampling, generator) for _ in range(count))


SETTINGS = [
    (1.0, 0, 1.0),
    (0.3, 0, 1.0),
    (5.0, 0, 1.0),
    (1.0, 3, 1.0),
    (1.0, 100, 1.0),
    (1.0, 0, 0.5),
    (1.0, 0, 0.95),
    (2.0, 5, 0.7),
    (0.8, 1, 0.95),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_probabilities_are_exact(monkeypatch: pytest.MonkeyPatch, temperature: float, top_k: int, top_p: float) -> None:
    """What is handed to the draw, which here takes a place for a generator and picks it."""
    found = [0.0] * len(LOGITS)
    shares: list[float] = []

    def pick(probabilities: torch.Tensor, count: int, generator: int) -> torch.Tensor:
        shares[:] = (probabilities / probabilities.sum()).tolist()
        return torch.tensor([generator])

    monkeypatch.setattr(torch, "multinomial", pick)
    for place in range(top_k if 0 < top_k < len(LOGITS) else len(LOGITS)):
        token = next_token(torch.tensor(LOGITS), Sampling(temperature, top_k, top_p), place)  # type: ignore[arg-type]
        found[token] = shares[place]
    assert found == pytest.approx(expected(LOGITS, temperature, top_k, top_p), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_the_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    """Pearson's chi-square under its 99.9 % point; the seed is fixed, so this passes always or never."""
    count = 6000
    wanted = expected(LOGITS, temperature, top_k, top_p)
    seen = drawn(LOGITS, Sampling(temperature, top_k, top_p, seed=5), count)
    assert all(wanted[token] > 0 for token in seen), "a token that was cut off"
    common = [i for i, p in enumerate(wanted) if p * count >= 5]
    chi_square = sum((seen[i] - count * wanted[i]) ** 2 / (count * wanted[i]) for i in common)
    critical = [10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32]  # 1 to 7 degrees of freedom
    assert len(common) == 1 or chi_square < critical[len(common) - 2]
    assert len(common) > 1 or seen == {common[0]: count}


def test_greedy_takes_the_largest_and_needs_no_generator() -> None:
    assert next_token(torch.tensor(LOGITS), Sampling(), None) == 2
    assert next_token(torch.tensor([-math.inf, -5.0]), Sampling(), None) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert drawn(LOGITS, Sampling(temperature), 200) == {2: 200}
    assert drawn([1e30, -1e30, 0.0], Sampling(temperature), 20) == {0: 20}


def test_top_k_takes_the_first_of_equals() -> None:
    assert set(drawn([1.0, 2.0, 2.0, 2.0], Sampling(1.0, top_k=2), 300)) == {1, 2}


def test_top_p_one_keeps_the_longest_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token's probability rounds to 1, and yet the others are not impossible."""
    kept = 0

    def count(probabilities: torch.Tensor, number: int, generator: object = None) -> torch.Tensor:
        nonlocal kept
        kept = int((probabilities > 0).sum())
        return torch.tensor([0])

    monkeypatch.setattr(torch, "multinomial", count)
    next_token(torch.cat([torch.zeros(1), torch.full((1000,), -60.0)]), Sampling(1.0), None)
    assert kept == 1001


def test_top_p_never_cuts_everything() -> None:
    assert drawn([0.0, 0.0], Sampling(1.0, top_p=1e-12), 50) == {0: 50}


def test_a_seed_repeats_itself() -> None:
    def tokens(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [next_token(torch.tensor(LOGITS), Sampling(3.0), generator) for _ in range(30)]

    assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        *(({"temperature": value}, "--temperature") for value in (-0.1, math.inf, math.nan)),
        ({"top_k": -1}, "--top-k"),
        *(({"top_p": value}, "--top-p") for value in (0, -0.5, 1.01, math.nan)),
        *(({"seed": value}, "--seed") for value in (-1, 2**63)),
    ],
)
def test_settings_out_of_range_name_their_option(settings: dict, option: str) -> None:
    with pytest.raises(UserError, match=f"^{option}: "):
        Sampling(**settings)
