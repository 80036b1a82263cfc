"""Memory of a training step, computed from the configuration: not measured.

``RunConfig.shard`` says what is sharded: optimizer states, also gradients, also weights (ZeRO stages 1, 2 and 3,
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
from train.trainable import set_trainable

# Bytes of a frozen decoder weight, by ``recipe.FROZEN``: int8 and fp8 with a float32 scale a row, which is neglected,
# int4 with a bfloat16 scale a group, and a byte for the zero point.
FROZEN_BYTES = {"dtype": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / GROUP_SIZE, "int4_zero": 0.5 + 3 / GROUP_SIZE}
WEIGHT_BYTES, GRADIENT_BYTES, MASTER_BYTES = 2, 4, 4  # bfloat16 weight, float32 gradient sum, float32 master
MOMENT_BYTES, MOMENT8_BYTES = (
    8,
    2 * (1 + 4 / MOMENT_BLOCK),
)  # two moments: float32, or 8 bits with a float32 scale a block
LOSS_COLUMNS = 4096  # of the vocabulary, whose logits' gradients linear_cross_entropy holds at a time


@dataclass(frozen=True)
class RunConfig:
    """What a run's memory and time depend on. rows: packed sequences a micro-batch. lora_rank 0: no adapters."""

    gpus: int = 1
    shard: str = "optimizer"
    checkpointing: str = "none"
    rows: int = 1
    optimizer: str = "adamw"
    lora_rank: int = 0
    frozen_weights: str = "dtype"


@dataclass(frozen=True)
class DataStats:
    """Means of a sample: tokens (those under its image included), patches of its one image, tokens with a label."""

    samples: float
    tokens: float
    patches: float
    labelled: float


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: all, trained, in the decoder's linear layers, in the largest FSDP unit (the output layer)
    and in a decoder layer. ``lora_dims``: in_features + out_features of all the decoder's linear layers, which times
    the rank is the number of an adapter's parameters.
    """

    all: int
    trained: int
    linear: int
    largest_unit: int
    layer: int
    lora_dims: int

    @staticmethod
    @cache
    def of(config: Config, stage: Stage) -> ParameterCounts:
        """Counted on the meta device: nothing is allocated."""
        model = empty_model(config, "cpu", DTYPES[config.dtype], "torch")
        named = set_trainable(model, stage)
        layers = list(model.decoder.layers)
        linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
        units = [*layers, *model.vision.layers(), model.decoder.embed_tokens, model.decoder.lm_head, model.projector]
        return ParameterCounts(
            all=_count(model.parameters()),
            trained=_count(named.values()),
            linear=sum(m.weight.numel() for m in linear),
            largest_unit=max(_count(unit.parameters()) for unit in units),
            layer=_count(layers[0].parameters()),
            lora_dims=sum(m.in_features + m.out_features for m in linear),
        )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def zero_bytes(
    parameters: float,
    gpus: int,
    shard: str,
    weights: float = WEIGHT_BYTES,
    gradients: float = GRADIENT_BYTES,
    state: float = MASTER_BYTES + MOMENT_BYTES,
) -> dict[str, float]:
    """Bytes of a GPU by kind (Rajbhandari et al. 2020, figure 1). ``weights``, ``gradients`` and ``state`` (masters and
    moments): bytes a parameter.
    """
    level = SHARDS.index(shard)  # ZeRO's stage
    return {
        "weights": weights * parameters / (gpus if level >= 3 else 1),
        "gradients": gradients * parameters / (gpus if level >= 2 else 1),
        "state": state * parameters / (gpus if level >= 1 else 1),
    }


def memory_by_kind(
    config: Config, stage: Stage, counts: ParameterCounts, data: DataStats, run_config: RunConfig
) -> dict[str, float]:
    """Bytes of a GPU by kind.

    ``buffers``: gradients of the largest unit in bfloat16 and, with several GPUs, in float32 while they are reduced;
    under ``full`` also the weights of two units, the current one and the prefetched one. A unit's gradients are assumed
    to be reduced as soon as they are there. Not counted: the CUDA context, NCCL's buffers and fragmentation.
    """
    n, lora = run_config.gpus, run_config.lora_rank
    trained = lora * counts.lora_dims if lora else counts.trained
    frozen = counts.all - (0 if lora else trained)
    quantized = counts.linear if lora else 0  # with adapters the decoder's linear layers are frozen
    kept = WEIGHT_BYTES * (frozen - quantized) + FROZEN_BYTES[run_config.frozen_weights] * quantized
    unit = 0 if lora or not trained else min(counts.largest_unit, trained)
    if run_config.optimizer == "layerwise":
        moments = MOMENT8_BYTES * trained
        model = {"weights": WEIGHT_BYTES * trained + kept, "masters": 0, "gradients": 0, "moments": moments}
    else:
        parts = zero_bytes(trained, n, run_config.shard, state=MASTER_BYTES + MOMENT_BYTES)
        model = {
            "weights": parts["weights"] + kept / (n if run_config.shard == "full" else 1),
            "masters": parts["state"] * MASTER_BYTES / (MASTER_BYTES + MOMENT_BYTES),
            "gradients": parts["gradients"],
            "moments": parts["state"] * MOMENT_BYTES / (MASTER_BYTES + MOMENT_BYTES),
        }
    buffers = unit * (WEIGHT_BYTES + (GRADIENT_BYTES if n > 1 else 0))
    if run_config.shard == "full" and n > 1:
        buffers += WEIGHT_BYTES * (counts.largest_unit + counts.layer)
    tokens = run_config.rows * stage.sequence_length
    patches = tokens * data.patches / data.tokens
    weights_train = bool(lora) or "decoder" in stage.trains
    tower = "vision" in stage.trains and not lora
    return {
        **model,
        "activations": activation_bytes(config, tokens, patches, run_config, weights_train, tower),
        "loss": tokens * WEIGHT_BYTES * (min(LOSS_COLUMNS, config.vocab_size) + config.hidden_size),
        "buffers": buffers,
    }


def decoder_layer_bytes(config: Config, checkpointing: str, inputs: bool = True) -> int:
    """Bytes a token that a decoder layer saves for its backward pass, in bfloat16, as the kernels do
    (``triton_kernels``: norms save the residual sum, rotary embedding nothing, attention q, k, v, its output and a
    float32 a head, SwiGLU its input; a linear layer whose weight, or adapter, is trained saves its input: ``inputs``).

    ``selective`` saves the outputs of matrix products and attention, and recomputes norms, rotary embedding and SwiGLU.
    ``full`` saves the layer's input and the residual, ``offload`` saves them in the CPU's memory.
    """
    hidden, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    qkv = (heads + 2 * config.num_key_value_heads) * config.head_dim
    attended = heads * config.head_dim
    if checkpointing == "offload":
        return 0
    if checkpointing == "full":
        return WEIGHT_BYTES * 2 * hidden
    if checkpointing == "selective":  # o_proj's and down_proj's outputs, and the residual
        return WEIGHT_BYTES * (3 * hidden + qkv + attended + 2 * wide) + 4 * heads
    kept = 2 * hidden + qkv + attended + 2 * wide
    return WEIGHT_BYTES * (kept + (2 * hidden + wide if inputs else 0)) + 4 * (heads + 2)


def vision_layer_bytes(config: Config, checkpointing: str) -> int:
    """Bytes a patch that a layer of the tower saves for its backward pass; as ``decoder_layer_bytes``."""
    hidden, wide, heads = config.vision.hidden_size, config.vision.intermediate_size, config.vision.num_attention_heads
    if checkpointing == "offload":
        return 0
    if checkpointing == "full":
        return WEIGHT_BYTES * hidden
    if checkpointing == "selective":  # input, q, k, v, attended, out_proj's, fc1's; the next layer's input is its own
        return WEIGHT_BYTES * (6 * hidden + wide) + 4 * heads
    # Both norms' inputs and outputs, q, k, v, attended; fc1's output and GELU's.
    return WEIGHT_BYTES * (8 * hidden + 2 * wide) + 4 * (heads + 4)


def activation_bytes(
    config: Config, tokens: float, patches: float, run_config: RunConfig, inputs: bool = True, tower: bool = True
) -> float:
    """Bytes that the layers save, what one layer recomputes at a time, and the activations outside of the layers."""
    kind = run_config.checkpointing
    one, whole = (decoder_layer_bytes(config, k, inputs) for k in (kind, "none"))
    total = tokens * (config.num_hidden_layers * one + max(0, whole - one))
    if tower:
        total += patches * (config.vision.num_hidden_layers - 1) * vision_layer_bytes(config, kind)
    # Embeddings with the projected patches in them, the final norm's input and output; the projector's input.
    return total + WEIGHT_BYTES * (3 * tokens * config.hidden_size + patches * config.vision.hidden_size)
