"""What the device knows of the running requests: a row of each table is one request's slot.

A step reads and writes these tables alone, so that it needs nothing from the host but which slots it is for, and a
CUDA graph of it can be replayed whatever requests hold them. The last slot is nobody's: it fills a batch up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer.engine.sampler import mask, penalise, pick
from infer.requests.request import Options
from infer.requests.structured_output import ThinkTokens
from phi4rv.config import Config

NEVER = 2**40  # a number of tokens that no answer has


class Slots:
    def __init__(self, config: Config, count: int, pages: int, beyond: int, think: ThinkTokens, device: torch.device):
        """``count`` slots of at most ``pages`` pages; a step may write ``beyond`` tokens past the window."""
        self.count, self.think, self.device = count, think, device
        rows = count + 1

        def table(*shape: int, dtype: torch.dtype = torch.int64, fill: float = 0) -> Tensor:
            return torch.full((rows, *shape), fill, dtype=dtype, device=device)

        # Tokens, prompt and answer; -1 under images. lengths: how many of them the cache holds.
        self.tokens = table(config.context + beyond + 1, dtype=torch.int32)
        self.lengths = table()
        self.prompt_lengths = table()
        self.page_table = table(pages, dtype=torch.int32)
        self.temperature, self.top_p, self.min_p, self.penalty = (table(dtype=torch.float32) for _ in range(4))
        self.top_k, self.seed = table(), table()
        self.seen = table(config.vocab_size, dtype=torch.bool)
        self.allowed = table(config.vocab_size, dtype=torch.bool, fill=True)
        # thinking: inside a thought; force_at: the number of the answer's token at which the thought must be over.
        self.thinking = table(dtype=torch.bool)
        self.force_at = table(fill=NEVER)

    def fill(self, slot: int, known: Tensor, prompt_length: int, mode: str, options: Options, pages: list[int]) -> None:
        """Gives a slot to a request of ``known`` (T,) int64 tokens on the host: its prompt and what it has answered."""
        sampling = options.sampling
        for table, value in (
            (self.prompt_lengths, prompt_length),
            (self.temperature, sampling.temperature),
            (self.top_k, sampling.top_k),
            (self.top_p, sampling.top_p),
            (self.min_p, sampling.min_p),
            (self.penalty, sampling.repetition_penalty),
            (self.seed, sampling.seed),
        ):
            table[slot] = value
        self.lengths[slot] = 0
        self.tokens[slot, : len(known)] = self._moved(known.to(torch.int32))
        self.seen[slot] = False
        if sampling.repetition_penalty != 1:
            self.seen[slot].index_fill_(0, self._moved(known[known >= 0]), True)
        self.allowed[slot] = True
        self.thinking[slot] = self.think.inside(mode, known[prompt_length:].tolist())
        budget = options.max_thinking_tokens
        self.force_at[slot] = NEVER if budget is None else budget + (mode != "think")  # its own tag is not counted
        self.set_pages(slot, 0, pages)

    def set_pages(self, slot: int, begin: int, pages: list[int]) -> None:
        """Entries ``begin`` onward of a slot's page table."""
        self.page_table[slot, begin : begin + len(pages)] = self._moved(torch.tensor(pages, dtype=torch.int32))

    def clear(self, slot: int) -> None:
        """Nothing of the slot is read any more; what a step under way still writes for it goes to the scratch page."""
        self.page_table[slot] = 0
        self.lengths[slot] = 0

    def _moved(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return x
        return x.pin_memory().to(self.device, non_blocking=True)

    def choose(
        self, slots: Tensor, logits: Tensor, drafts: Tensor, begin: Tensor, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """The next tokens of each slot, and how many of them count; the tables then hold those.

        logits (B, M, V) float32 of the last token and M - 1 drafts behind it, drafts (B, M): these tokens; begin (B,):
        the number of the first new token in its document. Returns (B, M) int64, and (B,) int64 in 1..M: a draft counts
        where it is what the model chose, and so does the token that is chosen behind it. plain: all are greedy, with no
        penalty and no mask. Where a thought is over its budget, its end is chosen.
        """
        number = begin - self.prompt_lengths[slots]
        thinking, force_at = self.thinking[slots], self.force_at[slots]
        seen = None if plain else self.seen[slots]
        chosen, states = [], []
        for m in range(logits.shape[1]):
            if m and seen is not None:
                seen = seen.scatter(1, drafts[:, m : m + 1].long(), True)
            token = self._pick(slots, logits[:, m], seen, number + m)
            token = torch.where(thinking & (number + m >= force_at), self.think.end, token)
            opens = (number + m == 0) & (token == self.think.start)
            thinking = (thinking & (token != self.think.end)) | opens
            chosen.append(token)
            states.append(thinking)
        tokens = torch.stack(chosen, 1)
        right = (tokens[:, :-1] == drafts[:, 1:]).long().cumprod(1).sum(1)
        counted = right + 1
        self._keep(slots, tokens, counted, begin, torch.stack(states, 1), plain)
        return tokens, counted

    def _pick(self, slots: Tensor, logits: Tensor, seen: Tensor | None, number: Tensor) -> Tensor:
        if seen is None:
            return logits.argmax(-1)
        logits = mask(penalise(logits, seen, self.penalty[slots]), self.allowed[slots])
        temperature, top_k, top_p, min_p, seed = (
            table[slots] for table in (self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
        )
        return pick(logits, temperature, top_k, top_p, min_p, seed, number)

    def _keep(
        self, slots: Tensor, tokens: Tensor, counted: Tensor, begin: Tensor, thinking: Tensor, plain: bool
    ) -> None:
        width = tokens.shape[1]
        places = (begin[:, None] + torch.arange(width, device=tokens.device)).clamp(max=self.tokens.shape[1] - 1)
        self.tokens[slots[:, None], places] = tokens.to(torch.int32)
        self.lengths[slots] = begin + counted - 1
        self.lengths[-1].zero_()  # the slot that fills batches up
        self.thinking[slots] = thinking.gather(1, counted[:, None] - 1).squeeze(1)
        if not plain:
            taken = torch.arange(width, device=tokens.device) < counted[:, None]
            for m in range(width):
                self.seen[slots, tokens[:, m]] = self.seen[slots, tokens[:, m]] | taken[:, m]
