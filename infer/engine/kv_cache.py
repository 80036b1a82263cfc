"""The paged KV cache, in the model's dtype or in fp8, and the attention that writes and reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from infer.engine.config import EngineConfig
from phi4rv.batch import AttentionFn
from phi4rv.config import Config
from phi4rv.errors import UserError
from phi4rv.ops.low_precision import FP8_MAX
from phi4rv.ops.registry import Operations

CPU_CACHE_BYTES = 2 << 30
GPU_MEMORY_UTILIZATION = 0.9  # of the memory that is free, less ACTIVATION_BYTES
ACTIVATION_BYTES = 6 << 30


class PagedKVCache:
    """(layers, pages, page_size, G, D) keys and values. In fp8, value / scale is stored, clamped to e4m3's range; one
    float32 scale for each layer and head.
    """

    def __init__(
        self, config: Config, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device, ops: Operations
    ):
        self.ops, self.page_size, self.config = ops, page_size, config
        shape = (config.num_hidden_layers, num_pages, page_size, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.keys[:, 0], self.values[:, 0] = 0, 0  # the null page, which padding rows read
        self.fp8 = dtype == torch.float8_e4m3fn
        scales = (config.num_hidden_layers, config.num_key_value_heads)
        self.key_scales, self.value_scales = (torch.ones(scales, device=device) for _ in range(2))

    @staticmethod
    def bytes_per_token(config: Config, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def slot_mapping(self, page_table: Tensor, positions: Tensor) -> Tensor:
        """Slots (page * page_size + offset) of the tokens at ``positions`` (B, M): (B · M,) int64, by the page
        tables (B, max pages) of their documents; those beyond the table go to the null page.
        """
        index = positions // self.page_size
        pages = page_table.gather(1, index.clamp(max=page_table.shape[1] - 1).long())
        pages = pages.where(index < page_table.shape[1], 0)
        return (pages.long() * self.page_size + positions % self.page_size).flatten()

    def write(self, layer: int, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v (T, G, D) at ``slot_mapping`` (T,)."""
        for pages, new, scales in (
            (self.keys[layer], k, self.key_scales[layer]),
            (self.values[layer], v, self.value_scales[layer]),
        ):
            flat = pages.flatten(0, 1)
            if self.fp8:
                scaled = (new.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX)
                flat, new = flat.view(torch.uint8), scaled.to(pages.dtype).view(torch.uint8)
            flat.index_copy_(0, slot_mapping, new)

    def decode_attention(self, page_table: Tensor, seq_lens: Tensor, slot_mapping: Tensor) -> AttentionFn:
        """Attention of the last M tokens of B documents, packed as (B · M) rows. seq_lens (B,): these included."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.write(layer, slot_mapping, k, v)
            q = q.unflatten(0, (len(seq_lens), -1))
            pages = self.keys[layer], self.values[layer]
            operation = self.ops.paged_decode_attention
            return operation(q, *pages, page_table, seq_lens, *self._scales(layer)).flatten(0, 1)

        return attend

    def prefill_attention(
        self,
        page_table: Tensor,
        seq_lens: Tensor,
        slot_mapping: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        no_context: bool,
    ) -> AttentionFn:
        """Attention of packed chunks of new tokens, the last of ``seq_lens`` (B,) each. no_context: nothing precedes
        the chunks, so that the cache need not be read.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.write(layer, slot_mapping, k, v)
            if no_context and not self.fp8:  # in fp8 a prompt's tokens see each other as later ones will
                return self.ops.packed_attention(q, k, v, cu_seqlens, max_seqlen, causal=True)
            pages = self.keys[layer], self.values[layer]
            operation = self.ops.paged_prefill_attention
            return operation(q, *pages, page_table, seq_lens, cu_seqlens, max_seqlen, *self._scales(layer))

        return attend

    def scale_setting_attention(self) -> AttentionFn:
        """Causal attention of one document that stores nothing, and sets the fp8 scales to twice what its keys and
        values need: later ones may be larger.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for scales, new in ((self.key_scales, k), (self.value_scales, v)):
                scales[layer] = (new.abs().amax((0, 2)).float() * (2 / FP8_MAX)).clamp(min=1e-6)
            cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
            return self.ops.packed_attention(q, k, v, cu_seqlens, len(q), causal=True)

        return attend

    def _scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return (self.key_scales[layer], self.value_scales[layer]) if self.fp8 else (None, None)


def cache_capacity(config: Config, dtype: torch.dtype, device: torch.device, engine_config: EngineConfig) -> int:
    """Tokens that the KV cache is allocated for. UserError if the context window of one request does not fit."""
    tokens = engine_config.cache_tokens
    if tokens is None:
        budget = CPU_CACHE_BYTES
        if device.type == "cuda":
            torch.cuda.empty_cache()
            budget = int((torch.cuda.mem_get_info(device)[0] - ACTIVATION_BYTES) * GPU_MEMORY_UTILIZATION)
        tokens = min(budget // PagedKVCache.bytes_per_token(config, dtype), engine_config.max_running * config.context)
        if device.type != "cuda":
            tokens = max(tokens, config.context)
    if tokens < config.context and engine_config.cache_tokens is None:
        raise UserError(
            f"--cache-tokens: the GPU has room for {max(0, tokens)}, the model's window is {config.context}; "
            "free memory, or give --cache-dtype fp8 or --weights int4"
        )
    if tokens < config.context:
        raise UserError(f"--cache-tokens: {tokens} must be at least {config.context}, the model's window")
    return tokens
