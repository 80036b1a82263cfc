"""The contenders: this engine, and the same weights in transformers' classes and in vLLM.

All answer greedily and never end before their limit. The weights are random, in bfloat16 (float32 on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.inference.energy import energy_counter
from benchmarks.inference.roofline import part_formats
from benchmarks.inference.workload import Workload
from benchmarks.models import Transformers
from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.sampling_params import SamplingParams
from phi4rv.processing.processor import Prompt
from phi4rv.quantization.quantized_linear import quantize_in_chunks, quantize_layers

TOP_LOGPROBS = 20  # most probable first tokens that a peer tells


@dataclass
class TimedAnswer:
    """When each token of one answer came, in seconds since it was asked for, and joules used after the first."""

    times: list[float]
    ids: list[int]
    joules: float | None

    @property
    def between(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class TokenRecorder:
    """Takes down tokens as they come. ``expected``: how many there must be in the end."""

    def __init__(self) -> None:
        self.read = energy_counter()
        self.times: list[float] = []
        self.ids: list[int] = []
        self.begun, self.used = time.perf_counter(), 0.0

    def take(self, ids: Sequence[int]) -> None:
        if not self.times and self.read:
            self.used = self.read()
        self.times += [time.perf_counter() - self.begun] * len(ids)
        self.ids += ids

    def answered(self, expected: int) -> TimedAnswer:
        if len(self.ids) != expected:
            raise RuntimeError(f"an answer has {len(self.ids)} tokens and should have {expected}")
        return TimedAnswer(self.times, self.ids, self.read() - self.used if self.read else None)


class Phi4RVEngine:
    """The engine, with the kernels of one kind and weights in one format. Nothing is drafted, and nothing remembered of
    earlier requests.
    """

    def __init__(self, workload: Workload, kernels: str, form: str):
        self.workload = workload
        model = workload.model(kernels)
        quantize_layers(model, part_formats(form), lambda name, weight, f: quantize_in_chunks(weight, f))
        s, page = workload.shapes, EngineConfig().page_size
        engine_config = EngineConfig(
            max_running=s.many,
            cache_tokens=max(workload.config.context, s.many * (s.prompt + s.answer + page)),
            image_cache_bytes=0,
            prefix_cache=False,
            speculate=0,
        )
        self.engine = Engine((model, workload.processor), config=engine_config)

    def answer(self, prompt: Prompt, new: int) -> TimedAnswer:
        return timed_answer(self.engine, prompt, new)

    def top(self, prompt: Prompt) -> list[tuple[int, float]]:
        """The first token and its log-probability."""
        events = list(self.engine.stream(prompt, SamplingParams(max_new_tokens=1, logprobs=0)))
        return [(token.token_id, token.logprob) for event in events for token in event.logprobs]

    def encoder(self, prompt: Prompt) -> Callable[[], Any]:
        batch = self.workload.processor([prompt]).to(self.workload.device)
        return lambda: self.engine.model.encode_images(batch)


def timed_answer(engine: Engine, prompt: Prompt, new: int) -> TimedAnswer:
    """Of a prepared request: from its submission on."""
    request = engine.prepare(prompt, SamplingParams(max_new_tokens=new))
    clock = TokenRecorder()
    engine.submit(request)
    while engine.has_unfinished_requests:
        for event in engine.step():
            clock.take(event.token_ids)
    return clock.answered(new)


class TransformersEngine:
    """transformers' ``generate`` on our weights, with SDPA or ``how`` "flash-attn", or "static cache", for which it
    compiles on a GPU.
    """

    def __init__(self, workload: Workload, how: str = ""):
        self.workload, self.static = workload, how == "static cache"
        attention = "flash_attention_2" if how == "flash-attn" else "sdpa"
        self.model = Transformers(workload.config, workload.device, workload.dtype, workload.model("torch"), attention)

    def answer(self, prompt: Prompt, new: int) -> TimedAnswer:
        batch = self.workload.processor([prompt])
        clock = TokenRecorder()
        x = self.model.embeddings(batch.to(self.workload.device))[None]
        self.model.generate(x, new, (), clock.take, self.static)
        return clock.answered(new)

    def top(self, prompt: Prompt) -> list[tuple[int, float]]:
        batch = self.workload.processor([prompt]).to(self.workload.device)
        x = self.model.embeddings(batch)[None]
        logits = self.model.decoder(inputs_embeds=x, logits_to_keep=1, use_cache=False).logits[0, -1]
        found = logits.float().log_softmax(-1).topk(TOP_LOGPROBS)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def encoder(self, prompt: Prompt) -> Callable[[], Any]:
        batch = self.workload.processor([prompt]).to(self.workload.device)
        return lambda: self.model.encode_images(batch)
