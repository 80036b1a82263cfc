"""The two passes of the model that an engine makes: a packed pass over chunks of prompts, and a decode step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.engine.cuda_graphs import Graphs
from infer.engine.fused_decoder import ROWS, FusedDecoder
from infer.engine.input_batch import Slots
from infer.engine.kv_cache import PagedCache
from infer.engine.prompt_lookup import lookup
from infer.engine.sampler import logprobs
from infer.engine.scheduler import Running
from infer.requests.request import TokenLogprob
from phi4rv.batch import image_batch
from phi4rv.model.phi4rv import Phi4RV

TOWER_PATCHES = 16384  # patches of one pass of the tower


@dataclass(frozen=True)
class Chunk:
    """Rows begin : begin + T of a document. ids (T,) int64, any under images; features: pieces (P, C) of projected
    images and their places (P,) in the chunk. last: the document's known tokens end here.
    """

    slot: int
    begin: int
    ids: Tensor
    features: Sequence[tuple[Tensor, Tensor]]
    last: bool


@dataclass(frozen=True)
class Chosen:
    """What a pass chose, on the device: tokens (B, M) int64, how many count (B,), and the logits (B, M, V) float32."""

    tokens: Tensor
    counted: Tensor
    logits: Tensor


class Pending:
    """A pass that was launched for ``entries``, and the copies of what it chose, under way to the host.

    width: tokens of each entry at most. top: None, or how many log-probabilities beside the chosen token's. timed:
    batch size, whether it drafted, and when it began, if it counts for ``speculation.Payoff``.
    """

    def __init__(
        self,
        chosen: Chosen,
        entries: list[Running],
        width: int,
        top: int | None,
        timed: tuple[int, bool, float] | None,
    ):
        self.entries, self.width, self.timed = entries, width, timed
        count = len(entries)
        tokens = chosen.tokens[:count]
        results = [tokens, chosen.counted[:count]]
        if top is not None:
            results += logprobs(chosen.logits[:count].flatten(0, 1), tokens.flatten(), top)
        self._copies, self._event = results, None
        if tokens.is_cuda:
            self._copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in results]
            for copy, result in zip(self._copies, results, strict=True):
                copy.copy_(result, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[list[int]], list[int], list[list[TokenLogprob]] | None]:
        """Waits for the copies: tokens (B, M), how many count (B), and log-probabilities if they are asked for."""
        if self._event is not None:
            self._event.synchronize()
        tokens, counted, *rest = (t.tolist() for t in self._copies)
        if not rest:
            return tokens, counted, None
        told = [
            TokenLogprob(token, own, tuple(zip(ids, values, strict=True)))
            for token, own, ids, values in zip((t for row in tokens for t in row), *rest, strict=True)
        ]
        return tokens, counted, [told[i : i + self.width] for i in range(0, len(told), self.width)]


class Steps:
    def __init__(self, model: Phi4RV, fused: FusedDecoder | None, cache: PagedCache, slots: Slots, graphs: Graphs):
        self.model, self.fused, self.cache, self.slots, self.graphs = model, fused, cache, slots, graphs
        self._which: dict[tuple[int, int, bool], Tensor] = {}

    def encode_images(self, images: Sequence[tuple[Tensor, tuple[int, int]]]) -> list[Tensor]:
        """Patches (P, 768) and grid of each image -> its projected features (P, C)."""
        out: list[Tensor] = []
        group: list[tuple[Tensor, tuple[int, int]]] = []
        for index, image in enumerate(images):
            group.append(image)
            patches = sum(len(p) for p, _ in group)
            if index + 1 == len(images) or patches + len(images[index + 1][0]) > TOWER_PATCHES:
                batch = image_batch(*zip(*group, strict=True)).to(self.slots.device, non_blocking=True)
                out += self.model.encode_images(batch).split([len(p) for p, _ in group])
                group = []
        return out

    def prefill(self, chunks: Sequence[Chunk], plain: bool) -> Chosen | None:
        """Runs the chunks and, for those that are ``last``, chooses the next token: B of them, M = 1."""
        model, slots = self.model, self.slots
        lengths = torch.tensor([len(c.ids) for c in chunks])
        begins = torch.tensor([c.begin for c in chunks])
        ends = lengths.cumsum(0)
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        positions = torch.cat([torch.arange(c.begin, c.begin + len(c.ids)) for c in chunks])
        document = torch.repeat_interleave(torch.arange(len(chunks)), lengths)
        last = [n for n, c in enumerate(chunks) if c.last]
        which, positions, document, cu_seqlens, known, ids, final = self._moved(
            torch.tensor([c.slot for c in chunks]),
            positions,
            document,
            cu_seqlens,
            begins + lengths,
            torch.cat([c.ids for c in chunks]),
            torch.tensor(last, dtype=torch.int64),
        )
        x = model.decoder.embed_tokens(ids)
        for chunk, offset in zip(chunks, (ends - lengths).tolist(), strict=True):
            for features, places in chunk.features:
                x = model.ops.scatter_rows(x, features, self._moved(places + offset)[0])
        tables = slots.page_table[which, : -(-int((begins + lengths).max()) // self.cache.size)]
        rows = self.cache.rows(tables[document], positions[:, None])
        whole = not any(c.begin for c in chunks)
        attend = self.cache.prefill(tables, known, rows, cu_seqlens, int(lengths.max()), whole)
        hidden = model.decoder(x, positions.to(torch.int32), attend)
        if not last:
            return None
        logits = model.decoder.logits(hidden[cu_seqlens[1:].long()[final] - 1])[:, None]
        ready, begin = which[final], known[final]
        newest = slots.tokens[ready].gather(1, (begin - 1)[:, None])
        tokens, counted = slots.choose(ready, logits, newest, begin, plain)
        return Chosen(tokens, counted, logits)

    def bucket(self, count: int) -> int:
        """The batch size of a step for ``count`` slots: 1, 2, 4 or a multiple of 8 where graphs are recorded."""
        if not self.graphs.enabled:
            return count
        return min(self.slots.count, next((n for n in (1, 2, 4) if count <= n), -(-count // 8) * 8))

    def decode(self, numbers: Sequence[int], width: int, plain: bool) -> tuple[Chosen, bool]:
        """One step of the slots ``numbers``, width tokens each at most; what it chose has their rows first. And whether
        it took the time that such steps take from now on.
        """
        return self._run((self.bucket(len(numbers)), width, plain), numbers)

    def warm_up(self, widths: Sequence[int]) -> None:
        """Records the graph of every batch size, so that no request waits for it; all slots of these are nobody's."""
        sizes = {self.bucket(count) for count in range(1, self.slots.count + 1)} if self.graphs.enabled else ()
        for key in itertools.product(sorted(sizes, reverse=True), widths, (True, False)):
            while not self.graphs.settled(key):
                self._run(key, ())

    def _run(self, key: tuple[int, int, bool], numbers: Sequence[int]) -> tuple[Chosen, bool]:
        _, width, plain = key
        which = torch.tensor([*numbers, *[self.slots.count] * (key[0] - len(numbers))])
        settled = self.graphs.settled(key)
        if not self.graphs.enabled:
            return self.graphs.run(key, lambda: self._decode(self._moved(which)[0], width, plain)), settled
        if key not in self._which:
            self._which[key] = torch.empty(key[0], dtype=torch.int64, device=self.slots.device)
        static = self._which[key]
        static.copy_(which.pin_memory(), non_blocking=True)
        return self.graphs.run(key, lambda: self._decode(static, width, plain)), settled

    def _decode(self, which: Tensor, width: int, plain: bool) -> Chosen:
        """The newest token and width - 1 drafts of each slot of ``which`` (B,) int64, all on the device."""
        slots, decoder = self.slots, self.model.decoder
        history, lengths = slots.tokens[which], slots.lengths[which]
        newest = history.gather(1, lengths[:, None])
        drafts = newest if width == 1 else torch.cat([newest, lookup(history, lengths + 1, width - 1)], 1)
        drafts = drafts.clamp(min=0)  # what followed may be an image
        positions = lengths[:, None] + torch.arange(width, device=which.device)
        table = slots.page_table[which]
        attend = self.cache.decode(table, lengths + width, self.cache.rows(table, positions))
        x = decoder.embed_tokens(drafts.flatten())
        flat = positions.flatten().to(torch.int32)
        if self.fused and len(x) <= ROWS:
            logits = self.fused(x, flat, attend)
        else:
            logits = decoder.logits(decoder(x, flat, attend))
        logits = logits.unflatten(0, (len(which), width))
        tokens, counted = slots.choose(which, logits, drafts, lengths + 1, plain)
        return Chosen(tokens, counted, logits)

    def _moved(self, *tensors: Tensor) -> list[Tensor]:
        if self.slots.device.type != "cuda":
            return list(tensors)
        return [t.pin_memory().to(self.slots.device, non_blocking=True) for t in tensors]
