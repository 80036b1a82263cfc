"""What answers: this engine, and the same weights in transformers' classes and in vLLM.

All answer greedily and never end before their limit. The weights are random, in bfloat16 (float32 on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.inference.energy import joules
from benchmarks.inference.place import Place
from benchmarks.inference.rows import spec
from benchmarks.models import Transformers
from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.sampling_params import SamplingParams
from phi4rv.processing.processor import Prompt
from phi4rv.quantization.quantized_linear import quantize_layers, quantize_rows

TOP = 20  # most probable first tokens that a peer tells


@dataclass
class Answered:
    """When each token of one answer came, in seconds since it was asked for, and joules used after the first."""

    times: list[float]
    ids: list[int]
    joules: float | None

    @property
    def between(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Clock:
    """Takes down tokens as they come. ``expected``: how many there must be in the end."""

    def __init__(self) -> None:
        self.read = joules()
        self.times: list[float] = []
        self.ids: list[int] = []
        self.begun, self.used = time.perf_counter(), 0.0

    def take(self, ids: Sequence[int]) -> None:
        if not self.times and self.read:
            self.used = self.read()
        self.times += [time.perf_counter() - self.begun] * len(ids)
        self.ids += ids

    def answered(self, expected: int) -> Answered:
        if len(self.ids) != expected:
            raise RuntimeError(f"an answer has {len(self.ids)} tokens and should have {expected}")
        return Answered(self.times, self.ids, self.read() - self.used if self.read else None)


class Ours:
    """The engine, with the kernels of one kind and weights in one format. Nothing is drafted, and nothing remembered of
    earlier requests.
    """

    def __init__(self, place: Place, kernels: str, form: str):
        self.place = place
        model = place.model(kernels)
        quantize_layers(model, spec(form), lambda name, weight, f: quantize_rows(weight, f))
        s, page = place.shapes, EngineConfig().page_size
        config = EngineConfig(
            max_running=s.many,
            cache_tokens=max(place.config.context, s.many * (s.prompt + s.answer + page)),
            image_cache_bytes=0,
            prefix_cache=False,
            speculate=0,
        )
        self.engine = Engine((model, place.processor), config=config)

    def answer(self, prompt: Prompt, new: int) -> Answered:
        return answer(self.engine, prompt, new)

    def top(self, prompt: Prompt) -> list[tuple[int, float]]:
        """The first token and its log-probability."""
        events = list(self.engine.stream(prompt, SamplingParams(max_new_tokens=1, logprobs=0)))
        return [(token.token_id, token.logprob) for event in events for token in event.logprobs]

    def encoder(self, prompt: Prompt) -> Callable[[], Any]:
        batch = self.place.processor([prompt]).to(self.place.device)
        return lambda: self.engine.model.encode_images(batch)


def answer(engine: Engine, prompt: Prompt, new: int) -> Answered:
    """Of a prepared request: from its submission on."""
    request = engine.prepare(prompt, SamplingParams(max_new_tokens=new))
    clock = Clock()
    engine.submit(request)
    while engine.has_unfinished_requests:
        for event in engine.step():
            clock.take(event.token_ids)
    return clock.answered(new)


class Theirs:
    """transformers' ``generate`` on our weights, with SDPA or ``how`` "flash-attn", or "static cache", for which it
    compiles on a GPU.
    """

    def __init__(self, place: Place, how: str = ""):
        self.place, self.static = place, how == "static cache"
        attention = "flash_attention_2" if how == "flash-attn" else "sdpa"
        self.model = Transformers(place.config, place.device, place.dtype, place.model("torch"), attention)

    def answer(self, prompt: Prompt, new: int) -> Answered:
        batch = self.place.processor([prompt])
        clock = Clock()
        x = self.model.embeddings(batch.to(self.place.device))[None]
        self.model.generate(x, new, (), clock.take, self.static)
        return clock.answered(new)

    def top(self, prompt: Prompt) -> list[tuple[int, float]]:
        batch = self.place.processor([prompt]).to(self.place.device)
        x = self.model.embeddings(batch)[None]
        logits = self.model.decoder(inputs_embeds=x, logits_to_keep=1, use_cache=False).logits[0, -1]
        found = logits.float().log_softmax(-1).topk(TOP)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def encoder(self, prompt: Prompt) -> Callable[[], Any]:
        batch = self.place.processor([prompt]).to(self.place.device)
        return lambda: self.model.encode_images(batch)
