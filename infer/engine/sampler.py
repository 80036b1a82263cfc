"""Sampling: the next token of each request from its row of logits, on the device, without synchronising the host.

Nothing here has a shape that depends on values, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi4rv.ops.low_precision import UINT32_MASK, hash32

GOLDEN_RATIO = 0x9E3779B9


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Logits (N, V) of tokens in ``seen`` (N, V) bool made less likely by ``penalty`` (N,) (Keskar et al. 2019)."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_token_mask(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits (N, V), -inf where ``allowed`` (N, V) bool is False."""
    return logits.masked_fill(~allowed, -torch.inf)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    step: Tensor,
) -> Tensor:
    """logits (N, V) float32 -> token ids (N,) int64. temperature, top_p, min_p (N,) float, top_k, seed, step (N,) int.

    temperature 0: the largest, the first of equals. Otherwise temperature, then the top_k most probable (0: all), of
    these the smallest set of the most probable whose mass reaches top_p (Holtzman et al. 2020), of these the ones at
    least min_p times as probable as the best (Nguyen et al. 2024), and a draw from the rest. Of equals the first count
    as more probable. A draw depends on its own row alone and is the same on every device, but for rounding. NaN counts
    as -inf, which is never drawn unless the whole row is.
    """
    temperature, top_k, top_p, min_p = (x[:, None] for x in (temperature, top_k, top_p, min_p))
    infinity = torch.inf
    values, order = logits.nan_to_num(-infinity, infinity, -infinity).sort(descending=True, stable=True)
    # In float64, and from the largest down: neither a tiny temperature nor a long tail may round to nothing.
    best = values[:, :1].double()
    below = ((values.double() - best) / temperature).masked_fill_(values == best, 0.0)
    kept = (top_k == 0) | (torch.arange(values.shape[1], device=values.device) < top_k)
    probabilities = below.masked_fill(~kept, -infinity).softmax(1)
    # The first has nothing before it and stays. top_p 1 keeps what is rounded away against it.
    kept &= (probabilities.cumsum(1) - probabilities < top_p) | (top_p >= 1)
    kept &= below >= min_p.double().log()
    score = below + _gumbel_noise(seed, step, order).masked_fill_(temperature == 0, 0.0)
    return order.gather(1, score.masked_fill_(~kept, -infinity).argmax(1, keepdim=True)).squeeze(1)


def gather_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under logits (N, V) of ``token_ids`` (N,), and ids and log-probabilities (N, num_logprobs) of
    the most probable.
    """
    total = logits.logsumexp(1, keepdim=True)
    values, ids = logits.topk(num_logprobs, dim=1)
    return (logits.gather(1, token_ids[:, None]) - total).squeeze(1), ids, values - total


def _gumbel_noise(seed: Tensor, step: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise of token_ids (N, K), float64: a hash of (seed, step, token), seed and step (N,) in [0, 2^63).

    The largest of logits + noise is a draw from their softmax (Gumbel 1954; Maddison et al. 2014).
    """
    # Three keys a row. Each of a token's two random words depends on a key that the other does not use.
    keys = hash32(GOLDEN_RATIO * torch.arange(1, 4, device=seed.device) & UINT32_MASK)
    for word in (seed & UINT32_MASK, seed >> 32, step & UINT32_MASK):
        keys = hash32(keys ^ word[:, None])
    shared, first, second = keys.unbind(1)
    hashed = hash32(shared[:, None] ^ token_ids)
    high, low = hash32(hashed ^ first[:, None]), hash32(hashed ^ second[:, None])
    # 52 bits, and half of the last, which keeps 0 and 1 out: 32 would draw nothing rarer than 2^-32.
    uniform = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log1p(-uniform))
