"""Answers held to a schema or a regular expression, through the engine: thought free, answer bound."""

import json
import re
from typing import Any

import pytest

from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.grammar import Grammar
from infer.requests.outputs import Generation
from infer.requests.sampling_params import SamplingParams
from phi4rv.errors import UserError
from phi4rv.processing.processor import Prompt
from tests.small import small_model

SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["label", "count"],
    "additionalProperties": False,
}
WARM = {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model(context=320), config=EngineConfig(page_size=16, overlap=True))


def answers(engine: Engine, mode: str, count: int = 4, **params: Any) -> list[Generation]:
    made = engine.generate([Prompt(f"Number {n}?", mode=mode) for n in range(count)], SamplingParams(**params))
    engine.check()
    return made


@pytest.mark.parametrize("mode", ["auto", "think", "nothink"])
def test_json_that_fits_its_schema(engine: Engine, mode: str) -> None:
    """Random weights, so the schema alone makes it so; a thought in front is whatever the model says."""
    params = {"max_new_tokens": 120, "max_thinking_tokens": 10, **WARM}
    for made in answers(engine, mode, json_schema=SCHEMA, **params):
        assert made.finish_reason == "stop"
        assert (made.thinking is not None) == (mode == "think") or mode == "auto"
        value = json.loads(made.text)
        assert value["label"] in ("cat", "dog") and 0 <= value["count"] <= 99


def test_text_that_matches_a_regular_expression(engine: Engine) -> None:
    pattern = r"\[0\.\d{2}, 0\.\d{2}\]"
    for made in answers(engine, "nothink", max_new_tokens=60, regex=pattern, **WARM):
        assert re.fullmatch(pattern, made.text)
        assert made.finish_reason == "stop"


def test_constrained_and_free_requests_beside_each_other(engine: Engine) -> None:
    """The free one's tokens are those it has alone."""
    [alone] = engine.generate([Prompt("Free?")], SamplingParams(max_new_tokens=20))
    free = engine.submit(Prompt("Free?"), SamplingParams(max_new_tokens=20))
    bound = engine.submit(
        Prompt("Bound?", mode="nothink"), SamplingParams(max_new_tokens=60, regex="(yes|no), certainly")
    )
    over: dict[int, Generation] = {}
    while engine.has_unfinished_requests:
        over |= {event.request_id: event.generation for event in engine.step() if event.generation}
    assert over[free].token_ids == alone.token_ids
    assert over[bound].text in ("yes, certainly", "no, certainly")


def test_one_request_submitted_twice_has_two_grammars(engine: Engine) -> None:
    request = engine.prepare(
        Prompt("Which?", mode="nothink"), SamplingParams(max_new_tokens=60, regex="(cat|dog) no [0-9]{4}")
    )
    numbers = [engine.submit(request), engine.submit(request)]
    texts = {}
    while engine.has_unfinished_requests:
        texts |= {event.request_id: event.generation.text for event in engine.step() if event.generation}
    assert texts[numbers[0]] == texts[numbers[1]]
    assert re.fullmatch("(cat|dog) no [0-9]{4}", texts[numbers[0]])


def test_a_grammar_that_fails_ends_its_request_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Grammar) -> None:
        raise UserError("--regex: too complex")

    monkeypatch.setattr(Grammar, "allowed_tokens", fail)
    bound = engine.submit(Prompt("Bound?", mode="nothink"), SamplingParams(max_new_tokens=5, regex="a+"))
    free = engine.submit(Prompt("Free?"), SamplingParams(max_new_tokens=5))
    over: dict[int, Generation] = {}
    while engine.has_unfinished_requests:
        over |= {event.request_id: event.generation for event in engine.step() if event.generation}
    assert (over[bound].finish_reason, over[bound].error) == ("error", "--regex: too complex")
    assert over[free].error is None
    assert engine.stats.pages_used == 0


def test_a_regular_expression_that_is_none(engine: Engine) -> None:
    with pytest.raises(UserError, match="--regex: "):
        engine.prepare(Prompt("?"), SamplingParams(regex="("))
