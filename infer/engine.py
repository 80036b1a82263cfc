"""Generation: all prompts packed in one prefill, then one token for each unfinished document at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infer.cache import KVCache
from infer.sampling import Sampling, next_token
from phi4rv.answers import Answer, parse_answer
from phi4rv.errors import UserError
from phi4rv.model import Phi4RV
from phi4rv.processor import Processor, Prompt

GREEDY = Sampling()
# Called with the number of a prompt and its new token, as each is made.
OnToken = Callable[[int, int], None]


@dataclass
class Generation:
    """What became of one prompt. ``finish_reason``: ``stop`` (end of text) or ``length`` (a limit was reached).

    ``token_ids`` has no end-of-text token. Seconds are of the whole call's prefill and decoding, which the prompts
    of one call share.
    """

    prompt: Prompt
    prompt_tokens: int
    image_tokens: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def answer(self, processor: Processor) -> Answer:
        return parse_answer(processor.decode(self.token_ids), self.prompt.mode)


@torch.inference_mode()
def generate(
    model: Phi4RV,
    processor: Processor,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Answers to ``prompts``, in order; each ends at end-of-text, after max_new_tokens, or where the window ends.

    Prompt i draws from its own generator, seeded with sampling.seed + i. UserError for a prompt over the window.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {max_new_tokens} must be 1 or more")
    began = time.perf_counter()
    batch = processor(prompts)
    lengths = batch.cu_seqlens.diff().long()
    images = torch.bincount(
        torch.bucketize(batch.image_positions, batch.cu_seqlens[1:], right=True), minlength=len(lengths)
    )
    done = [Generation(p, n, i) for p, n, i in zip(prompts, lengths.tolist(), images.tolist(), strict=True)]
    room = (model.config.context - lengths).clamp(max=max_new_tokens)
    dtype = model.decoder.norm.weight.dtype
    cache = KVCache(model.config, lengths + room, dtype, model.device, model.ops)
    generators = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
    stops = stop_tokens(processor)

    batch = batch.to(model.device)
    hidden = model.hidden(batch, cache.prefill(batch.cu_seqlens, batch.max_seqlen))
    logits = model.decoder.logits(hidden[batch.cu_seqlens[1:].long() - 1]).cpu()
    prefilled = time.perf_counter()

    live = [i for i, n in enumerate(room.tolist()) if n > 0]
    logits = logits[live]
    while live:
        going = []
        for i, row in zip(live, logits, strict=True):
            token = next_token(row, sampling, generators[i])
            if token in stops:
                done[i].finish_reason = "stop"
                continue
            done[i].token_ids.append(token)
            if on_token:
                on_token(i, token)
            if len(done[i].token_ids) < room[i]:
                going.append(i)
        live = going
        if live:
            logits = _step(model, cache, live, [done[i].token_ids[-1] for i in live])
    finished = time.perf_counter()
    for generation in done:
        generation.prefill_seconds, generation.decode_seconds = prefilled - began, finished - prefilled
    return done


def _step(model: Phi4RV, cache: KVCache, documents: list[int], tokens: list[int]) -> Tensor:
    """One token of each document through the model: logits (B, V) float32 on the host."""
    index = torch.tensor(documents, device=model.device)
    positions = cache.lengths[index].to(torch.int32)
    x = model.decoder.embed_tokens(torch.tensor(tokens, device=model.device))
    return model.decoder.logits(model.decoder(x, positions, cache.extend(index))).cpu()


def stop_tokens(processor: Processor) -> set[int]:
    """End-of-text ids: the config's, and those of generation_config.json."""
    listed = json.loads(processor.files.get("generation_config.json", b"{}")).get("eos_token_id", [])
    return {processor.config.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
