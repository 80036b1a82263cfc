"""What ``benchmarks/inference/command.py`` times of each side.

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
from benchmarks.inference.implementations import Phi4RVEngine, TransformersEngine, timed_answer
from benchmarks.inference.roofline import Record, Shapes
from benchmarks.inference.workload import Workload, patches_per_image, random_prompt
from benchmarks.kernels import timing
from infer.engine.config import Limits
from infer.engine.engine import Engine
from infer.requests.request import Options
from phi4rv.config import Config
from phi4rv.processing.processor import Prompt

MAX_PEER_STEPS = 64  # decode steps of a peer that are timed, at most


def decode(side: Phi4RVEngine | TransformersEngine, new: int) -> Record:
    """Seconds of a step that attends to ``context`` tokens in the mean of the ``new`` steps."""
    s = side.place.shapes
    prompt = random_prompt(side.place, s.context - new // 2, seed=1)
    side.place.warm(lambda: side.answer(prompt, new + 1))
    answered = side.answer(prompt, new + 1)
    between = answered.between
    return {
        "seconds": sum(between) / len(between),
        "between": {"median": statistics.median(between), "p99": percentile(between, 99)},
        "spread": timing.relative_iqr(between),
        "joules": None if answered.joules is None else answered.joules / len(between),
        "top": side.top(prompt),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def first_token(side: Phi4RVEngine | TransformersEngine) -> Record:
    """Seconds from one image and its question, as patches and tokens on the CPU, to the first token."""
    prompt = random_prompt(side.place, side.place.shapes.text, seed=2, image=True)
    side.place.warm(lambda: side.answer(prompt, 1))
    seconds = [side.answer(prompt, 1).times[0] for _ in range(side.place.rounds)]
    return {
        "seconds": statistics.median(seconds),
        "spread": timing.relative_iqr(seconds),
        "patches": patches_per_image(side.place),
        "top": side.top(prompt),
    }


def tower(side: Phi4RVEngine | TransformersEngine) -> Record:
    """Tower and projector on one image of most patches."""
    encode = side.encoder(random_prompt(side.place, side.place.shapes.text, seed=2, image=True))
    found = timing.milliseconds({"": lambda i: encode()}, device=side.place.device.type)[""]
    return {"ms": found.ms, "patches": patches_per_image(side.place), "method": found.method, "spread": found.spread}


def second_question(side: Phi4RVEngine) -> Record:
    """Seconds to the first token of a second question about a picture that the engine remembers."""
    s, place = side.place.shapes, side.place
    limits = Limits(max_running=1, cache_tokens=place.config.context, speculate=0)
    engine = Engine((side.engine.model, place.processor), limits=limits)

    def both(seed: int) -> tuple[float, float]:
        one, other = (random_prompt(place, s.text, seed + n, image=True) for n in range(2))
        again = Prompt(other.text, one.images)
        return timed_answer(engine, one, 1).times[0], timed_answer(engine, again, 1).times[0]

    place.warm(lambda: both(10))
    first, second = zip(*(both(20 + 2 * n) for n in range(place.rounds)), strict=True)
    cached = engine.counters.cached_prompt_tokens
    medians = {"seconds": statistics.median(second), "first_seconds": statistics.median(first)}
    return {**medians, "spread": timing.relative_iqr(second), "cached_tokens": cached}


def batched_requests(side: Phi4RVEngine) -> Record:
    """New tokens a second of many requests together and of one alone, prefill and all."""
    s, place = side.place.shapes, side.place
    prompts = [random_prompt(place, s.prompt, seed=100 + n) for n in range(s.many)]

    def rate(asked: Sequence[Prompt]) -> float:
        begun = time.perf_counter()
        made = side.engine.generate(asked, Options(max_new_tokens=s.answer))
        seconds = time.perf_counter() - begun
        if [len(g.token_ids) for g in made] != [s.answer] * len(asked):
            raise RuntimeError(f"answers have {[len(g.token_ids) for g in made]} tokens and should have {s.answer}")
        return len(asked) * s.answer / seconds

    for asked in (prompts, prompts[:1]):
        place.warm(lambda asked=asked: rate(asked))
    return {"tokens_per_second": rate(prompts), "one": rate(prompts[:1]), "requests": s.many}


def load(place: Workload, folder: Path) -> Record:
    """Seconds to load a checkpoint that was just written to ``folder``, and so lies in memory."""
    model = place.model("torch")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    phi4rv.save(model, place.processor, folder)
    del model
    seconds = []
    for _ in range(2):  # the first also makes the device's context and pinned memory
        place.wait()
        begun = time.perf_counter()
        loaded = phi4rv.load(folder, place.device, place.dtype)
        place.wait()
        seconds.append(time.perf_counter() - begun)
        del loaded
    return {"seconds": min(seconds), "bytes": size}


def measure(side: str, config: Config, device: str, shapes: Shapes, folder: Path) -> dict[str, Record]:
    """Of each case that a side has what it took, or why it did not run. ``folder``: for what has to lie in files."""
    place = Workload(config, torch.device(device), shapes)
    if side == "load":
        return {"load": attempt(lambda: load(place, folder / "checkpoint"))}
    if side == "vLLM":
        return vllm_peer.measure(place, folder)
    kernels, _, form = side.partition(", ")
    with torch.no_grad():
        if kernels == "transformers":
            theirs = TransformersEngine(place, form)
            new = min(shapes.new, MAX_PEER_STEPS)
            return {
                "decode": attempt(lambda: decode(theirs, new)),
                "first token": attempt(lambda: first_token(theirs)),
                "tower": attempt(lambda: tower(theirs)),
            }
        ours = Phi4RVEngine(place, kernels, form or "bf16")
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
    """One case that fails leaves the others of its side their times."""
    try:
        return case()
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}".partition("\n")[0][:100]}
