"""The SigLIP2 NaFlex vision tower on packed patches (Tschannen et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phi4rv.batch import PackedBatch
from phi4rv.config import VisionConfig
from phi4rv.model.activation_checkpointing import CheckpointFn, no_checkpointing
from phi4rv.ops.registry import Operations
from phi4rv.processing.images import PATCH_DIM


class VisionTower(nn.Module):
    """Patches to features. Runs all layers but the last, whose input is what the language model was trained on
    (``hidden_states[-2]``). The last layer, ``post_layernorm`` and ``head`` are held so that a checkpoint survives.
    """

    def __init__(self, config: VisionConfig, ops: Operations):
        super().__init__()
        self.ops = ops
        self.checkpoint_fn: CheckpointFn = no_checkpointing
        self.embeddings = PatchEmbeddings(config, ops)
        layers = nn.ModuleList(VisionLayer(config, ops) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = PoolingHead(config, ops)

    def forward(self, batch: PackedBatch) -> Tensor:
        """(P, 768) patches of the batch -> (P, C) features in the weights' dtype."""
        x = self.embeddings(batch.patches, batch.grids)
        for layer in self.layers()[:-1]:
            x = self.checkpoint_fn(layer, x, batch.cu_patches, batch.max_patches)
        return x

    def layers(self) -> list[nn.Module]:
        return list(self.encoder["layers"].children())

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that no forward pass reads."""
        unused = (self.layers()[-1], self.post_layernorm, self.head)
        return [p for module in unused for p in module.parameters()]


class PatchEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig, ops: Operations):
        super().__init__()
        self.ops = ops
        self.patch_embedding = nn.Linear(PATCH_DIM, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        proj, table = self.patch_embedding, self.position_embedding.weight
        return self.ops.patch_embed(patches, proj.weight, proj.bias, table, grids)


class VisionLayer(nn.Module):
    """Pre-norm bidirectional attention inside each image, then a tanh-GELU MLP."""

    def __init__(self, config: VisionConfig, ops: Operations):
        super().__init__()
        self.ops, self.eps = ops, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config, ops)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config, ops)

    def forward(self, x: Tensor, cu_patches: Tensor, max_patches: int) -> Tensor:
        x = x + self.self_attn(self._norm(self.layer_norm1, x), cu_patches, max_patches)
        return x + self.mlp(self._norm(self.layer_norm2, x))

    def _norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, norm.weight, norm.bias, self.eps)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig, ops: Operations):
        super().__init__()
        self.ops = ops
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, cu_patches: Tensor, max_patches: int) -> Tensor:
        q, k, v = (p(x).view(-1, self.heads, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = self.ops.packed_attention(q, k, v, cu_patches, max_patches, causal=False)
        return self.out_proj(out.flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig, ops: Operations):
        super().__init__()
        self.ops = ops
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ops.gelu_tanh(self.fc1(x)))


class PoolingHead(nn.Module):
    """SigLIP2's attention-pooling head: weights only, the language model does not read it."""

    def __init__(self, config: VisionConfig, ops: Operations):
        super().__init__()
        width = config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = VisionMLP(config, ops)
