"""An engine without a model, for tests of what is around it: quick, slow, endless, or broken, as the prompt says."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

from infer.engine.config import EngineStats
from infer.requests.outputs import Generation, StreamEvent
from infer.requests.sampling_params import SamplingParams
from phi4rv.errors import ContextLengthError
from phi4rv.processing.images import open_image
from phi4rv.processing.processor import Processor, Prompt


@dataclass
class FakeRequest:
    prompt: Prompt
    sampling_params: SamplingParams
    prompt_tokens: int
    image_tokens: int
    words: deque[str]
    generation: Generation


class FakeEngine:
    """Answers the last user's text: "echo …" by its words, one a step, after the thought "Hm." in mode think;
    "endless" never ends; "break" raises in the step. ``seconds``: what a step takes. ``seen``: the prompts."""

    def __init__(self, processor: Processor, max_running: int = 64, seconds: float = 0.0):
        self.processor, self.seconds = processor, seconds
        self.model_config = processor.config
        self.config = SimpleNamespace(max_running=max_running)
        self.stats = EngineStats()
        self.seen: list[tuple[Prompt, SamplingParams]] = []
        self.open: dict[int, FakeRequest] = {}
        self.cancelled: list[int] = []
        self.threads: set[int] = set()
        self._last_request_id = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.open)

    def prepare(self, prompt: Prompt, sampling_params: SamplingParams = SamplingParams()) -> FakeRequest:  # noqa: B008
        for image in prompt.images:
            open_image(image)
        text = prompt.messages()[-1].content
        rendered = self.processor.template.render(prompt.messages(), prompt.mode)
        tokens = len(self.processor.tokenizer.encode(rendered.text, add_special_tokens=False).ids)
        if tokens > self.model_config.context:
            raise ContextLengthError(
                f"the prompt has {tokens} tokens, the model's window holds {self.model_config.context}"
            )
        self.seen.append((prompt, sampling_params))
        thinking = "Hm." if prompt.mode == "think" else None
        words = deque(re.findall(r"\S+\s*", text.split("echo", 1)[-1])[: sampling_params.max_new_tokens])
        generation = Generation(prompt, tokens, len(prompt.images), thinking=thinking, finish_reason="stop")
        return FakeRequest(prompt, sampling_params, tokens, len(prompt.images), words, generation)

    def submit(self, request: FakeRequest, sampling_params: SamplingParams = SamplingParams()) -> int:  # noqa: B008
        self._last_request_id += 1
        self.open[self._last_request_id] = request
        return self._last_request_id

    def cancel(self, request_id: int) -> None:
        del self.open[request_id]
        self.cancelled.append(request_id)

    def step(self) -> list[StreamEvent]:
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return [self._next(*item) for item in list(self.open.items())[: self.config.max_running]]

    def _next(self, request_id: int, request: FakeRequest) -> StreamEvent:
        text = request.prompt.messages()[-1].content
        if "break" in text:
            raise RuntimeError("broken on purpose")
        generation = request.generation
        generation.token_ids.append(1)
        self.stats.generated_tokens += 1
        if "endless" in text:
            return StreamEvent(request_id, (1,), text="on and on " * (1 if "small" in text else 4000))
        if generation.thinking and len(generation.token_ids) == 1:
            return StreamEvent(request_id, (1,), thinking=generation.thinking)
        word = request.words.popleft() if request.words else ""
        generation.text += word
        if request.words:
            return StreamEvent(request_id, (1,), text=word)
        del self.open[request_id]
        self.stats.finished["stop"] += 1
        return StreamEvent(request_id, (1,), text=word, generation=generation)
