"""The decoder for a few rows: four products a layer, fused with norms, residuals and SwiGLU (``decode_gemv``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from phi4rv.batch import AttentionFn
from phi4rv.model.decoder import Decoder
from phi4rv.ops import cuda
from phi4rv.ops.low_precision import QuantizedWeight
from phi4rv.ops.reference import rope_table

MAX_ROWS = 8  # of decode_gemv

Weight = Tensor | QuantizedWeight | cuda.RepackedWeight


class FusedDecoder:
    """``Decoder`` and its ``logits`` for at most MAX_ROWS rows, on the same weights."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.ops = decoder, decoder.ops
        self.blocks: list[Any] = list(decoder.layers)
        self.layers = [
            [
                self._weight(layer)
                for layer in (b.self_attn.qkv_proj, b.self_attn.o_proj, b.mlp.gate_up_proj, b.mlp.down_proj)
            ]
            for b in self.blocks
        ]
        self.head = self._weight(decoder.lm_head)

    def _weight(self, layer: Any) -> Weight:
        """In the layout of the chosen ``decode_gemv``; csrc/'s has its own for quantised weights."""
        weight = getattr(layer, "quantized", None)
        if weight is None:
            unquantised: Tensor = layer.weight.detach()
            return unquantised
        return cuda.repack(weight) if self.ops.backends["decode_gemv"] == "cuda" else weight

    def __call__(self, x: Tensor, positions: Tensor, attend: AttentionFn) -> Tensor:
        """Embeddings (T, C) at positions (T,) -> logits (T, V) float32, T at most MAX_ROWS."""
        config, gemv, eps = self.decoder.config, self.ops.decode_gemv, self.decoder.config.rms_norm_eps
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta)
        for index, (block, (qkv, o, gate_up, down)) in enumerate(zip(self.blocks, self.layers, strict=True)):
            h = gemv(x, qkv, norm=block.input_layernorm.weight, eps=eps).view(len(x), -1, config.head_dim)
            q, k, v = self.ops.rope(h, cos, sin, heads + groups).split([heads, groups, groups], 1)
            h = attend(index, q, k, v).flatten(1)
            x = gemv(h, o, residual=x)
            h = gemv(x, gate_up, norm=block.post_attention_layernorm.weight, eps=eps, swiglu=True)
            x = gemv(h, down, residual=x)
        logits: Tensor = gemv(x, self.head, norm=self.decoder.norm.weight, eps=eps)
        return logits.float()


def is_supported(decoder: Decoder) -> bool:
    """Whether the chosen ``decode_gemv`` supports these layers: csrc/'s needs 16-bit activations and certain widths."""
    if decoder.ops.backends["decode_gemv"] != "cuda":
        return True
    config = decoder.config
    columns = (config.hidden_size, config.intermediate_size)
    rows = ((config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim, config.vocab_size)
    even = all(n % 32 == 0 for n in columns) and all(n % 8 == 0 for n in rows)
    return even and decoder.norm.weight.dtype in (torch.bfloat16, torch.float16)
