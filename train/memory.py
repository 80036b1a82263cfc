"""Memory of a training step on one GPU, added up on the meta device: computed, not measured.

Weights, quantised weights, adapters and the optimizer's state are counted from the objects that a run would make.
Activations assume ``--checkpointing full``, the definitions of ``phi4rv/reference.py`` (kernels need less), fused
attention, and one packed sequence of which every token is labelled and is a patch too, which is more than any real
one. The CUDA context, fragmentation and the batch itself are left out; take a gigabyte or two for them. Quantised
weights are made from whole ones on the same GPU, which the unquantised model must fit while it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from phi4rv.checkpoint import empty_model
from phi4rv.config import Config
from phi4rv.lora import QuantizedLinear
from phi4rv.model import LOSS_ROWS, Phi4RV
from phi4rv.quantized import Moment8
from phi4rv.reference import rope_table
from train.layerwise import SLICE, Layerwise
from train.lora import adapt
from train.optimizer import Optimizer
from train.recipe import Stage
from train.trainer import trainable


def one_gpu(config: Config, stage: Stage, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Bytes by kind: ``weights``, ``adapters``, ``optimizer``, ``gradients``, ``kept`` (inputs of the layers),
    ``working`` (the largest of: a layer and its gradients, the loss, an update) and their sum, ``total``.
    """
    model = empty_model(config, "meta", dtype, "torch")
    if stage.lora_rank:
        adapt(model, stage, seed=0)
    named = trainable(model, stage)
    all_weights = size(model.parameters()) + sum(_quantized(m) for m in model.modules())
    largest = max(size([p]) for p in named.values())
    if stage.optimizer == "layerwise":
        layerwise = Layerwise(named, stage, model.ops, seed=0)
        optimizer = size(t for m in (*layerwise.exp_avg.values(), *layerwise.exp_avg_sq.values()) for t in _both(m))
        gradients = 3 * largest  # the loss adds its pieces' gradients of the output layer: a sum, a piece, the new sum
        update = SLICE * (4 * 8 + 8 * 4)  # random words and float32 copies of a slice
    else:
        adamw = Optimizer(named, stage, model.ops)
        masters = [adamw.masters[n] for n, p in named.items() if p.dtype != torch.float32]
        optimizer = size([*masters, *adamw.exp_avg.values(), *adamw.exp_avg_sq.values()])
        gradients = size([adamw.flat]) + size(named.values())
        update = 6 * 4 * max(p.numel() for p in named.values())
    T, width = stage.sequence_length, dtype.itemsize
    kept = T * width * (2 * config.hidden_size * config.num_hidden_layers)  # each layer's input and residual sum
    kept += T * width * config.vision.hidden_size * (config.vision.num_hidden_layers - 1)
    loss = LOSS_ROWS * config.vocab_size * (2 * width + 3 * 4)  # logits and their gradient, also in float32; softmax
    adapters = size(p for n, p in named.items() if stage.lora_rank)
    parts = {
        "weights": all_weights - adapters,
        "adapters": adapters,
        "optimizer": optimizer,
        "gradients": gradients,
        "kept": kept,
        "working": max(_layer(model, T, dtype), loss, update),
    }
    return parts | {"total": sum(parts.values())}


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of their elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def _both(moment: Moment8) -> tuple[Tensor, Tensor]:
    return moment.codes, moment.scales


def _quantized(module: nn.Module) -> int:
    if not isinstance(module, QuantizedLinear):
        return 0
    q = module.quantized
    return size(t for t in (q.data, q.scales, q.zeros) if t is not None)


def _layer(model: Phi4RV, T: int, dtype: torch.dtype) -> int:
    """What a decoder layer keeps while its backward pass runs, once more for gradients, and, of quantised weights,
    float32 copies on the way to the largest one.
    """
    config = model.config
    x, residual = (torch.empty(T, config.hidden_size, dtype=dtype, device="meta", requires_grad=True) for _ in "xr")
    table = rope_table(torch.empty(T, device="meta"), config.head_dim, config.rope_theta)
    attention = 4 * T * config.hidden_size * dtype.itemsize  # q, repeated k and v, output
    # Fused attention has no meta implementation on this device: an elementwise stand-in, counted by hand above.
    kept = saved_bytes(lambda: model.decoder.layers[0](x, residual, *table, lambda _, q, k, v: q * 1), model)
    copies = 0
    if any(isinstance(m, QuantizedLinear) for m in model.modules()):
        copies = 3 * 4 * 2 * config.intermediate_size * config.hidden_size
    return 2 * (kept + attention) + copies


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps of ``run()`` for a backward pass, the model's parameters left out."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for t in kept.values())
