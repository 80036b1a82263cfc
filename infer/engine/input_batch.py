"""The state of the running requests on the device: each has a row, ``req_index``, in every buffer.

A step reads and writes these buffers alone, so that all it needs from the host is which rows it is for, and its CUDA
graph can be replayed whatever requests have them. The last row belongs to no request: it pads batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer.engine.sampler import apply_repetition_penalty, apply_token_mask, sample
from infer.requests.sampling_params import SamplingParams
from infer.requests.structured_output import ThinkingTokens
from phi4rv.config import Config

UNLIMITED = 2**40  # more tokens than any answer has


class InputBatch:
    def __init__(
        self,
        config: Config,
        max_running: int,
        max_pages: int,
        num_lookahead_tokens: int,
        thinking_tokens: ThinkingTokens,
        device: torch.device,
    ):
        """max_pages: of one request. num_lookahead_tokens: how far a step may write past the context window."""
        self.max_running, self.thinking_tokens, self.device = max_running, thinking_tokens, device
        rows = max_running + 1

        def buffer(*shape: int, dtype: torch.dtype = torch.int64, fill: float = 0) -> Tensor:
            return torch.full((rows, *shape), fill, dtype=dtype, device=device)

        # Prompt and answer, -1 under images. num_computed_tokens: how many of them the KV cache holds.
        self.token_ids = buffer(config.context + num_lookahead_tokens + 1, dtype=torch.int32)
        self.num_computed_tokens = buffer()
        self.num_prompt_tokens = buffer()
        self.page_table = buffer(max_pages, dtype=torch.int32)
        self.temperature, self.top_p, self.min_p = (buffer(dtype=torch.float32) for _ in range(3))
        self.repetition_penalty = buffer(dtype=torch.float32)
        self.top_k, self.seed = buffer(), buffer()
        self.seen_tokens = buffer(config.vocab_size, dtype=torch.bool)
        self.allowed_tokens = buffer(config.vocab_size, dtype=torch.bool, fill=True)
        # is_thinking: inside a thought. thinking_limit: the index of the answer's token at which it must be over.
        self.is_thinking = buffer(dtype=torch.bool)
        self.thinking_limit = buffer(fill=UNLIMITED)

    def add_request(
        self,
        req_index: int,
        token_ids: Tensor,
        num_prompt_tokens: int,
        mode: str,
        params: SamplingParams,
        pages: list[int],
    ) -> None:
        """Assigns a row to a request of ``token_ids`` (T,) int64 on the host: its prompt and its answer so far."""
        for buffer, value in (
            (self.num_prompt_tokens, num_prompt_tokens),
            (self.temperature, params.temperature),
            (self.top_k, params.top_k),
            (self.top_p, params.top_p),
            (self.min_p, params.min_p),
            (self.repetition_penalty, params.repetition_penalty),
            (self.seed, params.seed),
        ):
            buffer[req_index] = value
        self.num_computed_tokens[req_index] = 0
        self.token_ids[req_index, : len(token_ids)] = self._to_device(token_ids.to(torch.int32))
        self.seen_tokens[req_index] = False
        if params.repetition_penalty != 1:
            self.seen_tokens[req_index].index_fill_(0, self._to_device(token_ids[token_ids >= 0]), True)
        self.allowed_tokens[req_index] = True
        self.is_thinking[req_index] = self.thinking_tokens.is_thinking(mode, token_ids[num_prompt_tokens:].tolist())
        budget = params.max_thinking_tokens
        # The tag that the model writes itself is not counted.
        self.thinking_limit[req_index] = UNLIMITED if budget is None else budget + (mode != "think")
        self.set_pages(req_index, 0, pages)

    def set_pages(self, req_index: int, begin: int, pages: list[int]) -> None:
        """Entries ``begin`` onward of a request's page table."""
        self.page_table[req_index, begin : begin + len(pages)] = self._to_device(torch.tensor(pages, dtype=torch.int32))

    def remove_request(self, req_index: int) -> None:
        """Frees the row; what a step in flight still writes for it goes to the null page."""
        self.page_table[req_index] = 0
        self.num_computed_tokens[req_index] = 0

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return x
        return x.pin_memory().to(self.device, non_blocking=True)

    def sample(
        self, req_indices: Tensor, logits: Tensor, drafts: Tensor, begin: Tensor, all_greedy: bool
    ) -> tuple[Tensor, Tensor]:
        """The next tokens of each request, and how many of them are accepted; the buffers are updated with those.

        logits (B, M, V) float32 of the last token and M - 1 drafts behind it, drafts (B, M): these tokens; begin (B,):
        the position of the first new token. Returns (B, M) int64, and (B,) int64 in 1..M: a draft is accepted where the
        model samples the same, and so is the token that is sampled behind it. all_greedy: no request has a temperature,
        a penalty or a token mask. Where a thought is over its budget, its end is forced.
        """
        index = begin - self.num_prompt_tokens[req_indices]
        is_thinking, thinking_limit = self.is_thinking[req_indices], self.thinking_limit[req_indices]
        seen = None if all_greedy else self.seen_tokens[req_indices]
        sampled, thinking_after = [], []
        for m in range(logits.shape[1]):
            if m and seen is not None:
                seen = seen.scatter(1, drafts[:, m : m + 1].long(), True)
            token = self._sample_one(req_indices, logits[:, m], seen, index + m)
            token = torch.where(is_thinking & (index + m >= thinking_limit), self.thinking_tokens.end, token)
            opens = (index + m == 0) & (token == self.thinking_tokens.start)
            is_thinking = (is_thinking & (token != self.thinking_tokens.end)) | opens
            sampled.append(token)
            thinking_after.append(is_thinking)
        token_ids = torch.stack(sampled, 1)
        num_correct = (token_ids[:, :-1] == drafts[:, 1:]).long().cumprod(1).sum(1)
        num_accepted = num_correct + 1
        self._append(req_indices, token_ids, num_accepted, begin, torch.stack(thinking_after, 1), all_greedy)
        return token_ids, num_accepted

    def _sample_one(self, req_indices: Tensor, logits: Tensor, seen: Tensor | None, index: Tensor) -> Tensor:
        if seen is None:
            return logits.argmax(-1)
        logits = apply_repetition_penalty(logits, seen, self.repetition_penalty[req_indices])
        logits = apply_token_mask(logits, self.allowed_tokens[req_indices])
        temperature, top_k, top_p, min_p, seed = (
            buffer[req_indices] for buffer in (self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
        )
        return sample(logits, temperature, top_k, top_p, min_p, seed, index)

    def _append(
        self,
        req_indices: Tensor,
        token_ids: Tensor,
        num_accepted: Tensor,
        begin: Tensor,
        is_thinking: Tensor,
        all_greedy: bool,
    ) -> None:
        width = token_ids.shape[1]
        offsets = torch.arange(width, device=token_ids.device)
        positions = (begin[:, None] + offsets).clamp(max=self.token_ids.shape[1] - 1)
        self.token_ids[req_indices[:, None], positions] = token_ids.to(torch.int32)
        self.num_computed_tokens[req_indices] = begin + num_accepted - 1
        self.num_computed_tokens[-1].zero_()  # the row that pads batches
        self.is_thinking[req_indices] = is_thinking.gather(1, num_accepted[:, None] - 1).squeeze(1)
        if not all_greedy:
            accepted = offsets < num_accepted[:, None]
            for m in range(width):
                seen = self.seen_tokens[req_indices, token_ids[:, m]]
                self.seen_tokens[req_indices, token_ids[:, m]] = seen | accepted[:, m]
