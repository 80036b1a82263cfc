"""The cases that ``benchmarks/inference/command.py`` times for each contender.

Requests begin with patches and token ids on the CPU: decoding and cutting of pictures is timed by
``benchmarks/images.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import phi4rv
from benchmarks.inference import vllm_peer
from benchmarks.inference.contenders import Phi4RVEngine, TransformersEngine, timed_answer
from benchmarks.inference.roofline import Record, Shapes
from benchmarks.inference.workload import Workload, patches_per_image, random_prompt
from benchmarks.kernels import timing
from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.sampling_params import SamplingParams
from phi4rv.config import Config
from phi4rv.processing.processor import Prompt

MAX_PEER_STEPS = 64  # decode steps of a peer that are timed, at most


def decode(contender: Phi4RVEngine | TransformersEngine, new: int) -> Record:
    """Seconds of a step that attends to ``context`` tokens in the mean of the ``new`` steps."""
    s = contender.workload.shapes
    prompt = random_prompt(contender.workload, s.context - new // 2, seed=1)
    contender.workload.warm_up(lambda: contender.answer(prompt, new + 1))
    answered = contender.answer(prompt, new + 1)
    between = answered.between
    return {
        "seconds": sum(between) / len(between),
        "between": {"median": statistics.median(between), "p99": percentile(between, 99)},
        "spread": timing.relative_iqr(between),
        "joules": None if answered.joules is None else answered.joules / len(between),
        "top": contender.top(prompt),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def first_token(contender: Phi4RVEngine | TransformersEngine) -> Record:
    """Seconds from one image and its question, as patches and tokens on the CPU, to the first token."""
    prompt = random_prompt(contender.workload, contender.workload.shapes.text, seed=2, image=True)
    contender.workload.warm_up(lambda: contender.answer(prompt, 1))
    seconds = [contender.answer(prompt, 1).times[0] for _ in range(contender.workload.rounds)]
    return {
        "seconds": statistics.median(seconds),
        "spread": timing.relative_iqr(seconds),
        "patches": patches_per_image(contender.workload),
        "top": contender.top(prompt),
    }


def tower(contender: Phi4RVEngine | TransformersEngine) -> Record:
    """Tower and projector on one image of most patches."""
    encode = contender.encoder(random_prompt(contender.workload, contender.workload.shapes.text, seed=2, image=True))
    found = timing.milliseconds({"": lambda i: encode()}, device=contender.workload.device.type)[""]
    return {
        "ms": found.ms,
        "patches": patches_per_image(contender.workload),
        "method": found.method,
        "spread": found.spread,
    }


def second_question(contender: Phi4RVEngine) -> Record:
    """Seconds to the first token of a second question about a picture that the engine remembers."""
    s, workload = contender.workload.shapes, contender.workload
    engine_config = EngineConfig(max_running=1, cache_tokens=workload.config.context, speculate=0)
    engine = Engine((contender.engine.model, workload.processor), config=engine_config)

    def both(seed: int) -> tuple[float, float]:
        one, other = (random_prompt(workload, s.text, seed + n, image=True) for n in range(2))
        again = Prompt(other.text, one.images)
        return timed_answer(engine, one, 1).times[0], timed_answer(engine, again, 1).times[0]

    workload.warm_up(lambda: both(10))
    first, second = zip(*(both(20 + 2 * n) for n in range(workload.rounds)), strict=True)
    cached = engine.stats.cached_prompt_tokens
    medians = {"seconds": statistics.median(second), "first_seconds": statistics.median(first)}
    return {**medians, "spread": timing.relative_iqr(second), "cached_tokens": cached}


def batched_requests(contender: Phi4RVEngine) -> Record:
    """New tokens a second of many requests together and of one alone, prefill and all."""
    s, workload = contender.workload.shapes, contender.workload
    prompts = [random_prompt(workload, s.prompt, seed=100 + n) for n in range(s.many)]

    def rate(asked: Sequence[Prompt]) -> float:
        begun = time.perf_counter()
        made = contender.engine.generate(asked, SamplingParams(max_new_tokens=s.answer))
        seconds = time.perf_counter() - begun
        if [len(g.token_ids) for g in made] != [s.answer] * len(asked):
            raise RuntimeError(f"answers have {[len(g.token_ids) for g in made]} tokens and should have {s.answer}")
        return len(asked) * s.answer / seconds

    for asked in (prompts, prompts[:1]):
        workload.warm_up(lambda asked=asked: rate(asked))
    return {"tokens_per_second": rate(prompts), "one": rate(prompts[:1]), "requests": s.many}


def load(workload: Workload, folder: Path) -> Record:
    """Seconds to load a checkpoint that was just written to ``folder``, and so lies in memory."""
    model = workload.model("torch")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    phi4rv.save(model, workload.processor, folder)
    del model
    seconds = []
    for _ in range(2):  # the first also makes the device's context and pinned memory
        workload.synchronize()
        begun = time.perf_counter()
        loaded = phi4rv.load(folder, workload.device, workload.dtype)
        workload.synchronize()
        seconds.append(time.perf_counter() - begun)
        del loaded
    return {"seconds": min(seconds), "bytes": size}


def measure(contender: str, config: Config, device: str, shapes: Shapes, folder: Path) -> dict[str, Record]:
    """Of each case that a contender has what it took, or why it did not run. ``folder``: for files that it needs."""
    workload = Workload(config, torch.device(device), shapes)
    if contender == "load":
        return {"load": attempt(lambda: load(workload, folder / "checkpoint"))}
    if contender == "vLLM":
        return vllm_peer.measure(workload, folder)
    kernels, _, form = contender.partition(", ")
    with torch.no_grad():
        if kernels == "transformers":
            theirs = TransformersEngine(workload, form)
            new = min(shapes.new, MAX_PEER_STEPS)
            return {
                "decode": attempt(lambda: decode(theirs, new)),
                "first token": attempt(lambda: first_token(theirs)),
                "tower": attempt(lambda: tower(theirs)),
            }
        ours = Phi4RVEngine(workload, kernels, form or "bf16")
        cases = {
            "decode": attempt(lambda: decode(ours, shapes.new)),
            "first token": attempt(lambda: first_token(ours)),
        }
        if not form:
            cases["tower"] = attempt(lambda: tower(ours))
            cases["second question"] = attempt(lambda: second_question(ours))
            cases["at once"] = attempt(lambda: batched_requests(ours))
        return cases


def attempt(case: Callable[[], Record]) -> Record:
    """One case that fails leaves the others of its contender their times."""
    try:
        return case()
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}".partition("\n")[0][:100]}
