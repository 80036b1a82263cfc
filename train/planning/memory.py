"""Memory of a training step, computed from the configuration: nothing here was measured.

GPUs share what ``Setting.shard`` says: the optimizer's state, also gradients, also weights (ZeRO stages 1, 2 and 3,
Rajbhandari et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from torch import nn

from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.config import DTYPES, Config
from phi4rv.ops.low_precision import GROUP_SIZE, MOMENT_BLOCK
from train.distributed.fsdp import SHARDS
from train.recipe import Stage
from train.trainer import trainable

# Bytes of a decoder weight that stays as it is, by ``recipe.FROZEN``: with a float32 scale a row, counted as nothing,
# or with a bfloat16 scale, and a byte for the zero, a group.
FROZEN = {"dtype": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / GROUP_SIZE, "int4_zero": 0.5 + 3 / GROUP_SIZE}
WEIGHT, SUM, MASTER, MOMENTS = 2, 4, 4, 8  # bytes of a bfloat16 weight, a float32 gradient sum, master, two moments
MOMENTS8 = 2 * (1 + 4 / MOMENT_BLOCK)
LOSS_COLUMNS = 4096  # of the vocabulary, whose logits' gradients are held at one time (linear_cross_entropy)


@dataclass(frozen=True)
class Setting:
    """How a run is laid out. rows: packed sequences that a GPU takes at a time. lora_rank 0: no adapters."""

    gpus: int = 1
    shard: str = "optimizer"
    checkpointing: str = "none"
    rows: int = 1
    optimizer: str = "adamw"
    lora_rank: int = 0
    frozen_weights: str = "dtype"


@dataclass(frozen=True)
class Data:
    """Means of a sample: tokens (those under its image included), patches of its one image, tokens with a label."""

    samples: float
    tokens: float
    patches: float
    labelled: float


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, trained, in the decoder's linear layers, in the largest unit that is gathered
    alone (the output layer) and in a decoder layer; and the sum of inputs and outputs of the decoder's linear layers.
    """

    all: int
    trained: int
    linear: int
    largest: int
    layer: int
    ends: int

    @staticmethod
    @cache
    def of(config: Config, stage: Stage) -> Sizes:
        """Counted on the meta device: nothing is allocated."""
        model = empty_model(config, "cpu", DTYPES[config.dtype], "torch")
        named = trainable(model, stage)
        layers = list(model.decoder.layers)
        linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
        units = [*layers, *model.vision.layers(), model.decoder.embed_tokens, model.decoder.lm_head, model.projector]
        return Sizes(
            all=_count(model.parameters()),
            trained=_count(named.values()),
            linear=sum(m.weight.numel() for m in linear),
            largest=max(_count(unit.parameters()) for unit in units),
            layer=_count(layers[0].parameters()),
            ends=sum(m.in_features + m.out_features for m in linear),
        )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def zero(
    parameters: float, gpus: int, shard: str, weights: float = WEIGHT, gradients: float = SUM, state: float = 12
) -> dict[str, float]:
    """Bytes of a GPU by kind (Rajbhandari et al. 2020, figure 1), ``weights``, ``gradients`` and ``state`` (masters
    and moments) bytes a parameter.
    """
    level = SHARDS.index(shard)  # ZeRO's stage
    return {
        "weights": weights * parameters / (gpus if level >= 3 else 1),
        "gradients": gradients * parameters / (gpus if level >= 2 else 1),
        "state": state * parameters / (gpus if level >= 1 else 1),
    }


def memory(config: Config, stage: Stage, sizes: Sizes, data: Data, setting: Setting) -> dict[str, float]:
    """Bytes of a GPU by kind.

    ``buffers``: gradients of the largest unit in bfloat16 and, shared, in float32 on their way to the sum; under
    ``full`` also the weights of two units, the one at work and the one fetched ahead. Gradients are taken to leave a
    unit as soon as they are there. Not counted: the CUDA context, NCCL's buffers and fragmentation.
    """
    n, lora = setting.gpus, setting.lora_rank
    trained = lora * sizes.ends if lora else sizes.trained
    frozen = sizes.all - (0 if lora else trained)
    quantized = sizes.linear if lora else 0  # adapters leave the decoder's linear layers as they are
    kept = WEIGHT * (frozen - quantized) + FROZEN[setting.frozen_weights] * quantized
    unit = 0 if lora or not trained else min(sizes.largest, trained)
    if setting.optimizer == "layerwise":
        model = {"weights": WEIGHT * trained + kept, "masters": 0, "gradients": 0, "moments": MOMENTS8 * trained}
    else:
        parts = zero(trained, n, setting.shard, state=MASTER + MOMENTS)
        model = {
            "weights": parts["weights"] + kept / (n if setting.shard == "full" else 1),
            "masters": parts["state"] * MASTER / (MASTER + MOMENTS),
            "gradients": parts["gradients"],
            "moments": parts["state"] * MOMENTS / (MASTER + MOMENTS),
        }
    buffers = unit * (WEIGHT + (SUM if n > 1 else 0))
    if setting.shard == "full" and n > 1:
        buffers += WEIGHT * (sizes.largest + sizes.layer)
    tokens = setting.rows * stage.sequence_length
    weights_train = bool(lora) or "decoder" in stage.trains
    tower = "vision" in stage.trains and not lora
    return {
        **model,
        "activations": activations(config, tokens, tokens * data.patches / data.tokens, setting, weights_train, tower),
        "loss": tokens * WEIGHT * (min(LOSS_COLUMNS, config.vocab_size) + config.hidden_size),
        "buffers": buffers,
    }


def decoder_layer_bytes(config: Config, checkpointing: str, inputs: bool = True) -> int:
    """That a token leaves behind in a decoder layer for the backward pass, in bfloat16, by the kernels' own lists
    (``triton_kernels``: norms keep the residual sum, rotation nothing, attention q, k, v, its output and a float32 a
    head, SwiGLU its input; a linear layer whose weight, or adapter, is trained keeps its input: ``inputs``).

    ``selective`` keeps what products and attention put out, and computes norms, rotation and SwiGLU again. ``full``
    keeps the layer's input and the residual, ``offload`` keeps them in the CPU's memory.
    """
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    qkv = (heads + 2 * config.num_key_value_heads) * config.head_dim
    attended = heads * config.head_dim
    if checkpointing == "offload":
        return 0
    if checkpointing == "full":
        return WEIGHT * 2 * hidden
    if checkpointing == "selective":  # o_proj's and down_proj's outputs, and the residual
        return WEIGHT * (3 * hidden + qkv + attended + 2 * wide) + 4 * heads
    kept = 2 * hidden + qkv + attended + 2 * wide
    return WEIGHT * (kept + (2 * hidden + wide if inputs else 0)) + 4 * (heads + 2)


def vision_layer_bytes(config: Config, checkpointing: str) -> int:
    """That a patch leaves behind in a layer of the tower; as ``decoder_layer_bytes``."""
    hidden, wide, heads = config.vision.hidden_size, config.vision.intermediate_size, config.vision.num_attention_heads
    if checkpointing == "offload":
        return 0
    if checkpointing == "full":
        return WEIGHT * hidden
    if checkpointing == "selective":  # input, q, k, v, attended, out_proj's, fc1's; the next layer's input is its own
        return WEIGHT * (6 * hidden + wide) + 4 * heads
    # Both norms' inputs and outputs, q, k, v, attended; fc1's output and GELU's.
    return WEIGHT * (8 * hidden + 2 * wide) + 4 * (heads + 4)


def activations(
    config: Config, tokens: float, patches: float, setting: Setting, inputs: bool = True, tower: bool = True
) -> float:
    """Bytes that the layers leave behind, the most that one layer computes again, and the rows around the layers."""
    kind = setting.checkpointing
    one, whole = (decoder_layer_bytes(config, k, inputs) for k in (kind, "none"))
    total = tokens * (config.num_hidden_layers * one + max(0, whole - one))
    if tower:
        total += patches * (config.vision.num_hidden_layers - 1) * vision_layer_bytes(config, kind)
    # Embeddings with the projected patches in them, the final norm's input and output; the projector's input.
    return total + WEIGHT * (3 * tokens * config.hidden_size + patches * config.vision.hidden_size)
