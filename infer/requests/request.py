"""What one request asks for, what each step tells of it, and what it came to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from phi4rv.errors import UserError
from phi4rv.processing.answers import Answer, parse_answer
from phi4rv.processing.processor import Processor, Prompt

MOST_LOGPROBS = 20
LARGEST_SEED = 2**63
LARGEST = 1e30  # of a temperature or a penalty; on the device they are float32


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 keep every token, repetition_penalty 1 changes nothing.

    A request's tokens depend on its seed, its prompt and the weights alone: not on what else is in the batch. The
    penalty divides positive logits of tokens that the prompt or the answer holds, and multiplies negative ones
    (Keskar et al. 2019). min_p keeps tokens at least that share as probable as the best (Nguyen et al. 2024).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, right in (
            ("temperature", 0 <= self.temperature <= LARGEST, f"0 to {LARGEST:g}"),
            ("top_k", 0 <= self.top_k < LARGEST_SEED, "0 (every token) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "repetition_penalty",
                1e-30 <= self.repetition_penalty <= LARGEST,
                f"1e-30 to {LARGEST:g}",
            ),
            ("seed", 0 <= self.seed < LARGEST_SEED, "in [0, 2^63)"),
        ):
            if not fits:
                raise UserError(f"--{name.replace('_', '-')}: {getattr(self, name)} must be {right}")


@dataclass(frozen=True)
class Options:
    """How one prompt is to be answered.

    stop: strings at which the final answer ends; they are not part of it. logprobs: None, or how many of the most
    probable tokens to tell beside the chosen one's log-probability, 0 to 20, of the model's own distribution (before
    temperature, penalty and masks). max_thinking_tokens: after so many tokens of thought ``</think>`` is forced.
    json_schema (a dict, or its JSON) and regex constrain the final answer, not the thought; at most one of them.
    """

    max_new_tokens: int = 4096
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    max_thinking_tokens: int | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: {self.max_new_tokens} must be 1 or more")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"--logprobs: {self.logprobs} must be 0 to {MOST_LOGPROBS}")
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < 0:
            raise UserError(f"--max-thinking-tokens: {self.max_thinking_tokens} must be 0 or more")
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
        return self.json_schema is not None or self.regex is not None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability; ``top`` are (token id, log-probability) of the most probable ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Generation:
    """What became of one prompt.

    finish_reason: ``stop`` (end of text, a stop string, or a constraint that is complete), ``length`` (a limit was
    reached), ``cancelled``, or ``error`` (its constraint became too complex; ``error`` says more). ``token_ids`` has no
    end-of-text token. ``thinking`` and ``text`` as in ``answers.Answer``, but a stop string and what follows it are
    cut. cached_tokens: of the prompt, what the prefix cache held. Seconds since the request was submitted: until its
    prefill began, until its first token, until its last.
    """

    prompt: Prompt
    prompt_tokens: int
    image_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    thinking: str | None = None
    text: str = ""
    finish_reason: str = "length"
    error: str | None = None
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0

    def answer(self, processor: Processor) -> Answer:
        return parse_answer(processor.decode(self.token_ids), self.prompt.mode)


@dataclass(frozen=True)
class Event:
    """What a step brought to one request: tokens, and the text that they complete, of the thought and of the answer.

    Text waits until its bytes are whole and until it cannot be the beginning of a stop string or of a tag. The last
    event of a request, and only that, has ``generation``.
    """

    request: int
    token_ids: tuple[int, ...] = ()
    thinking: str = ""
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    generation: Generation | None = None
