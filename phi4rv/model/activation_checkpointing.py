"""Activation checkpointing: a layer's activations are dropped and recomputed in its backward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# checkpoint_fn(function, *arguments) -> function(*arguments), saving what the backward pass needs or recomputing it.
CheckpointFn = Callable[..., Any]

# Nearly all of a layer's FLOPs: matrix products, by the ends of their operators' names, and attention, PyTorch's own,
# this project's and flash-attn's.
MATMULS, ATTENTION = ("mm", "quantized_linear"), ("attention", "varlen_forward")
# Tensors of fewer bytes are not worth the copy to the CPU and back.
OFFLOAD_MIN_BYTES = 8 << 20
MAX_COPIES_IN_FLIGHT = 4


def no_checkpointing(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def full_checkpointing(function: Callable[..., Any], *arguments: Any) -> Any:
    """Saves ``arguments`` alone (Chen et al. 2016). Nothing in the model is random, so no random state is saved."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def selective_checkpointing(function: Callable[..., Any], *arguments: Any) -> Any:
    """Saves ``arguments`` and the outputs of matrix products and attention; norms, rotations and activations, which
    take memory and hardly any FLOPs, are recomputed (Korthikanti et al. 2022, the other way round: attention is fused).
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def offloaded_checkpointing(function: Callable[..., Any], *arguments: Any) -> Any:
    """``full_checkpointing``, with large ``arguments`` offloaded to pinned CPU memory until the backward pass."""
    with torch.autograd.graph.saved_tensors_hooks(_to_cpu, _from_cpu):
        return full_checkpointing(function, *arguments)


CHECKPOINT_FNS: dict[str, CheckpointFn] = {
    "none": no_checkpointing,
    "selective": selective_checkpointing,
    "full": full_checkpointing,
    "offload": offloaded_checkpointing,
}
CHECKPOINTING = tuple(CHECKPOINT_FNS)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    name = operator.name().partition("::")[2].partition(".")[0]
    save = name.endswith(MATMULS) or any(part in name for part in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _to_cpu(tensor: Tensor) -> tuple[Tensor, torch.device, torch.cuda.Event | None]:
    if tensor.nbytes < OFFLOAD_MIN_BYTES:
        return tensor, tensor.device, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    if not tensor.is_cuda:
        return copy.copy_(tensor), tensor.device, None
    copies, current = _copy_stream(tensor.device), torch.cuda.current_stream(tensor.device)
    copies.wait_stream(current)
    with torch.cuda.stream(copies):
        copy.copy_(tensor, non_blocking=True)
    event = copies.record_event()
    # A tensor is held until the compute stream has waited for its copy: the host, which runs ahead, would otherwise
    # have it freed much later, and memory would grow as if nothing were offloaded.
    _in_flight.append((event, tensor))
    _wait_for_copies(current, MAX_COPIES_IN_FLIGHT)
    return copy, tensor.device, event


def _from_cpu(packed: tuple[Tensor, torch.device, torch.cuda.Event | None]) -> Tensor:
    copy, device, event = packed
    if event is not None:
        current = torch.cuda.current_stream(device)
        _wait_for_copies(current, 0)
        current.wait_event(event)
    return copy.to(device, non_blocking=True)


def _wait_for_copies(stream: torch.cuda.Stream, left: int) -> None:
    while len(_in_flight) > left:
        stream.wait_event(_in_flight.popleft()[0])


_in_flight: deque[tuple[torch.cuda.Event, Tensor]] = deque()
_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for copies, so that they overlap with the next layer."""
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)
    return _copy_streams[device]
