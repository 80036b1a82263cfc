"""Where in an answer a constraint holds: not in the thought, nor on the token that opens it or the direct answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.requests.grammar import Constraint
from phi4rv.processing.answers import NOTHINK_SPELLINGS, THINK_END
from phi4rv.processing.chat_template import THINK
from phi4rv.processing.processor import Processor


@dataclass(frozen=True)
class ThinkTokens:
    """Ids of ``<think>`` and ``</think>``, -1 where the tokenizer has none, and those that may open an answer."""

    start: int
    end: int
    openers: tuple[int, ...]

    @staticmethod
    def of(processor: Processor) -> ThinkTokens:
        ids = [processor.tokenizer.token_to_id(text) for text in (THINK, THINK_END, *NOTHINK_SPELLINGS)]
        start, end, *direct = (-1 if i is None else i for i in ids)
        return ThinkTokens(start, end, tuple(i for i in (start, *direct) if i >= 0))

    def inside(self, mode: str, answer: Sequence[int]) -> bool:
        """Whether what follows ``answer``, the tokens so far, is thought."""
        began = mode == "think" or list(answer[:1]) == [self.start]
        return began and self.end not in answer


class Guide:
    """A request's constraint, as its answer grows."""

    def __init__(self, constraint: Constraint, mode: str, think: ThinkTokens):
        self.constraint, self.mode, self.think = constraint, mode, think

    def allowed(self, answer: Sequence[int]) -> Tensor:
        """(V,) bool: what may follow ``answer``."""
        allowed: Tensor = self.constraint.allowed()
        if self.think.inside(self.mode, answer):
            return torch.ones_like(allowed)
        if self.mode == "auto" and not answer:
            return allowed.index_fill(0, torch.tensor(self.think.openers, dtype=torch.int64), True)
        return allowed

    def accept(self, answer: Sequence[int], token: int) -> bool:
        """Takes ``token``, chosen behind ``answer``. Whether nothing may follow it."""
        opens = self.mode == "auto" and not answer and token in self.think.openers
        if opens or self.think.inside(self.mode, answer):
            return False
        self.constraint.accept(token)
        return bool(self.constraint.finished)
