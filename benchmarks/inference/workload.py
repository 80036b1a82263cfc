"""The workload on which inference is timed: a model with random weights, and prompts of a given length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image

from benchmarks.inference.roofline import Shapes
from benchmarks.models import random_model
from benchmarks.training.batches import grid
from phi4rv.config import Config
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.chat_template import IMAGE_TOKEN
from phi4rv.processing.images import PATCH_SIZE
from phi4rv.processing.processor import Processor, Prompt
from train.synthetic import tokenizer_corpus
from train.synthetic.tiny_model import build_tiny_model


@dataclass(frozen=True)
class Workload:
    """Model size, device and shapes that a contender runs with."""

    config: Config
    device: torch.device
    shapes: Shapes

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        return 3 if self.on_gpu else 1

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Compiles, captures and fills caches; on a CPU there is nothing to warm."""
        if self.on_gpu:
            run()

    def model(self, kernels: str) -> Phi4RV:
        """The same weights on every call on a device; no answer of theirs ends before its limit."""
        torch.manual_seed(0)
        model = random_model(self.config, kernels, self.device, self.dtype)
        with torch.no_grad():
            model.decoder.lm_head.weight[self.config.eos_token_id] = 0  # a logit of 0, which is never the largest
        return model

    @property
    def processor(self) -> Processor:
        return _processor(self.config)


@cache
def _processor(config: Config) -> Processor:
    """The embedded default's tokenizer and template for a model of any size."""
    files = dict(build_tiny_model(0, tokenizer_corpus())[1].files)
    del files["generation_config.json"]  # which names the small vocabulary's ids
    return Processor(files, config)


def random_prompt(workload: Workload, tokens: int, seed: int, image: bool = False) -> Prompt:
    """A prompt of ``tokens`` tokens and, with ``image``, as many patches as the configuration allows, in front."""
    processor = workload.processor
    vocabulary = processor.tokenizer.get_vocab(with_added_tokens=False)
    words = sorted(w.removeprefix("Ġ") for w in vocabulary if w.startswith("Ġ") and w[1:].isalpha() and w[1:].isascii())
    generator = torch.Generator().manual_seed(seed)
    chosen = [words[i] for i in torch.randint(len(words), (tokens,), generator=generator).tolist()]
    pictures = [noise_image(workload.config, generator)] if image else []
    grids = [processor.grid(*p.size) for p in pictures]

    def made(count: int) -> Prompt:
        return Prompt(IMAGE_TOKEN * len(pictures) + "".join(f" {word}" for word in chosen[:count]), pictures)

    def length(prompt: Prompt) -> int:
        return len(processor.tokens(prompt.messages(), grids)) - sum(map(math.prod, grids))

    prompt = made(tokens - length(made(1)) + 1)
    if length(prompt) != tokens:
        raise RuntimeError(f"a question has {length(prompt)} tokens and should have {tokens}")
    return prompt


def noise_image(config: Config, generator: torch.Generator) -> Image.Image:
    """Noise of the size that gives most patches."""
    rows, columns = grid(config.max_num_patches)
    pixels = torch.randint(256, (rows * PATCH_SIZE, columns * PATCH_SIZE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def patches_per_image(workload: Workload) -> int:
    size = noise_image(workload.config, torch.Generator()).size
    return math.prod(workload.processor.grid(*size))
