"""The next token: exact sets, draws that follow the probabilities, and rows that know nothing of each other."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from infer.engine.sampler import _gumbel_noise, apply_repetition_penalty, apply_token_mask, gather_logprobs, sample
from infer.requests.sampling_params import SamplingParams
from phi4rv.errors import UserError

LOGITS = [1.5, -0.5, 3.0, 2.0, 2.0, -4.0, 0.0, 2.9]


def expected(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """By the definitions, one token after the other, in float64."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(len(logits))])


def rows(logits: Tensor, params: SamplingParams, seed: Tensor, step: Tensor) -> tuple[Tensor, ...]:
    """The arguments of ``sample`` for rows that share their settings."""
    settings = (params.temperature, params.top_k, params.top_p, params.min_p)
    return (logits, *(torch.full((len(logits),), x) for x in settings), seed, step)


def drawn(logits: list[float], params: SamplingParams, count: int, by_seed: bool = False) -> np.ndarray:
    """How often each token comes in ``count`` steps of one seed, or first steps of as many seeds."""
    numbers, zeros = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    seed, step = (numbers + params.seed, zeros) if by_seed else (zeros + params.seed, numbers)
    tokens = sample(*rows(torch.tensor(logits).expand(count, -1), params, seed, step))
    return np.bincount(tokens.numpy(), minlength=len(logits))


def surprise(seen: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's chi-square in standard deviations (Wilson and Hilferty): over 3 comes by chance once in 740 times."""
    free = seen.size - 1
    chi_square = float(((seen - wanted) ** 2 / wanted).sum())
    return ((chi_square / free) ** (1 / 3) - 1 + 2 / (9 * free)) / math.sqrt(2 / (9 * free))


SETTINGS = [
    SamplingParams(1.0),
    SamplingParams(0.3),
    SamplingParams(5.0),
    SamplingParams(1.0, top_k=3),
    SamplingParams(1.0, top_k=4),  # cuts between equals
    SamplingParams(1.0, top_k=100),
    SamplingParams(1.0, top_p=0.5),
    SamplingParams(1.0, top_p=0.95),
    SamplingParams(1.0, min_p=0.3),
    SamplingParams(2.0, top_k=5, top_p=0.7, min_p=0.75),
    SamplingParams(0.8, top_k=1, top_p=0.95),
    SamplingParams(1.0, min_p=1.0),
]


@pytest.mark.parametrize("by_seed", [False, True])
@pytest.mark.parametrize("params", SETTINGS)
def test_draws_follow_the_probabilities(params: SamplingParams, by_seed: bool) -> None:
    count = 20000
    wanted = count * expected(LOGITS, params.temperature, params.top_k, params.top_p, params.min_p)
    seen = drawn(LOGITS, params, count, by_seed)
    assert seen[wanted == 0].sum() == 0, "a token that was cut off"
    common = wanted >= 5
    assert (seen > 0)[common].all()
    assert common.sum() == 1 or surprise(seen[common], wanted[common]) < 3


def test_a_long_row_keeps_the_right_set() -> None:
    """Every kept token of a flat row of 300 is seen in 6000 draws, and no other."""
    logits = (torch.randn(300, generator=torch.Generator().manual_seed(1)) * 0.1).tolist()
    for params in (
        SamplingParams(1.0, top_p=0.5),
        SamplingParams(1.0, top_k=200, top_p=0.9),
        SamplingParams(0.5, min_p=0.7),
    ):
        wanted = expected(logits, params.temperature, params.top_k, params.top_p, params.min_p) > 0
        assert 60 < wanted.sum() < 260
        assert ((drawn(logits, params, 6000) > 0) == wanted).all()


@pytest.mark.parametrize(
    ("seeds", "steps"),
    [
        (torch.arange(200), torch.arange(200)),
        (torch.arange(200) << 32, torch.arange(200)),
        (torch.arange(200) + 2**63 - 200, torch.arange(200) + 15000),
    ],
)
def test_neighbouring_seeds_steps_and_tokens_are_independent(seeds: Tensor, steps: Tensor) -> None:
    """Pairs of draws of 8 equals fall evenly into the 64 cells."""
    seed, step = (x.flatten() for x in torch.meshgrid(seeds, steps, indexing="ij"))
    tokens = sample(*rows(torch.zeros(len(seed), 8), SamplingParams(1.0), seed, step)).view(200, 200)
    for first, second in (
        (tokens[1:], tokens[:-1]),
        (tokens[:, 1:], tokens[:, :-1]),
        (tokens[1:, 1:], tokens[:-1, :-1]),
        (tokens[1:, :-1], tokens[:-1, 1:]),
        (tokens[100:], tokens[:100]),
        (tokens.triu(1), tokens.T.triu(1)),
    ):
        pairs = (first * 8 + second).flatten()
        seen = np.bincount(pairs.numpy(), minlength=64)
        if first.shape == (200, 200):
            seen[0] -= 200 * 201 // 2  # what triu cut
        assert surprise(seen, np.full(64, seen.sum() / 64)) < 3


def test_a_row_depends_on_itself_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    count = 40
    settings = [SETTINGS[i % len(SETTINGS)] if i % 5 else SamplingParams() for i in range(count)]
    columns = zip(*((s.temperature, s.top_k, s.top_p, s.min_p) for s in settings), strict=True)
    logits = torch.randn(count, 50, generator=generator)
    seed, step = torch.randint(2**63 - 1, (count,), generator=generator), torch.arange(count)
    arguments = (logits, *map(torch.tensor, columns), seed, step)
    tokens = sample(*arguments)
    order = torch.randperm(count, generator=generator)
    assert torch.equal(sample(*(x[order] for x in arguments)), tokens[order])
    assert torch.equal(torch.cat([sample(*(x[i : i + 1] for x in arguments)) for i in range(count)]), tokens)
    wide = torch.full((count, 90), -torch.inf)
    wide[:, :50] = logits
    assert torch.equal(sample(wide, *arguments[1:]), tokens), "padding of the vocabulary changes nothing"
    assert torch.equal(sample(logits.T.contiguous().T, *arguments[1:]), tokens)
    assert not torch.equal(sample(*arguments[:-1], step + 1), tokens)


def test_the_draws_stay_what_they_are() -> None:
    """The same tokens on every device and in every version: a seed that is written down can be used again."""
    tokens = sample(*rows(torch.zeros(12, 1000), SamplingParams(1.0), torch.arange(12) * 2**59, torch.arange(12)))
    assert tokens.tolist() == [725, 717, 3, 250, 533, 256, 819, 622, 215, 199, 333, 324]


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.tensor([LOGITS, [5.0] * 8, [-math.inf] * 7 + [-9.0], [1.0, 7.0] * 4])
    for params in (SamplingParams(), SamplingParams(top_k=3, top_p=0.2, min_p=0.5, seed=9)):
        zeros = torch.zeros(4, dtype=torch.int64)
        assert sample(*rows(logits, params, zeros + params.seed, zeros)).tolist() == [2, 0, 7, 1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert drawn(LOGITS, SamplingParams(temperature), 200)[2] == 200
    assert drawn([1e30, -1e30, 0.0], SamplingParams(temperature), 20)[0] == 20
    assert drawn([-3e38, 3e38], SamplingParams(temperature), 20)[1] == 20


def test_a_huge_temperature_is_even() -> None:
    seen = drawn([-1e4, 0.0, 1e4, -math.inf], SamplingParams(1e30), 3000)
    assert seen[3] == 0 and surprise(seen[:3], np.full(3, 1000.0)) < 3


def test_the_noise_has_a_long_tail() -> None:
    """Of float32's or of 32 bits' values many would come twice among 2 million, and the largest be too small."""
    count = 2_000_000
    zero = torch.zeros(1, dtype=torch.int64)
    noise = _gumbel_noise(zero, zero, torch.arange(count)[None])[0]
    assert len(noise.unique()) == count and noise.isfinite().all()
    for edge in (-2.0, 0.0, 5.0, 10.0):
        above = count * -math.expm1(-math.exp(-edge))
        assert abs(int((noise > edge).sum()) - above) < 4 * math.sqrt(min(above, count - above))


def test_top_p_never_cuts_everything() -> None:
    assert drawn([0.0, 0.0], SamplingParams(1.0, top_p=1e-12), 50)[0] == 50


def test_minus_infinity_is_never_drawn() -> None:
    logits = [-math.inf, 0.0, -math.inf, -50.0]
    assert drawn(logits, SamplingParams(1e5), 500)[[0, 2]].sum() == 0
    assert drawn(logits, SamplingParams(0.0), 5)[1] == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_give_some_token(temperature: float) -> None:
    nan, infinity = math.nan, math.inf
    logits = torch.tensor([[nan] * 4, [nan, 1.0, nan, nan], [-infinity] * 4, [0.0, infinity, 0.0, nan], [0.0] * 4])
    zeros = torch.zeros(5, dtype=torch.int64)
    tokens = sample(*rows(logits, SamplingParams(temperature, top_p=0.9), zeros, zeros)).tolist()
    assert all(0 <= token < 4 for token in tokens)
    assert tokens[1] == tokens[3] == 1


def test_repetition_penalty() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0, -math.inf]] * 2)
    seen = torch.tensor([[True, True, True, False, True], [True] * 5])
    out = apply_repetition_penalty(logits, seen, torch.tensor([2.0, 1.0]))
    assert out.tolist() == [[1.0, -4.0, 0.0, 3.0, -math.inf], logits[1].tolist()]


def test_token_mask() -> None:
    out = apply_token_mask(torch.tensor([[1.0, 2.0], [3.0, math.nan]]), torch.tensor([[True, False], [True, False]]))
    assert out.tolist() == [[1.0, -math.inf], [3.0, -math.inf]]


@pytest.mark.parametrize("top", [0, 1, 3])
def test_logprobs(top: int) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 20)).astype(np.float32)
    logits[1] += 1e4
    logits[2, 5:] = -np.inf
    wide = logits.astype(np.float64)
    wanted = wide - wide.max(1, keepdims=True)
    wanted -= np.log(np.exp(wanted).sum(1, keepdims=True))
    tokens = np.array([3, 0, 19, 7])
    chosen, ids, best = gather_logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), top)
    near = {"rtol": 1e-5, "atol": 2e-3}  # float32 has steps of 1e-3 at 1e4
    np.testing.assert_allclose(chosen, wanted[range(4), tokens], **near)
    order = np.argsort(-wanted, axis=1)[:, :top]
    assert ids.shape == (4, top) and (ids.numpy() == order).all()
    np.testing.assert_allclose(best, np.take_along_axis(wanted, order, 1), **near)


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        *(({"temperature": value}, "--temperature") for value in (-0.1, math.inf, math.nan)),
        ({"top_k": -1}, "--top-k"),
        *(({"top_p": value}, "--top-p") for value in (0, -0.5, 1.01, math.nan)),
        *(({"min_p": value}, "--min-p") for value in (-0.1, 1.01, math.nan)),
        *(({"repetition_penalty": value}, "--repetition-penalty") for value in (0, -1, math.inf, math.nan)),
        *(({"seed": value}, "--seed") for value in (-1, 2**63)),
    ],
)
def test_settings_out_of_range_name_their_option(settings: dict, option: str) -> None:
    with pytest.raises(UserError, match=f"^{option}: "):
        SamplingParams(**settings)
