"""How a prompt is to be answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from phi4rv.errors import UserError

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_VALUE = 1e30  # of a temperature or a penalty; on the device they are float32


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is to be answered.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 keep every token, repetition_penalty 1 changes nothing. The
    penalty divides positive logits of tokens that the prompt or the answer holds, and multiplies negative ones
    (Keskar et al. 2019). min_p keeps tokens at least that share as probable as the best (Nguyen et al. 2024). A
    request's tokens depend on its seed, its prompt and the weights alone: not on what else is in the batch.

    stop: strings at which the final answer ends; they are not part of it. logprobs: None, or how many of the most
    probable tokens to report beside the sampled one, 0 to 20, from the model's own distribution (before temperature,
    penalty and token mask). max_thinking_tokens: after so many tokens of thought ``</think>`` is forced. json_schema (a
    dict, or its JSON) and regex constrain the final answer, not the thought; at most one of them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 4096
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    max_thinking_tokens: int | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        for name, fits, right in (
            ("temperature", 0 <= self.temperature <= MAX_VALUE, f"0 to {MAX_VALUE:g}"),
            ("top_k", 0 <= self.top_k <= MAX_SEED, "0 (every token) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 1e-30 <= self.repetition_penalty <= MAX_VALUE, f"1e-30 to {MAX_VALUE:g}"),
            ("seed", 0 <= self.seed <= MAX_SEED, "in [0, 2^63)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            ("max_thinking_tokens", self.max_thinking_tokens is None or self.max_thinking_tokens >= 0, "0 or more"),
        ):
            if not fits:
                raise UserError(f"--{name.replace('_', '-')}: {getattr(self, name)} must be {right}")
        if not all(self.stop):
            raise UserError("--stop: an empty string would end every answer at once")
        if self.json_schema is not None and self.regex is not None:
            raise UserError("--regex: give it or --json-schema, not both")
        if isinstance(self.json_schema, str):
            try:
                json.loads(self.json_schema)
            except ValueError as error:
                raise UserError(f"--json-schema: not JSON ({error})") from None

    @property
    def constrained(self) -> bool:
        """Whether a grammar restricts the answer."""
        return self.json_schema is not None or self.regex is not None
