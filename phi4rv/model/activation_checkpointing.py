"""Activation checkpointing: what a layer leaves behind for its backward pass is thrown away and computed again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# run(function, *arguments) -> function(*arguments), keeping what the backward pass needs or computing it again.
Run = Callable[..., Any]

# Nearly all of a layer's operations: products, by the ends of their operators' names, and attention, PyTorch's own,
# this project's and flash-attn's.
PRODUCTS, ATTENTION = ("mm", "quantized_linear"), ("attention", "varlen_forward")
# Bytes from which a tensor is worth the way to the CPU and back.
MOVED = 8 << 20
UNDER_WAY = 4  # copies


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Keeps ``arguments`` alone (Chen et al. 2016). Nothing in the model is random, so no random state is kept."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def selected(function: Callable[..., Any], *arguments: Any) -> Any:
    """Keeps ``arguments`` and what products and attention put out; norms, rotations and activations, which take bytes
    and hardly any operations, are computed again (Korthikanti et al. 2022, the other way round: attention is fused).
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def offloaded(function: Callable[..., Any], *arguments: Any) -> Any:
    """``recomputed``, with large ``arguments`` kept in the CPU's memory, page-locked, till the backward pass."""
    with torch.autograd.graph.saved_tensors_hooks(_to_cpu, _back):
        return recomputed(function, *arguments)


RUNS: dict[str, Run] = {"none": directly, "selective": selected, "full": recomputed, "offload": offloaded}
CHECKPOINTING = tuple(RUNS)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator.name().partition("::")[2].partition(".")[0]
    kept = name.endswith(PRODUCTS) or any(part in name for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _to_cpu(tensor: Tensor) -> tuple[Tensor, torch.device, torch.cuda.Event | None]:
    if tensor.nbytes < MOVED:
        return tensor, tensor.device, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    if not tensor.is_cuda:
        return copy.copy_(tensor), tensor.device, None
    side, current = _side_stream(tensor.device), torch.cuda.current_stream(tensor.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        copy.copy_(tensor, non_blocking=True)
    event = side.record_event()
    # A tensor is held until the layers' stream has waited for its copy: the host, which runs ahead, would else have it
    # free much later, and memory would grow as if nothing was moved.
    _under_way.append((event, tensor))
    _let_go(current, UNDER_WAY)
    return copy, tensor.device, event


def _back(packed: tuple[Tensor, torch.device, torch.cuda.Event | None]) -> Tensor:
    copy, device, event = packed
    if event is not None:
        current = torch.cuda.current_stream(device)
        _let_go(current, 0)
        current.wait_event(event)
    return copy.to(device, non_blocking=True)


def _let_go(stream: torch.cuda.Stream, left: int) -> None:
    while len(_under_way) > left:
        stream.wait_event(_under_way.popleft()[0])


_under_way: deque[tuple[torch.cuda.Event, Tensor]] = deque()
_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies, so that they run beside the next layer."""
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
