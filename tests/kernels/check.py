"""What the kernel tests share: where they run, and when a kernel counts as right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

# Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot, so on a CPU float16 stands for the short dtypes.
PLACES = [
    pytest.param(("cpu", torch.float32), id="cpu-float32"),
    pytest.param(("cpu", torch.float16), id="cpu-float16"),
    pytest.param(("cuda", torch.bfloat16), id="cuda-bfloat16", marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16), id="cuda-float16", marks=pytest.mark.gpu),
]
# One place on each kind of machine, for tests of behaviour and not of rounding.
PLACE = [PLACES[0], PLACES[2]]
# The CUDA kernels: emulated (csrc/emulator/) in their own dtypes. A test with these places takes the fixture ``csrc``.
CUDA_PLACES = [
    pytest.param(("cpu", torch.bfloat16), id="emulated-bfloat16"),
    pytest.param(("cpu", torch.float16), id="emulated-float16"),
    *PLACES[2:],
]
CUDA_PLACE = [CUDA_PLACES[0], PLACES[2]]
Place = tuple[str, torch.dtype]
NUDGES = 8


def draw(place: Place, *shape: int, scale: float = 1.0) -> Tensor:
    """A normal random leaf that wants its gradient."""
    device, dtype = place
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()


def check_parity(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    gradients: bool = True,
    slack: float = 1.0,
) -> None:
    """Holds ``kernel(*inputs)`` and its gradients to ``reference`` (the criterion of FlashAttention's tests).

    Exact is the reference in float64 of the same (rounded) inputs. The kernel's largest error may be at most twice
    that of the reference run in the inputs' own dtype, plus ``slack`` units in the last place of the largest value, in
    float32 at least four: sums of another order.
    Where few values are summed to little, a CPU's order of sums can be right by luck: so in float32 what rounding the
    inputs would change, the most of NUDGES tries, counts as an error of the reference too.
    A NaN anywhere fails. Gradients are taken for every float input that requires one, with random cotangents.
    """
    dtype = next(x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
    slack = max(slack, 4.0) if dtype == torch.float32 else slack
    exact = _run(reference, [_leaf(x, torch.float64) for x in inputs], gradients, dtype)
    nudged = [
        _run(reference, [_nudged(_leaf(x, torch.float64), seed) for x in inputs], gradients, dtype)
        for seed in range(NUDGES if dtype == torch.float32 else 0)
    ]
    plain = _run(reference, [_leaf(x) for x in inputs], gradients, dtype)
    ours = _run(kernel, [_leaf(x) for x in inputs], gradients, dtype)
    assert ours.keys() == exact.keys()
    for name, true in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        assert ours[name].shape == true.shape, name
        check_close(ours[name], plain[name], true, name, slack, [results[name] for results in nudged])


def check_cuda_graph(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Results and gradients, captured on a side stream and replayed twice on other values of the first input: the bits
    of an ordinary call. Only on a GPU.
    """
    wanted = [x for x in inputs if x.requires_grad]
    cotangents: list[Tensor] = []

    def run() -> list[Tensor]:
        outputs = function(*inputs)
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        roots = [out for out in outputs if out.requires_grad]
        cotangents.extend(torch.randn_like(root) for root in roots[len(cotangents) :])  # drawn before the capture
        return [*outputs, *(torch.autograd.grad(roots, wanted, cotangents) if roots else ())]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
        with torch.no_grad():
            inputs[0].copy_(torch.randn_like(inputs[0]))
        for _ in range(2):
            graph.replay()
    torch.cuda.synchronize()
    for ours, again in zip(captured, run(), strict=True):
        assert torch.equal(ours, again)


def check_close(
    ours: Tensor,
    plain: Tensor,
    exact: Tensor,
    name: str = "output",
    slack: float = 1.0,
    nudged: Sequence[Tensor] = (),
) -> None:
    """The criterion of ``check_parity`` for one tensor."""
    if not exact.numel():
        return
    unit = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    error = float((ours.double() - exact).abs().max())
    allowed = 2 * max(float((other - exact).abs().max()) for other in (plain.double(), *nudged)) + slack * unit
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"  # false for NaN


def _leaf(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A detached copy of a tensor, its strides kept, its floats in ``dtype``; anything else as it is."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    wanted = x.requires_grad
    return x.detach().to(dtype or x.dtype).requires_grad_(wanted)


def _nudged(x: Any, seed: int) -> Any:
    """Floats off by half a unit in the last place of float32, up or down at random."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(seed)).to(x) * 2 - 1
    return (x.detach() * (1 + signs * torch.finfo(torch.float32).eps / 2)).requires_grad_(x.requires_grad)


def _run(function: Callable[..., Any], inputs: list[Any], gradients: bool, cotangent: torch.dtype) -> dict[str, Tensor]:
    """Float outputs and, by input, gradients. Cotangents are the same in every dtype: rounded to ``cotangent``."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs) if out.is_floating_point()}
    wanted = {f"gradient of input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    if gradients and wanted:
        roots = [out for out in outputs if out.requires_grad]
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(out.shape, generator=generator).to(cotangent).to(out) for out in roots]
        grads = torch.autograd.grad(roots, list(wanted.values()), drawn, allow_unused=True)
        for (name, x), grad in zip(wanted.items(), grads, strict=True):
            results[name] = torch.zeros_like(x) if grad is None else grad
    return results
