"""The Phi-3 decoder on one packed row of tokens (Abdin et al. 2024)."""

from __future__ import annotations

from torch import Tensor, nn

from phi4rv.batch import AttentionFn
from phi4rv.config import Config
from phi4rv.model.activation_checkpointing import CheckpointFn, no_checkpointing
from phi4rv.ops.reference import rope_table
from phi4rv.ops.registry import Operations


class Decoder(nn.Module):
    def __init__(self, config: Config, ops: Operations):
        super().__init__()
        self.config, self.ops = config, ops
        self.checkpoint_fn: CheckpointFn = no_checkpointing
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, attention_fn: AttentionFn) -> Tensor:
        """Embeddings (T, C) at positions (T,) -> the final norm's output (T, C), the input of ``lm_head``."""
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        residual = None
        for layer in self.layers:
            x, residual = self.checkpoint_fn(layer, x, residual, cos, sin, attention_fn)
        return self.ops.rms_norm(x, self.norm.weight, self.config.rms_norm_eps, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, C) -> (T, V) float32."""
        return self.lm_head(hidden).float()


class DecoderLayer(nn.Module):
    """Pre-norm attention with grouped queries, then SwiGLU. The residual sum is carried beside the branch so that
    each norm adds and normalises in one pass.
    """

    def __init__(self, config: Config, ops: Operations, index: int):
        super().__init__()
        self.ops, self.eps = ops, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(config.hidden_size, self.eps)
        self.self_attn = SelfAttention(config, ops, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, self.eps)
        self.mlp = MLP(config, ops)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, attention_fn: AttentionFn
    ) -> tuple[Tensor, Tensor]:
        h, residual = self.ops.rms_norm(x, self.input_layernorm.weight, self.eps, residual)
        h = self.self_attn(h, cos, sin, attention_fn)
        h, residual = self.ops.rms_norm(h, self.post_attention_layernorm.weight, self.eps, residual)
        return self.mlp(h), residual


class SelfAttention(nn.Module):
    def __init__(self, config: Config, ops: Operations, index: int):
        super().__init__()
        self.ops, self.index, self.head_dim = ops, index, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, attention_fn: AttentionFn) -> Tensor:
        qkv = self.qkv_proj(h).view(len(h), self.heads + 2 * self.kv_heads, self.head_dim)
        qkv = self.ops.rope(qkv, cos, sin, self.heads + self.kv_heads)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return self.o_proj(attention_fn(self.index, q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Config, ops: Operations):
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(self.ops.swiglu(self.gate_up_proj(h)))


def packed_attention_fn(ops: Operations, cu_seqlens: Tensor, max_seqlen: int) -> AttentionFn:
    """Causal attention inside each document of the row."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.packed_attention(q, k, v, cu_seqlens, max_seqlen, causal=True)

    return attend
