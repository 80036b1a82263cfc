"""Each operation of phi4rv.ops.reference against its definition, written again here in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from phi4rv.ops import reference
from phi4rv.ops.low_precision import dequantize, quantize
from tests.parity import relative

F32 = 1e-5  # bound for float32 against float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed, dtype=torch.float64).requires_grad_()


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """One document, one head at a time, one row at a time, exponentials and all."""
    q, k, v = q.double(), k.double(), v.double()
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    for h in range(heads):
        kv = h * k.shape[1] // heads
        for m in range(rows):
            seen = len(k) - rows + m + 1 if causal else len(k)
            weights = (k[:seen, kv] @ q[m, h] / math.sqrt(dim)).exp()
            out[m, h] = weights @ v[:seen, kv] / weights.sum()
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 72), (4, 2, 128), (4, 1, 64), (3, 3, 8)])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 33], [1, 1, 2, 64], [65]])
def test_packed_attention(lengths: list[int], heads: int, kv_heads: int, dim: int, causal: bool) -> None:
    # Slices of one fused row, as the decoder hands them over: not contiguous.
    qkv = random(sum(lengths), heads + 2 * kv_heads, dim)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    ours = reference.packed_attention(q, k, v, offsets(lengths), max(lengths), causal)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    assert ours.dtype == torch.float32
    assert relative(ours, torch.cat([naive_attention(*part, causal) for part in parts])) < F32


def test_packed_attention_without_documents() -> None:
    empty = torch.empty(0, 2, 8)
    out = reference.packed_attention(empty, empty[:, :1], empty[:, :1], offsets([]), 0, causal=True)
    assert out.shape == (0, 2, 8)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_gradient(causal: bool) -> None:
    q, k, v = leaf(7, 4, 3), leaf(7, 2, 3, seed=1), leaf(7, 2, 3, seed=2)
    assert gradcheck(lambda *x: reference.packed_attention(*x, offsets([1, 4, 2]), 4, causal), (q, k, v))


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 40), (3, 40), (39, 40), (40, 40)])
@pytest.mark.parametrize("causal", [True, False])
def test_attend_with_fewer_queries_than_keys(rows: int, keys: int, causal: bool) -> None:
    q, k, v = random(rows, 4, 16), random(keys, 2, 16, seed=1), random(keys, 2, 16, seed=2)
    assert relative(reference.attention(q, k, v, causal), naive_attention(q, k, v, causal)) < F32


@pytest.mark.parametrize("new", [1, 3])
def test_decode_attention(new: int) -> None:
    q = random(3, new, 4, 16)
    k, v = random(60, 2, 16, seed=1), random(60, 2, 16, seed=2)
    starts, lengths = [30, 0, 57], [20, 29, 3]  # out of order, with room between; rows 50 to 56 are no one's
    for unused in (slice(29, 30), slice(50, 57)):
        k[unused] = v[unused] = float("nan")
    ours = reference.decode_attention(q, k, v, torch.tensor(starts), torch.tensor(lengths))
    for b, (s, n) in enumerate(zip(starts, lengths, strict=True)):
        assert relative(ours[b], naive_attention(q[b], k[s : s + n], v[s : s + n], causal=True)) < F32


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("fp8", [False, True])
def test_paged_prefill_attention(size: int, fp8: bool) -> None:
    """No new token, one, a chunk behind a prefix, a whole prompt; what is no one's is NaN or no page at all."""
    new, lengths = [0, 1, 9, 12, 0], [5, 20, 33, 12, 0]
    used = [-(-n // size) for n in lengths]
    pages = torch.randperm(sum(used) + 2, generator=torch.Generator().manual_seed(3)).split([*used, 2])[:-1]
    table = torch.full((5, max(used) + 1), -1)
    cache = torch.full((2, sum(used) + 2, size, 2, 16), float("nan")).to(torch.float8_e4m3fn if fp8 else torch.float32)
    scales = (torch.tensor(0.3), torch.tensor([0.5, 2.0])) if fp8 else (None, None)
    q, expected = random(sum(new), 4, 16), []
    for b, (row, m, n) in enumerate(zip(q.split(new), new, lengths, strict=True)):
        table[b, : used[b]] = pages[b]
        kv = torch.stack([random(n, 2, 16, seed=10 + b), random(n, 2, 16, seed=20 + b)]).to(cache.dtype)
        for i in range(n):
            cache[:, table[b, i // size], i % size] = kv[:, i]
        k, v = (x.float() if s is None else x.float() * s.view(-1, 1) for x, s in zip(kv, scales, strict=True))
        expected.append(naive_attention(row, k, v, causal=True) if m else row.double())
    ours = reference.paged_prefill_attention(q, *cache, table, torch.tensor(lengths), offsets(new), 12, *scales)
    assert ours.dtype == torch.float32
    assert relative(ours, torch.cat(expected)) < F32


def test_paged_prefill_attention_of_slots_without_a_document() -> None:
    q, cache = random(3, 2, 16), torch.full((1, 4, 2, 16), float("nan"))
    none = torch.zeros(2, dtype=torch.int64)
    out = reference.paged_prefill_attention(q, cache, cache, none[:, None], none, offsets([1, 2]), 2)
    assert torch.equal(out, torch.zeros_like(q))


def naive_rms_norm(s: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.stack([row / math.sqrt(row.dot(row) / len(row) + eps) for row in s.double()]) * weight.double()


@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm(rows: int) -> None:
    x, residual, weight = random(rows, 48) * 1e-2, random(rows, 48, seed=1), random(48, seed=2)
    normed, summed = reference.rms_norm(x, weight, 1e-5)
    assert torch.equal(summed, x)
    assert relative(normed, naive_rms_norm(x, weight, 1e-5)) < F32
    normed, summed = reference.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(summed, x + residual)
    assert relative(normed, naive_rms_norm(x.double() + residual.double(), weight, 1e-5)) < F32
    both = [leaf(2, 6), leaf(6, seed=1), leaf(2, 6, seed=2)]
    assert gradcheck(lambda x, w, r: reference.rms_norm(x, w, 1e-5, r), both)


def test_rms_norm_sums_half_precision_in_float32() -> None:
    x = torch.full((1, 4096), 100.0, dtype=torch.float16)  # its squares overflow float16
    normed, _ = reference.rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-5)
    assert normed.dtype == torch.float16
    assert torch.equal(normed, torch.ones_like(x))


def test_layer_norm() -> None:
    x, weight, bias = random(3, 40) + 5, random(40, seed=1), random(40, seed=2)
    wide = x.double()
    centred = wide - wide.sum(1, keepdim=True) / 40
    expected = centred / (centred.pow(2).sum(1, keepdim=True) / 40 + 1e-6).sqrt() * weight.double() + bias.double()
    assert relative(reference.layer_norm(x, weight, bias, 1e-6), expected) < F32


def test_rope_is_a_complex_product() -> None:
    positions = torch.tensor([0, 1, 2, 0, 1, 17, 16383], dtype=torch.int32)
    qkv, theta = random(7, 5, 16), 500000.0
    cos, sin = reference.rope_table(positions, 16, theta)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (7, 8)
    turned = reference.rope(qkv, cos, sin, 3)

    angles = positions.double()[:, None] * torch.tensor([theta ** (-2 * i / 16) for i in range(8)]).double()
    pairs = torch.complex(qkv[..., :8].double(), qkv[..., 8:].double())
    expected = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    near = 1e-3  # angles of 16383 radians have seven digits in float32, as in the published code
    assert relative(turned[:, :3], torch.cat([expected.real, expected.imag], -1)[:, :3]) < near
    assert relative(turned[:6, :3], torch.cat([expected.real, expected.imag], -1)[:6, :3]) < F32
    assert torch.equal(turned[:, 3:], qkv[:, 3:])
    assert torch.equal(turned[[0, 3]], qkv[[0, 3]])
    assert gradcheck(lambda x: reference.rope(x, cos[:, :2], sin[:, :2], 1), leaf(7, 2, 4))


def test_pointwise() -> None:
    x = random(4, 26) * 3
    gate, up = x.double()[:, :13], x.double()[:, 13:]
    assert relative(reference.swiglu(x), gate / (1 + (-gate).exp()) * up) < F32
    wide = x.double()
    tanh = 0.5 * wide * (1 + (math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)).tanh())
    assert relative(reference.gelu_tanh(x), tanh) < F32
    assert gradcheck(reference.swiglu, leaf(2, 6)) and gradcheck(reference.gelu_tanh, leaf(2, 3))


def test_decode_gemv() -> None:
    x, w, norm = random(3, 160) * 2, random(12, 160, seed=1), random(160, seed=2)
    for given, columns in ((w, w.double()), (q := quantize(w, "int4"), dequantize(q, torch.float64))):
        sums = naive_rms_norm(x, norm, 1e-5) @ columns.T
        gated = sums[:, :6] / (1 + (-sums[:, :6]).exp()) * sums[:, 6:]
        for swiglu, expected in ((False, sums), (True, gated)):
            residual = random(*expected.shape, seed=3)
            y = reference.decode_gemv(x, given, norm, 1e-5, residual, swiglu)
            assert relative(y, expected + residual.double()) < F32
        assert relative(reference.decode_gemv(x, given), x.double() @ columns.T) < F32


def test_projector() -> None:
    x, w0, b0, w1, b1 = (
        random(5, 6),
        random(9, 6, seed=1),
        random(9, seed=2),
        random(9, 9, seed=3),
        random(9, seed=4),
    )
    h = x.double() @ w0.double().T + b0.double()
    expected = (h * 0.5 * (1 + (h / math.sqrt(2)).erf())) @ w1.double().T + b1.double()
    assert relative(reference.projector(x, w0, b0, w1, b1), expected) < F32


def resized(table: Tensor, rows: int, cols: int) -> Tensor:
    """By PyTorch, which is wrong on a CPU for one column, but not for one row: that case goes transposed."""
    side = math.isqrt(len(table))
    image = table.double().view(side, side, -1).permute(2, 0, 1)[None]
    turn = cols == 1
    size = (cols, rows) if turn else (rows, cols)
    out = F.interpolate(image.mT if turn else image, size, mode="bilinear", antialias=True)
    return (out.mT if turn else out)[0].flatten(1).T


@pytest.mark.parametrize("side", [1, 4, 16])
@pytest.mark.parametrize("grids", [[(1, 1)], [(4, 4), (1, 9), (4, 4), (3, 2)], [(9, 1), (17, 15)], [(2, 40)], []])
def test_patch_embed(grids: list[tuple[int, int]], side: int) -> None:
    counts = [rows * cols for rows, cols in grids]
    patches, weight, bias = random(sum(counts), 768), random(10, 768, seed=1), random(10, seed=2)
    table = 30 * random(side * side, 10, seed=3)  # as large as the projected patches
    ours = reference.patch_embed(patches, weight, bias, table, torch.tensor(grids, dtype=torch.int32).view(-1, 2))
    projected = patches.double() @ weight.double().T + bias.double()
    for x, part, grid in zip(ours.split(counts), projected.split(counts), grids, strict=True):
        assert relative(x, part + resized(table, *grid)) < F32
    assert ours.shape == (sum(counts), 10)


def test_a_column_of_the_position_table_by_hand() -> None:
    """2 x 2 rows to 4 x 1: the columns' mean, and rows at -1/4 (clamped), 1/4, 3/4 and 5/4 (clamped)."""
    table = torch.tensor([[0.0], [2.0], [4.0], [10.0]])
    zeros = torch.zeros(4, 768), torch.zeros(1, 768), torch.zeros(1)
    out = reference.patch_embed(*zeros, table, torch.tensor([[4, 1]]))
    assert out[:, 0].tolist() == pytest.approx([1.0, 2.5, 5.5, 7.0])


def test_patch_embed_gradient() -> None:
    grids = torch.tensor([[2, 3], [1, 1], [2, 3]])
    inputs = leaf(13, 5), leaf(4, 5, seed=1), leaf(4, seed=2), leaf(9, 4, seed=3)
    assert gradcheck(lambda *x: reference.patch_embed(*x, grids), inputs)


def test_scatter_rows() -> None:
    row, values, index = leaf(6, 3), leaf(2, 3, seed=1), torch.tensor([4, 1])
    expected = [values[[4, 1].index(i)] if i in (4, 1) else row[i] for i in range(6)]
    assert torch.equal(reference.scatter_rows(row, values, index), torch.stack(expected))
    assert torch.equal(reference.scatter_rows(row, values[:0], index[:0]), row)
    grad_row, grad_values = torch.autograd.grad(reference.scatter_rows(row, values, index).sum(), (row, values))
    assert grad_row[:, 0].tolist() == [1, 0, 1, 1, 0, 1] and grad_values.unique().tolist() == [1]


@pytest.mark.parametrize("labelled", [[], [0], [2, 3, 6], list(range(7))])
def test_linear_cross_entropy(labelled: list[int]) -> None:
    hidden, weight = leaf(7, 5), leaf(11, 5, seed=1)
    targets = torch.full((7,), -100)
    targets[labelled] = torch.tensor(labelled, dtype=torch.int64) + 3
    total, count = reference.linear_cross_entropy(hidden, weight, targets)
    expected = sum(
        (((hidden[i] @ weight.T).exp().sum()).log() - hidden[i] @ weight[i + 3] for i in labelled),
        start=0.0 * (hidden.sum() + weight.sum()),
    )
    assert (count.item(), count.dtype) == (len(labelled), torch.int64)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (total, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)
    marked = torch.tensor([True, False, False, True, False, False, True])
    again, _, part = reference.linear_cross_entropy(hidden, weight, targets, marked=marked)
    kept = targets.masked_fill(~marked, -100)
    assert torch.equal(again, total) and not part.requires_grad
    assert part.item() == pytest.approx(reference.linear_cross_entropy(hidden, weight, kept)[0].item(), rel=1e-12)
    half = reference.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)[0]
    assert half.dtype == torch.float32 and half.item() == pytest.approx(total.item(), rel=0.02)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw(weight_decay: float) -> None:
    ours = random(3, 5)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=weight_decay)
    exp_avg, exp_avg_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 8):
        theirs.grad = random(3, 5, seed=step) * 10 ** (step % 3 - 1)
        reference.adamw(ours, theirs.grad, exp_avg, exp_avg_sq, step, 1e-2, (0.9, 0.95), 1e-6, weight_decay)
        optimizer.step()
        assert relative(ours, theirs) < 1e-6
    assert relative(exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"]) < 1e-6
