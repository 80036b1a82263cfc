"""Where in an answer a grammar holds: not in the thought, nor on the token that opens it or the direct answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.requests.grammar import Grammar
from phi4rv.processing.answers import NOTHINK_SPELLINGS, THINK_END
from phi4rv.processing.chat_template import THINK
from phi4rv.processing.processor import Processor


@dataclass(frozen=True)
class ThinkingTokens:
    """Ids of ``<think>`` and ``</think>``, -1 where the tokenizer has none, and those that may open an answer."""

    start: int
    end: int
    openers: tuple[int, ...]

    @staticmethod
    def from_processor(processor: Processor) -> ThinkingTokens:
        ids = [processor.tokenizer.token_to_id(text) for text in (THINK, THINK_END, *NOTHINK_SPELLINGS)]
        start, end, *direct = (-1 if i is None else i for i in ids)
        return ThinkingTokens(start, end, tuple(i for i in (start, *direct) if i >= 0))

    def is_thinking(self, mode: str, output_token_ids: Sequence[int]) -> bool:
        """Whether the token that follows ``output_token_ids`` belongs to the thought."""
        started = mode == "think" or list(output_token_ids[:1]) == [self.start]
        return started and self.end not in output_token_ids


class StructuredOutput:
    """A request's grammar, advanced as its answer grows."""

    def __init__(self, grammar: Grammar, mode: str, thinking_tokens: ThinkingTokens):
        self.grammar, self.mode, self.thinking_tokens = grammar, mode, thinking_tokens

    def allowed_tokens(self, output_token_ids: Sequence[int]) -> Tensor:
        """(V,) bool: what may follow ``output_token_ids``."""
        allowed: Tensor = self.grammar.allowed_tokens()
        if self.thinking_tokens.is_thinking(self.mode, output_token_ids):
            return torch.ones_like(allowed)
        if self.mode == "auto" and not output_token_ids:
            return allowed.index_fill(0, torch.tensor(self.thinking_tokens.openers, dtype=torch.int64), True)
        return allowed

    def accept_token(self, output_token_ids: Sequence[int], token_id: int) -> bool:
        """Advances by ``token_id``, sampled after ``output_token_ids``. Returns whether the answer is complete."""
        opens = self.mode == "auto" and not output_token_ids and token_id in self.thinking_tokens.openers
        if opens or self.thinking_tokens.is_thinking(self.mode, output_token_ids):
            return False
        self.grammar.accept_token(token_id)
        return bool(self.grammar.is_terminated)
