"""The whole model: packed patches and tokens in, logits or loss out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phi4rv.batch import AttentionFn, PackedBatch
from phi4rv.config import Config
from phi4rv.model.activation_checkpointing import CHECKPOINT_FNS, full_checkpointing, no_checkpointing
from phi4rv.model.decoder import Decoder, packed_attention_fn
from phi4rv.model.projector import Projector
from phi4rv.model.vision import VisionTower
from phi4rv.ops.reference import NO_LABEL
from phi4rv.ops.registry import Operations

# Rows whose logits are held at a time where activations are recomputed.
LOSS_CHUNK_ROWS = 1024


class Phi4RV(nn.Module):
    """Phi-4-reasoning-vision: ``vision`` -> ``projector`` -> ``decoder``, all on packed rows."""

    def __init__(self, config: Config, ops: Operations):
        super().__init__()
        self.config, self.ops = config, ops
        self.vision = VisionTower(config.vision, ops)
        self.projector = Projector(config, ops)
        self.decoder = Decoder(config, ops)
        for parameter in self.vision.unused_parameters():
            parameter.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    def set_checkpointing(self, kind: str) -> None:
        """What every layer of tower and decoder saves for its backward pass, one of
        ``activation_checkpointing.CHECKPOINTING``: everything, the outputs of matrix products and attention, only its
        input, or its input in CPU memory. But for ``none`` the loss is recomputed too. The numbers are the same, but
        for the order in which the loss of more than LOSS_CHUNK_ROWS rows is then summed.
        """
        self.vision.checkpoint_fn = self.decoder.checkpoint_fn = CHECKPOINT_FNS[kind]

    def compile_layers(self, backend: str = "inductor") -> None:
        """The layers of tower and decoder by ``torch.compile``, for rows of any length. The same numbers, but for
        rounding. Their ``forward`` alone, so that what gathers weights around it (FSDP2) stays outside. Not with
        ``selective`` checkpointing, which finds no operators in compiled code.
        """
        for layer in [*self.vision.layers()[:-1], *self.decoder.layers]:
            layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)

    def encode_images(self, batch: PackedBatch) -> Tensor:
        """(P, C): projected patches in patch order; (0, C) without images."""
        if not len(batch.patches):
            return self.decoder.embed_tokens.weight.new_empty(0, self.config.hidden_size)
        return self.projector(self.vision(batch))

    def hidden(self, batch: PackedBatch, attention_fn: AttentionFn | None = None) -> Tensor:
        """(T, C): the input of the output layer. ``attention_fn`` replaces packed causal attention (KV cache)."""
        x = self.decoder.embed_tokens(batch.input_ids)
        if len(batch.patches):
            # Ids under images are placeholders: their embeddings get no gradient, which project_into sees to.
            x = self.projector.project_into(x, batch.drop_dummy_patches(self.vision(batch)), batch.image_positions)
        attention_fn = attention_fn or packed_attention_fn(self.ops, batch.cu_seqlens, batch.max_seqlen)
        return self.decoder(x, batch.positions, batch.distribute_attention(attention_fn))

    def forward(self, batch: PackedBatch) -> Tensor:
        """(T, V) float32 logits of every position."""
        return self.decoder.logits(self.hidden(batch))

    def loss_sum(self, batch: PackedBatch, marked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Summed cross entropy over the labelled tokens (float32) and their count (int64); with ``marked`` (T,) bool
        also the sum over the rows that it marks, without gradient.
        """
        hidden, weight, targets = self.hidden(batch), self.decoder.lm_head.weight, batch.targets()
        cross_entropy = self.ops.linear_cross_entropy
        if (
            self.decoder.checkpoint_fn is no_checkpointing or self.ops.backends["linear_cross_entropy"] != "torch"
        ):  # kernels hold no logits
            return cross_entropy(hidden, weight, targets, marked=marked)
        rows, labels = hidden.split(LOSS_CHUNK_ROWS), targets.split(LOSS_CHUNK_ROWS)
        marks = [None] * len(rows) if marked is None else marked.split(LOSS_CHUNK_ROWS)
        pieces = zip(rows, labels, marks, strict=True)
        sums = zip(*(full_checkpointing(cross_entropy, h, weight, t, 0.0, m) for h, t, m in pieces), strict=True)
        return tuple(torch.stack(parts).sum() for parts in sums)

    def loss_sum_by_mode(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """``loss_sum``'s first, and (4,) float64 without gradient: loss and labelled tokens, of all documents and then
        of those that reason.
        """
        marked = batch.reasoning_rows()
        total, count, reasoning = self.loss_sum(batch, marked)
        reasoned = ((batch.targets() != NO_LABEL) & marked).sum()
        return total, torch.stack([x.detach().double() for x in (total, count, reasoning, reasoned)])

    def loss(self, batch: PackedBatch) -> Tensor:
        """Mean over the labelled tokens of this batch; nan if there is none."""
        total, count = self.loss_sum(batch)
        return total / count
