"""Model FLOPs of a sample: those that its forward and backward matrix products need, and no others.

A multiply-add counts as two. Only matrix products count (not norms, rotary embedding, softmax, activations or the
position table's interpolation), each as often as the mathematics requires: no padding, no recomputation (activation
checkpointing, attention scores in the backward pass), no output layer on tokens without a label, no upper triangle of
causal attention. MFU divides the sum by time, and ranks are balanced by it.

Notation, from the configuration: C hidden size, I intermediate size, L layers, H heads and G key heads of
dimension D, V vocabulary; c, i, l the same of the tower, of which l - 1 layers run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from phi4rv.config import Config
from phi4rv.processing.images import PATCH_DIM


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and of a backward pass."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


def flops(
    config: Config,
    tokens: Sequence[int],
    patches: Sequence[int] = (),
    labelled: int = 0,
    trains: Collection[str] = ("vision", "projector", "decoder"),
) -> Flops:
    """Of one packed row, or of any number of rows together: the sum of ``flops_by_part``.

    tokens: the length of each document, the positions under its images included. patches: of each image. labelled:
    how many tokens have a target. trains: the parts that the stage trains (``Stage.trains``); () is inference, with
    the output layer on ``labelled`` tokens.
    """
    return sum(flops_by_part(config, tokens, patches, labelled, trains).values(), Flops())


def flops_by_part(
    config: Config,
    tokens: Sequence[int],
    patches: Sequence[int] = (),
    labelled: int = 0,
    trains: Collection[str] = ("vision", "projector", "decoder"),
) -> dict[str, Flops]:
    """``flops`` of each part, with T tokens, P patches, and n the length of a document or image:

    =================== ==================================================
    part                forward FLOPs
    =================== ==================================================
    patch_embed         2 · P · 768 · c
    vision_linear       2 · P · (l - 1) · (4 c² + 2 c i)
    vision_attention    4 · Σ n² · (l - 1) · c
    projector           2 · P · (c C + C²)
    decoder_linear      2 · T · L · (C (H + 2 G) D + H D C + 3 C I)
    decoder_attention   4 · Σ n (n + 1) / 2 · L · H · D
    lm_head             2 · labelled · C · V
    =================== ==================================================

    Backward, a product x Wᵀ costs its forward once for W's gradient, where W is trained, and once for x's, where
    something before it is trained. Attention costs its forward twice (dV, dP, dQ, dK: four products for two) where
    something before it is trained. Where nothing is trained before the decoder's end, as in stage 1 for a row without
    an image, nothing runs backward. The parts are in the order of the table.
    """
    v, all_tokens, all_patches = config.vision, sum(tokens), sum(patches)
    layers, wide, heads = v.num_hidden_layers - 1, v.hidden_size, config.num_attention_heads * config.head_dim
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    squares = sum(n * n for n in patches)
    triangles = sum(n * (n + 1) // 2 for n in tokens)
    vision = "vision" in trains and all_patches > 0  # whether there is anything to train before …
    projector = vision or ("projector" in trains and all_patches > 0)
    decoder = projector or "decoder" in trains

    def product(multiplications: int, trained: bool, before: bool) -> Flops:
        return Flops(2 * multiplications, 2 * multiplications * (trained + before))

    def attention(multiplications: int, before: bool) -> Flops:
        return Flops(2 * multiplications, 4 * multiplications * before)

    into, out = wide * hidden * all_patches, hidden * hidden * all_patches
    layer = hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * config.intermediate_size
    return {
        "patch_embed": product(all_patches * PATCH_DIM * wide, vision, False),
        "vision_linear": product(
            all_patches * layers * (4 * wide * wide + 2 * wide * v.intermediate_size), vision, vision
        ),
        "vision_attention": attention(2 * squares * layers * wide, vision),
        "projector": product(into, "projector" in trains, vision) + product(out, "projector" in trains, projector),
        "decoder_linear": product(all_tokens * config.num_hidden_layers * layer, "decoder" in trains, decoder),
        "decoder_attention": attention(2 * triangles * config.num_hidden_layers * heads, decoder),
        "lm_head": product(labelled * hidden * config.vocab_size, "decoder" in trains, decoder),
    }
