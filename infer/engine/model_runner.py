"""The two forward passes of the engine: a packed prefill pass over chunks of prompts, and a decode step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.engine.cuda_graphs import CudaGraphs
from infer.engine.fused_decoder import MAX_ROWS, FusedDecoder
from infer.engine.input_batch import InputBatch
from infer.engine.kv_cache import PagedKVCache
from infer.engine.sampler import gather_logprobs
from infer.engine.scheduler import RequestState
from infer.engine.speculative_decoding import propose_draft
from infer.requests.outputs import TokenLogprob
from phi4rv.batch import image_batch
from phi4rv.model.phi4rv import Phi4RV

MAX_TOWER_PATCHES = 16384  # of one pass of the vision tower


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens begin : begin + T of a request. token_ids (T,) int64, any under images; image_features: pieces (P, C) of
    projected images and their positions (P,) in the chunk. is_last: the request's known tokens end here.
    """

    req_index: int
    begin: int
    token_ids: Tensor
    image_features: Sequence[tuple[Tensor, Tensor]]
    is_last: bool


@dataclass(frozen=True)
class SamplerOutput:
    """On the device: token_ids (B, M) int64, how many are accepted (B,), and the logits (B, M, V) float32."""

    token_ids: Tensor
    num_accepted: Tensor
    logits: Tensor


class AsyncOutput:
    """The sampled tokens of a pass for the requests ``states``, on their way to the host.

    query_len: tokens of each request at most. num_logprobs: None, or how many beside the sampled token's. timing: batch
    size, whether it drafted, and its start, if it counts for ``DynamicSpeculation``.
    """

    def __init__(
        self,
        output: SamplerOutput,
        states: list[RequestState],
        query_len: int,
        num_logprobs: int | None,
        timing: tuple[int, bool, float] | None,
    ):
        self.states, self.query_len, self.timing = states, query_len, timing
        count = len(states)
        token_ids = output.token_ids[:count]
        results = [token_ids, output.num_accepted[:count]]
        if num_logprobs is not None:
            results += gather_logprobs(output.logits[:count].flatten(0, 1), token_ids.flatten(), num_logprobs)
        self._copies, self._event = results, None
        if token_ids.is_cuda:
            self._copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in results]
            for copy, result in zip(self._copies, results, strict=True):
                copy.copy_(result, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def get_output(self) -> tuple[list[list[int]], list[int], list[list[TokenLogprob]] | None]:
        """Waits for the copies: token ids (B, M), how many are accepted (B), and log-probabilities if requested."""
        if self._event is not None:
            self._event.synchronize()
        token_ids, num_accepted, *rest = (t.tolist() for t in self._copies)
        if not rest:
            return token_ids, num_accepted, None
        flat = [
            TokenLogprob(token_id, logprob, tuple(zip(ids, values, strict=True)))
            for token_id, logprob, ids, values in zip((t for row in token_ids for t in row), *rest, strict=True)
        ]
        return token_ids, num_accepted, [flat[i : i + self.query_len] for i in range(0, len(flat), self.query_len)]


class ModelRunner:
    def __init__(
        self,
        model: Phi4RV,
        fused_decoder: FusedDecoder | None,
        kv_cache: PagedKVCache,
        input_batch: InputBatch,
        cuda_graphs: CudaGraphs,
    ):
        self.model, self.fused_decoder, self.kv_cache = model, fused_decoder, kv_cache
        self.input_batch, self.cuda_graphs = input_batch, cuda_graphs
        self._static_indices: dict[tuple[int, int, bool], Tensor] = {}

    def encode_images(self, images: Sequence[tuple[Tensor, tuple[int, int]]]) -> list[Tensor]:
        """Patches (P, 768) and grid of each image -> its projected features (P, C)."""
        out: list[Tensor] = []
        group: list[tuple[Tensor, tuple[int, int]]] = []
        for index, image in enumerate(images):
            group.append(image)
            patches = sum(len(p) for p, _ in group)
            if index + 1 == len(images) or patches + len(images[index + 1][0]) > MAX_TOWER_PATCHES:
                batch = image_batch(*zip(*group, strict=True)).to(self.input_batch.device, non_blocking=True)
                out += self.model.encode_images(batch).split([len(p) for p, _ in group])
                group = []
        return out

    def prefill(self, chunks: Sequence[PrefillChunk], all_greedy: bool) -> SamplerOutput | None:
        """Runs the chunks and, for those that are last, samples the next token: B of them, M = 1."""
        model, batch = self.model, self.input_batch
        lengths = torch.tensor([len(c.token_ids) for c in chunks])
        begins = torch.tensor([c.begin for c in chunks])
        ends = lengths.cumsum(0)
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        positions = torch.cat([torch.arange(c.begin, c.begin + len(c.token_ids)) for c in chunks])
        document = torch.repeat_interleave(torch.arange(len(chunks)), lengths)
        last = [n for n, c in enumerate(chunks) if c.is_last]
        req_indices, positions, document, cu_seqlens, seq_lens, token_ids, last_chunks = self._to_device(
            torch.tensor([c.req_index for c in chunks]),
            positions,
            document,
            cu_seqlens,
            begins + lengths,
            torch.cat([c.token_ids for c in chunks]),
            torch.tensor(last, dtype=torch.int64),
        )
        x = model.decoder.embed_tokens(token_ids)
        for chunk, offset in zip(chunks, (ends - lengths).tolist(), strict=True):
            for features, places in chunk.image_features:
                x = model.ops.scatter_rows(x, features, self._to_device(places + offset)[0])
        page_table = batch.page_table[req_indices, : -(-int((begins + lengths).max()) // self.kv_cache.page_size)]
        slot_mapping = self.kv_cache.slot_mapping(page_table[document], positions[:, None])
        no_context = not any(c.begin for c in chunks)
        attend = self.kv_cache.prefill_attention(
            page_table, seq_lens, slot_mapping, cu_seqlens, int(lengths.max()), no_context
        )
        hidden = model.decoder(x, positions.to(torch.int32), attend)
        if not last:
            return None
        logits = model.decoder.logits(hidden[cu_seqlens[1:].long()[last_chunks] - 1])[:, None]
        sampling, begin = req_indices[last_chunks], seq_lens[last_chunks]
        newest = batch.token_ids[sampling].gather(1, (begin - 1)[:, None])
        sampled, num_accepted = batch.sample(sampling, logits, newest, begin, all_greedy)
        return SamplerOutput(sampled, num_accepted, logits)

    def padded_batch_size(self, count: int) -> int:
        """The batch size of a step for ``count`` requests: with CUDA graphs 1, 2, 4 or a multiple of 8."""
        if not self.cuda_graphs.enabled:
            return count
        return min(self.input_batch.max_running, next((n for n in (1, 2, 4) if count <= n), -(-count // 8) * 8))

    def decode(self, req_indices: Sequence[int], query_len: int, all_greedy: bool) -> tuple[SamplerOutput, bool]:
        """One step of these requests, ``query_len`` tokens each at most; the output has their rows first, then padding.
        And whether it takes the time that such steps take from now on.
        """
        return self._run((self.padded_batch_size(len(req_indices)), query_len, all_greedy), req_indices)

    def warm_up(self, query_lens: Sequence[int]) -> None:
        """Captures the graph of every batch size, on padding rows alone, so that no request waits for it."""
        counts = range(1, self.input_batch.max_running + 1)
        sizes = {self.padded_batch_size(count) for count in counts} if self.cuda_graphs.enabled else ()
        for key in itertools.product(sorted(sizes, reverse=True), query_lens, (True, False)):
            while not self.cuda_graphs.warmed_up(key):
                self._run(key, ())

    def _run(self, key: tuple[int, int, bool], req_indices: Sequence[int]) -> tuple[SamplerOutput, bool]:
        batch_size, query_len, all_greedy = key
        padding = [self.input_batch.max_running] * (batch_size - len(req_indices))
        indices = torch.tensor([*req_indices, *padding])
        warmed_up = self.cuda_graphs.warmed_up(key)
        if not self.cuda_graphs.enabled:
            step = lambda: self._decode(self._to_device(indices)[0], query_len, all_greedy)  # noqa: E731
            return self.cuda_graphs.run(key, step), warmed_up
        if key not in self._static_indices:
            self._static_indices[key] = torch.empty(batch_size, dtype=torch.int64, device=self.input_batch.device)
        static = self._static_indices[key]
        static.copy_(indices.pin_memory(), non_blocking=True)
        return self.cuda_graphs.run(key, lambda: self._decode(static, query_len, all_greedy)), warmed_up

    def _decode(self, req_indices: Tensor, query_len: int, all_greedy: bool) -> SamplerOutput:
        """The newest token and query_len - 1 drafts of each of ``req_indices`` (B,) int64, all on the device."""
        batch, decoder = self.input_batch, self.model.decoder
        history, num_computed = batch.token_ids[req_indices], batch.num_computed_tokens[req_indices]
        token_ids = history.gather(1, num_computed[:, None])
        if query_len > 1:
            token_ids = torch.cat([token_ids, propose_draft(history, num_computed + 1, query_len - 1)], 1)
        token_ids = token_ids.clamp(min=0)  # a draft may come from under an image
        positions = num_computed[:, None] + torch.arange(query_len, device=req_indices.device)
        page_table = batch.page_table[req_indices]
        slot_mapping = self.kv_cache.slot_mapping(page_table, positions)
        attend = self.kv_cache.decode_attention(page_table, num_computed + query_len, slot_mapping)
        x = decoder.embed_tokens(token_ids.flatten())
        flat = positions.flatten().to(torch.int32)
        if self.fused_decoder and len(x) <= MAX_ROWS:
            logits = self.fused_decoder(x, flat, attend)
        else:
            logits = decoder.logits(decoder(x, flat, attend))
        logits = logits.unflatten(0, (len(req_indices), query_len))
        sampled, num_accepted = batch.sample(req_indices, logits, token_ids, num_computed + 1, all_greedy)
        return SamplerOutput(sampled, num_accepted, logits)

    def _to_device(self, *tensors: Tensor) -> list[Tensor]:
        if self.input_batch.device.type != "cuda":
            return list(tensors)
        return [t.pin_memory().to(self.input_batch.device, non_blocking=True) for t in tensors]
