"""Cross entropy of a vocabulary head without its logits, forward and backward.

The forward pass reduces every tile of logits to its largest and the sum of its exponentials as it leaves the tensor
cores. The backward pass goes through the vocabulary in chunks: it computes a chunk's logits again, turns them into
their gradient, and multiplies that into the two gradients. That is four products of T·V·C where keeping the logits
takes three. Computing the gradients during the forward pass, in chunks of tokens (Liger-Kernel, Hsu et al. 2024),
takes three as well, but then the weight's gradient is a sum over the chunks: at T = 8192, V = 200064, C = 5120 each of
32 chunks of 256 rows reads 2 GB of weight twice and reads and writes 2 GB of its gradient, over 200 GB in all. Chunks
of the vocabulary have every labelled row, so that each row of the weight's gradient is written once, finished.

Rows without a label are never multiplied: labelled rows are packed by an index on the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from triton_kernels import linear_cross_entropy_kernels as kernels
from triton_kernels.common.launch import check, check_float, flatten_to_2d, num_sms
from triton_kernels.common.tuning import Config, SearchSpace
from triton_kernels.linear_cross_entropy_kernels import ALIGN, FORWARD, HIDDEN, LOGITS, WEIGHT

# Columns of a chunk when every row is labelled; where fewer are, chunks are as many times wider.
CHUNK = 4096


def workspace_bytes(T: int, C: int, V: int, size: int = 2) -> int:
    """The most memory that forward and backward need at one time beside inputs and gradients.

    ``size``: bytes of an element of hidden and weight.
    """
    padded = _padded(T)
    vectors = padded * (4 + 8)  # index; largest logit and sum
    tile = min(config["BLOCK_N"] for config in FORWARD.cases[_case(size)])
    forward = padded * (8 * triton.cdiv(V, tile) + 4 + 4)  # largest and sum by tile; target's logit, loss
    rest = T * C * size if size < 4 else 0
    return vectors + max(forward, _elements(padded, V) * size + rest)


def _case(size: int) -> str:
    return "short" if size < 4 else "float32"


def _padded(T: int) -> int:
    return max(1, triton.cdiv(T, ALIGN)) * ALIGN


def _elements(padded: int, V: int) -> int:
    """Size of the buffer of logit gradients."""
    return padded * min(CHUNK, triton.cdiv(V, ALIGN) * ALIGN)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    name = "linear_cross_entropy"
    check(hidden.ndim == 2, f"{name}: hidden has {hidden.ndim} dimensions, must have 2")
    check_float(hidden, f"{name}: hidden")
    wanted = f"(vocabulary, {hidden.shape[1]}) {hidden.dtype}"
    same = weight.ndim == 2 and weight.shape[1] == hidden.shape[1] and weight.dtype == hidden.dtype
    check(same and len(weight) > 0, f"{name}: weight is {tuple(weight.shape)} {weight.dtype}, must be {wanted}")
    fits = targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    got = f"{tuple(targets.shape)} {targets.dtype}"
    check(fits, f"{name}: targets is {got}, must be ({len(hidden)},) torch.int64")


def _config(space: SearchSpace, x: Tensor) -> Config:
    return space.pick(_case(x.element_size()), x.device)


def _num_programs(x: Tensor, config: Config) -> int:
    """A multiprocessor's registers hold two programs of 4 warps, or one of 8."""
    return num_sms(x.device) * (2 if config["num_warps"] == 4 else 1)


def launch_forward(hidden: Tensor, weight: Tensor, targets: Tensor, filter_below: float) -> list[Tensor]:
    """Sum of the losses, number of labelled rows, their numbers, (2, rows) largest logit and sum of exponentials, and
    (rows,) losses; where rows are more than labelled ones, the rest repeat the first, with loss 0.

    ``filter_below`` is for the gradient.
    """
    _check(hidden, weight, targets)
    (T, C), V = hidden.shape, len(weight)
    h, w, targets = flatten_to_2d(hidden), flatten_to_2d(weight), targets.contiguous()
    config = _config(FORWARD, h)
    padded, tiles = _padded(T), triton.cdiv(V, config["BLOCK_N"])
    count = targets.new_empty(())
    index = targets.new_empty(padded, dtype=torch.int32)
    softmax = h.new_empty((2, padded), dtype=torch.float32)
    losses = torch.empty_like(softmax[0])
    partial = h.new_empty((2, tiles, padded), dtype=torch.float32)
    target_logit = h.new_full(
        (padded,), float("nan"), dtype=torch.float32
    )  # stays where a target is not in the vocabulary
    with torch.cuda.device_of(h):
        kernels.compact[(1,)](targets, index, count, T, padded, BLOCK=4096, num_warps=8)
        kernels.forward[(_num_programs(h, config),)](
            h, w, targets, index, count, *partial, target_logit, h.stride(0), w.stride(0), padded, V, C,
            EVEN=C % config["BLOCK_K"] == 0, **config,
        )  # fmt: skip
        kernels.combine[(padded // 64,)](
            *partial, target_logit, count, *softmax, losses, padded, tiles, ROWS=64, TILES=64
        )
    return [losses.sum(dtype=torch.float64).float(), count, index, softmax, losses]


def launch_backward(
    scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: Tensor,
    index: Tensor,
    softmax: Tensor,
    filter_below: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """``scale`` times the gradients of hidden and of weight; one that is not wanted is empty."""
    (T, C), V = hidden.shape, len(weight)
    h, w, targets = flatten_to_2d(hidden), flatten_to_2d(weight), targets.contiguous()
    logits_config, weight_config, hidden_config = (_config(space, h) for space in (LOGITS, WEIGHT, HIDDEN))
    elements = _elements(len(index), V)
    dlogits = h.new_empty(elements)
    dhidden = h.new_zeros((T, C) if hidden_wanted else 0)
    short = hidden_wanted and h.element_size() < 4
    rest = torch.zeros_like(dhidden) if short else dhidden
    dweight = w.new_empty((V, C) if weight_wanted else 0)
    with torch.cuda.device_of(h):
        for chunk in range(triton.cdiv(V, CHUNK)):
            kernels.logits_gradient[(_num_programs(h, logits_config),)](
                h, w, targets, index, count, *softmax, dlogits, h.stride(0), w.stride(0), elements, chunk,
                filter_below, V, C, EVEN=C % logits_config["BLOCK_K"] == 0, FILTER=filter_below > 0, **logits_config,
            )  # fmt: skip
            if weight_wanted:
                kernels.weight_gradient[(_num_programs(h, weight_config),)](
                    dlogits, h, index, count, scale, dweight, h.stride(0), elements, chunk, V, C,
                    EVEN=C % weight_config["BLOCK_N"] == 0, **weight_config,
                )  # fmt: skip
            if hidden_wanted:
                even = C % hidden_config["BLOCK_N"] == 0 and V % hidden_config["BLOCK_K"] == 0
                kernels.hidden_gradient[(_num_programs(h, hidden_config),)](
                    dlogits, w, index, count, scale, dhidden, rest, w.stride(0), elements, chunk, V, C,
                    EVEN=even, REST=short, **hidden_config,
                )  # fmt: skip
    return dhidden, dweight


forward = torch.library.custom_op("phi4rv_triton::linear_cross_entropy", launch_forward, mutates_args=())
backward = torch.library.custom_op("phi4rv_triton::linear_cross_entropy_backward", launch_backward, mutates_args=())


@forward.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, filter_below: float) -> list[Tensor]:
    _check(hidden, weight, targets)
    index = targets.new_empty(_padded(len(hidden)), dtype=torch.int32)
    softmax = hidden.new_empty((2, len(index)), dtype=torch.float32)
    losses = torch.empty_like(softmax[0])
    return [hidden.new_empty((), dtype=torch.float32), targets.new_empty(()), index, softmax, losses]


@backward.register_fake
def _(
    scale: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: Tensor,
    index: Tensor,
    softmax: Tensor,
    filter_below: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor]:
    dhidden = hidden.new_empty(hidden.shape if hidden_wanted else 0)
    return dhidden, weight.new_empty(weight.shape if weight_wanted else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, targets, ctx.filter_below = inputs
    ctx.save_for_backward(hidden, weight, targets, *output[1:4])


def _autograd_backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None, None, None]:
    wanted = ctx.needs_input_grad[:2]
    dhidden, dweight = backward(grads[0], *ctx.saved_tensors, ctx.filter_below, *wanted)
    return dhidden if wanted[0] else None, dweight if wanted[1] else None, None, None


forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, filter_below: float = 0.0, marked: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Sum of -log softmax(hidden · weightᵀ)[target] over the labelled rows, and their count.

    hidden (T, C) and weight (V, C) of one dtype, targets (T,) int64 with -100 where there is none: those rows are
    never multiplied. Returns (sum float32 scalar, count int64 scalar). ``filter_below``: probabilities under it, the
    target's excepted, send no gradient (Cut Your Losses, Wijmans et al. 2024). ``marked`` (T,) bool: the sum over the
    rows that it marks comes third, without gradient. ValueError for other shapes and dtypes; any other target outside
    the vocabulary makes the sum NaN.
    """
    total, count, index, _, losses = forward(hidden, weight, targets, filter_below)
    if marked is None:
        return total, count
    chosen = marked[index.long()] if len(marked) else torch.zeros_like(losses, dtype=torch.bool)
    part = torch.where(chosen, losses.detach(), 0.0)
    return total, count, part.sum(dtype=torch.float64).float()
