"""Constrained decoding: which tokens may come next under a JSON schema or a regular expression, by llguidance."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Set
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infer.requests.sampling_params import SamplingParams
from phi4rv.errors import UserError
from phi4rv.processing.processor import TOKENIZER, Processor

if TYPE_CHECKING:
    import llguidance

# Enough for indentation; without a limit an unsure model may write white space without end.
WHITESPACE_PATTERN = r"[ \t\r\n]{0,40}"

# Below the library's own: a grammar that takes more than some ten milliseconds a token would delay every request.
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,
}


class Grammar:
    """The grammar of one answer, from ``params.json_schema`` or ``params.regex`` (one of them is set), and its state.

    UserError, naming the option, where llguidance is missing, for a schema or regex that is wrong or uses what
    llguidance does not support, and from any method where the grammar turns out to be too complex.
    """

    def __init__(self, processor: Processor, params: SamplingParams, stop_token_ids: Set[int]):
        self._option = "--regex" if params.json_schema is None else "--json-schema"
        try:
            from llguidance import LLMatcher, LLParserLimits, regex_to_lark
        except ModuleNotFoundError:
            raise UserError(f"{self._option} needs llguidance: pip install llguidance") from None
        self._stop_token_ids = sorted(stop_token_ids)
        tokenizer, self._text_tokens = _vocabulary(processor, tuple(self._stop_token_ids))
        try:
            if params.json_schema is None:
                # \d as ASCII digits: whoever writes it wants a number.
                grammar = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(params.regex or '', 'd')}/")
            else:
                schema = _validated(params.json_schema)
                grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": WHITESPACE_PATTERN})
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._option}: {' '.join(str(error).split())}") from None
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**PARSER_LIMITS))
        self._raise_on_error()

    @property
    def is_terminated(self) -> bool:
        """Whether nothing but the end of text can follow."""
        return self._matcher.is_stopped()

    def allowed_tokens(self) -> Tensor:
        """The tokens that may come next, (vocab_size,) bool on the CPU; at least one.

        The stop tokens are among them where the answer may end. Added tokens, such as ``<think>``, are not.
        """
        allowed = torch.zeros_like(self._text_tokens)
        if not self.is_terminated:
            allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0
            self._raise_on_error()
            allowed &= self._text_tokens
        allowed[self._stop_token_ids] = self._matcher.is_accepting()
        return allowed

    def accept_token(self, token_id: int) -> None:
        """Advances by ``token_id``, one of the allowed."""
        self._matcher.consume_token(token_id)
        self._raise_on_error()

    def copy(self) -> Grammar:
        """An independent copy in the same state."""
        twin = copy.copy(self)
        twin._matcher = self._matcher.deep_copy()
        return twin

    def _raise_on_error(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"{self._option}: {_error_message(self._matcher.get_error())}")


def _validated(schema: dict[str, Any] | str) -> str:
    schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, dict):
        raise UserError(f"--json-schema: {schema!r} must be an object, {{…}}")
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"--json-schema: not JSON ({error})") from None


def _error_message(message: str) -> str:
    """llguidance's message, without its position in a grammar that the user did not write."""
    lines = message.splitlines()
    named = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(named, re.sub(r"^at \d+\(\d+\): ", "", lines[0]))


@lru_cache(maxsize=2)
def _vocabulary(processor: Processor, stop_token_ids: tuple[int, ...]) -> tuple[llguidance.LLTokenizer, Tensor]:
    """llguidance's tokenizer (building it takes a second), and which tokens are plain text, (vocab_size,) bool."""
    from llguidance import LLTokenizer

    size = processor.config.vocab_size
    tokenizer = LLTokenizer(processor.files[TOKENIZER].decode(), n_vocab=size, eos_token=list(stop_token_ids))
    added = processor.tokenizer.get_added_tokens_decoder()
    named = processor.tokenizer.get_vocab(with_added_tokens=True).values()
    text_tokens = torch.zeros(size, dtype=torch.bool)
    text_tokens[[token for token in named if token not in added and token not in stop_token_ids]] = True
    return tokenizer, text_tokens
