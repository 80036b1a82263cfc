"""Keys and values in pages, in the model's dtype or in fp8, and the attention that fills and reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from infer.engine.config import Limits
from phi4rv.config import Config
from phi4rv.errors import UserError
from phi4rv.model.decoder import AttentionFn
from phi4rv.ops.low_precision import FP8_MAX
from phi4rv.ops.registry import Operations

CPU_BYTES = 2 << 30
GPU_SHARE, GPU_WORK = 0.9, 6 << 30  # of the memory that is free; bytes left of it for activations


class PagedCache:
    """(layers, pages, size, G, D) keys and values. In fp8 what is stored is value / scale, one scale for each layer and
    head, float32, and clamped to what e4m3 holds.
    """

    def __init__(
        self, config: Config, pages: int, size: int, dtype: torch.dtype, device: torch.device, ops: Operations
    ):
        self.ops, self.size, self.config = ops, size, config
        shape = (config.num_hidden_layers, pages, size, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.keys[:, 0], self.values[:, 0] = 0, 0  # the scratch page, which rows without a place read
        self.fp8 = dtype == torch.float8_e4m3fn
        scales = (config.num_hidden_layers, config.num_key_value_heads)
        self.key_scales, self.value_scales = (torch.ones(scales, device=device) for _ in range(2))

    @staticmethod
    def token_bytes(config: Config, dtype: torch.dtype) -> int:
        """Bytes that one token's keys and values take."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def rows(self, page_table: Tensor, positions: Tensor) -> Tensor:
        """Where the tokens at ``positions`` (B, M) go, (B · M,) int64, by the page tables (B, most pages) of their
        documents; those beyond the table go to the scratch page.
        """
        index = positions // self.size
        pages = page_table.gather(1, index.clamp(max=page_table.shape[1] - 1).long())
        pages = pages.where(index < page_table.shape[1], 0)
        return (pages.long() * self.size + positions % self.size).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v (T, G, D) to ``rows`` (T,)."""
        for pages, new, scales in (
            (self.keys[layer], k, self.key_scales[layer]),
            (self.values[layer], v, self.value_scales[layer]),
        ):
            flat = pages.flatten(0, 1)
            if self.fp8:
                scaled = (new.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX)
                flat, new = flat.view(torch.uint8), scaled.to(pages.dtype).view(torch.uint8)
            flat.index_copy_(0, rows, new)

    def decode(self, page_table: Tensor, lengths: Tensor, rows: Tensor) -> AttentionFn:
        """Attention of the last M tokens of B documents, packed as (B · M) rows. lengths (B,): these included."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.write(layer, rows, k, v)
            q = q.unflatten(0, (len(lengths), -1))
            pages = self.keys[layer], self.values[layer]
            return self.ops.paged_decode_attention(q, *pages, page_table, lengths, *self._scales(layer)).flatten(0, 1)

        return attend

    def prefill(
        self, page_table: Tensor, lengths: Tensor, rows: Tensor, cu_seqlens: Tensor, max_seqlen: int, whole: bool
    ) -> AttentionFn:
        """Attention of packed runs of new tokens, the last of ``lengths`` (B,) each. whole: the runs are all there is
        of their documents, and need not be read back.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.write(layer, rows, k, v)
            if whole and not self.fp8:  # in fp8 a prompt's rows see each other as later ones will
                return self.ops.packed_attention(q, k, v, cu_seqlens, max_seqlen, causal=True)
            pages = self.keys[layer], self.values[layer]
            operation = self.ops.paged_prefill_attention
            return operation(q, *pages, page_table, lengths, cu_seqlens, max_seqlen, *self._scales(layer))

        return attend

    def calibrate(self) -> AttentionFn:
        """Causal attention of one document that writes nothing, and sets the scales to twice what its keys and values
        need: later ones may be larger.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for scales, new in ((self.key_scales, k), (self.value_scales, v)):
                scales[layer] = (new.abs().amax((0, 2)).float() * (2 / FP8_MAX)).clamp(min=1e-6)
            cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
            return self.ops.packed_attention(q, k, v, cu_seqlens, len(q), causal=True)

        return attend

    def _scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return (self.key_scales[layer], self.value_scales[layer]) if self.fp8 else (None, None)


def cache_tokens(config: Config, dtype: torch.dtype, device: torch.device, limits: Limits) -> int:
    """Tokens that a cache is made for. UserError if the window of one request does not fit."""
    tokens = limits.cache_tokens
    if tokens is None:
        room = CPU_BYTES
        if device.type == "cuda":
            torch.cuda.empty_cache()
            room = int((torch.cuda.mem_get_info(device)[0] - GPU_WORK) * GPU_SHARE)
        tokens = min(room // PagedCache.token_bytes(config, dtype), limits.max_running * config.context)
        if device.type != "cuda":
            tokens = max(tokens, config.context)
    if tokens < config.context and limits.cache_tokens is None:
        raise UserError(
            f"--cache-tokens: the GPU has room for {max(0, tokens)}, the model's window is {config.context}; "
            "free memory, or give --cache-dtype fp8 or --weights int4"
        )
    if tokens < config.context:
        raise UserError(f"--cache-tokens: {tokens} must be at least {config.context}, the model's window")
    return tokens
