"""Answers held to a JSON schema or a regular expression: which tokens may come next, by llguidance."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Set
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infer.requests.request import Options
from phi4rv.errors import UserError
from phi4rv.processing.processor import TOKENIZER, Processor

if TYPE_CHECKING:
    import llguidance

# Enough to indent by; a model that is unsure of itself would write white space without end.
WHITE_SPACE = r"[ \t\r\n]{0,40}"

# Below the library's own: what takes it longer than some ten milliseconds a token would hold up everyone's.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
}


class Constraint:
    """The state of one answer that ``options.json_schema`` or ``options.regex`` constrains (one of them is set).

    ``ends``: the end-of-text ids. UserError, naming the option, where llguidance is missing, for a schema or regex that
    is wrong or uses what llguidance cannot follow, and from any method where the grammar turns out to be too complex.
    """

    def __init__(self, processor: Processor, options: Options, ends: Set[int]):
        self._option = "--regex" if options.json_schema is None else "--json-schema"
        try:
            from llguidance import LLMatcher, LLParserLimits, regex_to_lark
        except ModuleNotFoundError:
            raise UserError(f"{self._option} needs llguidance: pip install llguidance") from None
        self._ends = sorted(ends)
        tokenizer, self._plain = _vocabulary(processor, tuple(self._ends))
        try:
            if options.json_schema is None:
                # ASCII digits, for who asks for \d wants a number.
                grammar = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(options.regex or '', 'd')}/")
            else:
                schema = _checked(options.json_schema)
                grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": WHITE_SPACE})
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._option}: {' '.join(str(error).split())}") from None
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        self._check()

    @property
    def finished(self) -> bool:
        """Nothing but the end can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """The tokens that may come next, (vocab_size,) bool on the CPU; never none.

        The ends are among them where the answer may end. Added tokens, such as ``<think>``, are not.
        """
        allowed = torch.zeros_like(self._plain)
        if not self.finished:
            allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0
            self._check()
            allowed &= self._plain
        allowed[self._ends] = self._matcher.is_accepting()
        return allowed

    def accept(self, token: int) -> None:
        """Goes on behind ``token``, one of the allowed."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Constraint:
        """Another that goes on from here by itself."""
        twin = copy.copy(self)
        twin._matcher = self._matcher.deep_copy()
        return twin

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"{self._option}: {_reason(self._matcher.get_error())}")


def _checked(schema: dict[str, Any] | str) -> str:
    schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, dict):
        raise UserError(f"--json-schema: {schema!r} must be an object, {{…}}")
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"--json-schema: not JSON ({error})") from None


def _reason(message: str) -> str:
    """What is wrong, without the place in a grammar that the user has not written."""
    lines = message.splitlines()
    named = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(named, re.sub(r"^at \d+\(\d+\): ", "", lines[0]))


@lru_cache(maxsize=2)
def _vocabulary(processor: Processor, ends: tuple[int, ...]) -> tuple[llguidance.LLTokenizer, Tensor]:
    """The tokens as llguidance wants them (this takes a second), and which are plain text, (vocab_size,) bool."""
    from llguidance import LLTokenizer

    size = processor.config.vocab_size
    tokenizer = LLTokenizer(processor.files[TOKENIZER].decode(), n_vocab=size, eos_token=list(ends))
    added = processor.tokenizer.get_added_tokens_decoder()
    named = processor.tokenizer.get_vocab(with_added_tokens=True).values()
    plain = torch.zeros(size, dtype=torch.bool)
    plain[[token for token in named if token not in added and token not in ends]] = True
    return tokenizer, plain
