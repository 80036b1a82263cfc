"""The engine's outputs as the objects and chunks of OpenAI's chat completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from infer.requests.outputs import Generation, StreamEvent, TokenLogprob
from phi4rv.processing.answers import THINK_END
from phi4rv.processing.processor import Processor


class ChatCompletion:
    """One chat completion, of one or several choices."""

    def __init__(self, model: str, processor: Processor):
        self.id, self.created, self.model = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model
        self._processor = processor
        self._think_end = processor.tokenizer.token_to_id(THINK_END)

    def response(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The object of a completion that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": generation.text,
                    "reasoning_content": generation.thinking,
                    "refusal": None,
                },
                "logprobs": self._logprobs(generation.logprobs),
                "finish_reason": generation.finish_reason,
            }
            for index, generation in enumerate(generations)
        ]
        return {**self._envelope("chat.completion"), "choices": choices, "usage": self.usage(generations)}

    def first_chunk(self, choice: int) -> dict[str, Any]:
        """The first chunk of a choice."""
        return self._chunk(choice, {"role": "assistant", "content": ""})

    def chunks(self, batch: Iterable[tuple[int, StreamEvent]]) -> list[dict[str, Any]]:
        """A chunk for each choice that has new content, and its last one where it ends."""
        by_choice: dict[int, list[StreamEvent]] = {}
        for choice, event in batch:
            by_choice.setdefault(choice, []).append(event)
        chunks = []
        for choice, events in by_choice.items():
            texts = {
                "reasoning_content": "".join(event.thinking for event in events),
                "content": "".join(event.text for event in events),
            }
            delta = {name: text for name, text in texts.items() if text}
            logprobs = self._logprobs([one for event in events for one in event.logprobs])
            if delta or logprobs:
                chunks.append(self._chunk(choice, delta, logprobs))
            chunks += [self._chunk(choice, {}, None, e.generation.finish_reason) for e in events if e.generation]
        return chunks

    def usage_chunk(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The chunk with the usage of all choices."""
        return {**self._envelope("chat.completion.chunk"), "choices": [], "usage": self.usage(generations)}

    def usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """Token counts; the prompt, which all choices share, counts once. Reasoning tokens include ``</think>``."""
        first = generations[0]
        completion = sum(len(g.token_ids) for g in generations)
        return {
            "prompt_tokens": first.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": first.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": first.cached_tokens, "image_tokens": first.image_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(map(self._reasoning_tokens, generations))},
        }

    def _reasoning_tokens(self, generation: Generation) -> int:
        if generation.thinking is None:
            return 0
        ids = generation.token_ids
        return ids.index(self._think_end) + 1 if self._think_end in ids else len(ids)

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, choice: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        choices = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]
        return {**self._envelope("chat.completion.chunk"), "choices": choices}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """All tokens of the answer, the thought's too, in order; None where none were requested."""
        if not tokens:
            return None
        content = [
            {**self._token(t.token_id, t.logprob), "top_logprobs": [self._token(*pair) for pair in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._processor.decode([token])
        # A token may be part of a character; its bytes then cannot be had from its text.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        # JSON knows no minus infinity.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode()) if whole else None}
