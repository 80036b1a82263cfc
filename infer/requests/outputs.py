"""What the engine returns: events while an answer is generated, and the whole of it at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from phi4rv.processing.answers import Answer, parse_answer
from phi4rv.processing.processor import Processor, Prompt


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability; ``top`` are (token id, log-probability) of the most probable ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Generation:
    """The answer to one prompt.

    finish_reason: ``stop`` (end of text, a stop string, or a grammar that is complete), ``length`` (a limit was
    reached), ``cancelled``, or ``error`` (its grammar became too complex; ``error`` says more). ``token_ids`` has no
    end-of-text token. ``thinking`` and ``text`` as in ``answers.Answer``, but a stop string and what follows it are
    cut. cached_tokens: tokens of the prompt found in the prefix cache. Seconds since the request was submitted: until
    its prefill began, until its first token, until its last.
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
class StreamEvent:
    """New tokens of one request, and the text of the thought and of the answer that they complete.

    Text is held back until its bytes are whole and until it cannot be the beginning of a stop string or of a tag. The
    last event of a request, and only that, has ``generation``.
    """

    request_id: int
    token_ids: tuple[int, ...] = ()
    thinking: str = ""
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    generation: Generation | None = None
