"""The engines that ``benchmarks/inference/protocol.py`` asks: this one, transformers' classes and vLLM."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import phi4rv
from benchmarks.inference.questions import ProtocolQuestion
from benchmarks.inference.vllm_peer import VLLM
from benchmarks.models import Transformers
from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.engine.output_processor import stop_token_ids
from infer.requests.sampling_params import SamplingParams
from phi4rv.processing.answers import Answer, parse_answer
from phi4rv.processing.images import open_image
from phi4rv.processing.processor import Processor, Prompt

# A prompt and a limit of new tokens to the answer and how many tokens it has.
AnswerFn = Callable[[Prompt, int], tuple[Answer, int]]
WARMUP_TOKENS = 8  # tokens of an answer that is not timed


@dataclass(frozen=True)
class ProtocolConfig:
    """What is asked, and of which weights. weights: the engine's format, ``Engine``'s argument."""

    checkpoint: Path
    modes: tuple[str, ...]
    new: int
    device: str
    dtype: torch.dtype | None = None
    kernels: str | None = None
    weights: str | None = None


def phi4rv_engine(config: ProtocolConfig) -> AnswerFn:
    """Each question stands alone: nothing is remembered of those before it."""
    engine_config = EngineConfig(max_running=1, image_cache_bytes=0, prefix_cache=False)
    engine = Engine(
        config.checkpoint, config.device, config.dtype, config.kernels, weights=config.weights, config=engine_config
    )  # fmt: skip

    def ask(prompt: Prompt, new: int) -> tuple[Answer, int]:
        generation = engine.generate([prompt], SamplingParams(max_new_tokens=new))[0]
        return generation.answer(engine.processor), len(generation.token_ids)

    return ask


def transformers_engine(config: ProtocolConfig) -> AnswerFn:
    model, processor = phi4rv.load(config.checkpoint, config.device, config.dtype, "torch")
    peer = Transformers(model.config, model.device, model.decoder.norm.weight.dtype, model)
    stops = stop_token_ids(processor)

    def ask(prompt: Prompt, new: int) -> tuple[Answer, int]:
        batch = processor([prompt]).to(model.device)
        ids: list[int] = []
        room = model.config.context - len(batch.input_ids)
        peer.generate(peer.embeddings(batch)[None], min(new, room), stops, ids.extend, static=False)
        return parse_ids(processor, ids, stops, prompt)

    return ask


def vllm_engine(config: ProtocolConfig) -> AnswerFn:
    """With the code that the checkpoint's folder brings, which vLLM asks for."""
    processor = phi4rv.load(config.checkpoint, "meta", kernels="torch")[1]
    window = processor.config.context
    peer = VLLM(config.checkpoint, trust_remote_code=True, max_model_len=window, max_num_seqs=1)

    def ask(prompt: Prompt, new: int) -> tuple[Answer, int]:
        rendered = processor.template.render(prompt.messages(), prompt.mode).text
        asked = {"prompt": rendered, "multi_modal_data": {"image": [open_image(image) for image in prompt.images]}}
        return parse_ids(processor, peer.answer([asked], new)[0], stop_token_ids(processor), prompt)

    return ask


def parse_ids(processor: Processor, ids: Sequence[int], stops: set[int], prompt: Prompt) -> tuple[Answer, int]:
    """The answer of ``ids``, whose end-of-text token does not count."""
    kept = [i for i in ids if i not in stops]
    return parse_answer(processor.decode(kept), prompt.mode), len(kept)


ENGINES: dict[str, Callable[[ProtocolConfig], AnswerFn]] = {
    "phi4rv": phi4rv_engine,
    "transformers": transformers_engine,
    "vLLM": vllm_engine,
}


def installed() -> list[str]:
    """This project's engine, and the peers that are here."""
    return [name for name in ENGINES if name == "phi4rv" or importlib.util.find_spec(name.lower()) is not None]


@torch.no_grad()
def answer_all(
    name: str, config: ProtocolConfig, questions: Sequence[ProtocolQuestion], answers: Path | None
) -> list[dict[str, Any]]:
    """Every question in every mode, one after another; seconds from prompt and encoded picture to the whole answer.

    ``answers``: a JSON Lines file that each of them is added to as it comes, with its text.
    """
    ask, results = ENGINES[name](config), []
    ask(questions[0].prompt(config.modes[0]), WARMUP_TOKENS)
    todo = [(a, mode) for mode in config.modes for a in questions]
    for a, mode in tqdm(todo, desc=name, unit="answer", file=sys.stderr, dynamic_ncols=True):
        begun = time.perf_counter()
        answer, tokens = ask(a.prompt(mode), config.new)
        seconds = time.perf_counter() - begun
        result = {"engine": name, "mode": mode, "kind": a.kind, "where": a.where, "seconds": seconds}
        results.append({**result, "tokens": tokens, "right": a.right(answer)})
        if answers:
            with answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**results[-1], "text": answer.text, "thinking": answer.thinking}) + "\n")
    return results
