"""An engine without a model, for tests of what is around it: quick, slow, endless, or broken, as the prompt says."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

from infer.engine.config import Counters
from infer.requests.request import Event, Generation, Options
from phi4rv.errors import ContextLengthError
from phi4rv.processing.images import open_image
from phi4rv.processing.processor import Processor, Prompt


@dataclass
class FakeRequest:
    prompt: Prompt
    options: Options
    prompt_tokens: int
    image_tokens: int
    words: deque[str]
    told: Generation


class FakeEngine:
    """Answers the last user's text: "echo …" by its words, one a step, after the thought "Hm." in mode think;
    "endless" never ends; "break" raises in the step. ``seconds``: what a step takes. ``seen``: the prompts."""

    def __init__(self, processor: Processor, max_running: int = 64, seconds: float = 0.0):
        self.processor, self.seconds = processor, seconds
        self.config = processor.config
        self.limits = SimpleNamespace(max_running=max_running)
        self.counters = Counters()
        self.seen: list[tuple[Prompt, Options]] = []
        self.open: dict[int, FakeRequest] = {}
        self.cancelled: list[int] = []
        self.threads: set[int] = set()
        self._numbers = 0

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def prepare(self, prompt: Prompt, options: Options = Options()) -> FakeRequest:  # noqa: B008
        for image in prompt.images:
            open_image(image)
        text = prompt.messages()[-1].content
        rendered = self.processor.template.render(prompt.messages(), prompt.mode)
        tokens = len(self.processor.tokenizer.encode(rendered.text, add_special_tokens=False).ids)
        if tokens > self.config.context:
            raise ContextLengthError(f"the prompt has {tokens} tokens, the model's window holds {self.config.context}")
        self.seen.append((prompt, options))
        thinking = "Hm." if prompt.mode == "think" else None
        words = deque(re.findall(r"\S+\s*", text.split("echo", 1)[-1])[: options.max_new_tokens])
        generation = Generation(prompt, tokens, len(prompt.images), thinking=thinking, finish_reason="stop")
        return FakeRequest(prompt, options, tokens, len(prompt.images), words, generation)

    def submit(self, request: FakeRequest, options: Options = Options()) -> int:  # noqa: B008
        self._numbers += 1
        self.open[self._numbers] = request
        return self._numbers

    def cancel(self, number: int) -> None:
        del self.open[number]
        self.cancelled.append(number)

    def step(self) -> list[Event]:
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        return [self._next(number, request) for number, request in list(self.open.items())[: self.limits.max_running]]

    def _next(self, number: int, request: FakeRequest) -> Event:
        text = request.prompt.messages()[-1].content
        if "break" in text:
            raise RuntimeError("broken on purpose")
        generation = request.told
        generation.token_ids.append(1)
        self.counters.generated_tokens += 1
        if "endless" in text:
            return Event(number, (1,), text="on and on " * (1 if "small" in text else 4000))
        if generation.thinking and len(generation.token_ids) == 1:
            return Event(number, (1,), thinking=generation.thinking)
        word = request.words.popleft() if request.words else ""
        generation.text += word
        if request.words:
            return Event(number, (1,), text=word)
        del self.open[number]
        self.counters.finished["stop"] += 1
        return Event(number, (1,), text=word, generation=generation)
