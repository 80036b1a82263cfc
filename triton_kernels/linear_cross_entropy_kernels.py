"""The device side of ``linear_cross_entropy``: its kernels and the configurations that they may be given.

Every product runs as one program a multiprocessor that walks over tiles. How many tiles there are follows from the
number of labelled rows, which only the device knows: no grid and no buffer depends on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_kernels.common.tuning import Config, SearchSpace

# Rows and columns of the buffer of logit gradients come in this many: every tile divides it.
ALIGN = 256
_ALIGN = tl.constexpr(ALIGN)
_LOG2E = tl.constexpr(1.4426950408889634)
_NO_LABEL = tl.constexpr(-100)


def _config(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": group, "num_warps": warps, "num_stages": stages}


# float32 products run on the ordinary units, in float32: small tiles, which their registers and copies fit.
_FLOAT32 = [_config(64, 64, 32, 8, 8, 3), _config(32, 64, 32, 8, 4, 3)]
_FORWARD = [
    _config(128, 256, 64, 16, 8, 4),
    _config(128, 256, 64, 8, 8, 4),
    _config(256, 128, 64, 8, 8, 4),
    _config(128, 128, 64, 16, 4, 3),
]
_LOGITS = [
    _config(128, 256, 64, 16, 8, 4),
    _config(128, 256, 64, 8, 8, 4),
    _config(128, 256, 64, 16, 8, 3),
    _config(128, 128, 64, 16, 8, 3),
]
# A load through the index takes a stage of its own before each of the product's: 5 stages are 3 buffers, 7 are 4.
_WEIGHT = [
    _config(128, 256, 64, 16, 8, 7),
    _config(128, 256, 64, 16, 8, 5),
    _config(256, 128, 64, 8, 8, 5),
    _config(128, 128, 64, 16, 4, 5),
]
_HIDDEN = [
    _config(128, 256, 64, 16, 8, 4),
    _config(128, 256, 64, 8, 8, 4),
    _config(256, 128, 64, 8, 8, 4),
    _config(128, 128, 64, 16, 4, 3),
]
# BLOCK_K of WEIGHT and HIDDEN divides BLOCK_M and BLOCK_N of LOGITS: what they read, it has written.
FORWARD = SearchSpace("linear_cross_entropy.forward", {"short": _FORWARD, "float32": _FLOAT32})
LOGITS = SearchSpace("linear_cross_entropy.logits", {"short": _LOGITS, "float32": _FLOAT32})
WEIGHT = SearchSpace("linear_cross_entropy.weight", {"short": _WEIGHT, "float32": _FLOAT32})
HIDDEN = SearchSpace("linear_cross_entropy.hidden", {"short": _HIDDEN, "float32": _FLOAT32})


@triton.jit
def compact(targets, index, count, T, padded, BLOCK: tl.constexpr):
    """The labelled rows' numbers in order, then the first of them up to ``padded``; and how many they are."""
    found = 0
    first = T
    for start in range(0, T, BLOCK):
        row = start + tl.arange(0, BLOCK)
        labelled = tl.load(targets + row, mask=row < T, other=_NO_LABEL) != _NO_LABEL
        offsets = found + tl.cumsum(labelled.to(tl.int32), 0) - 1
        tl.store(index + offsets, row, mask=labelled)
        found += tl.sum(labelled.to(tl.int32), 0)
        first = tl.minimum(first, tl.min(tl.where(labelled, row, T), 0))
    tl.store(count, found)
    first = tl.where(found > 0, first, 0)
    for start in range(0, padded, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(index + offsets, tl.zeros((BLOCK,), tl.int32) + first, mask=(offsets >= found) & (offsets < padded))


@triton.jit
def _grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP rows before the next column, so that the rows' operand stays in L2."""
    band = tile // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - band * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return band * GROUP + within % rows, within // rows


@triton.jit
def _columns(labelled, elements, V):
    """How many columns of logit gradients, for all labelled rows, a buffer of that many elements holds."""
    rows = tl.maximum(tl.cdiv(labelled, _ALIGN), 1) * _ALIGN
    fit = elements // rows // _ALIGN  # elements is a multiple of both, and 64 bits wide
    return (tl.minimum(fit, tl.cdiv(V, _ALIGN)) * _ALIGN).to(tl.int32)


@triton.jit
def _logits(
    hidden, weight, index, hidden_stride, weight_stride, row, col, V, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """hidden[index[row:]] · weight[col:]ᵀ, (BLOCK_M, BLOCK_N) float32. Columns from V on repeat the last."""
    k = tl.arange(0, BLOCK_K)
    source = tl.load(index + row + tl.arange(0, BLOCK_M)).to(tl.int64)
    vocabulary = tl.minimum(col + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
    a = hidden + source[:, None] * hidden_stride + k[None, :]
    b = weight + vocabulary[:, None] * weight_stride + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        if EVEN:
            x = tl.load(a)
            w = tl.load(b)
        else:
            x = tl.load(a, mask=k[None, :] < C - start, other=0.0)
            w = tl.load(b, mask=k[None, :] < C - start, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
        a += BLOCK_K
        b += BLOCK_K
    return acc


@triton.jit
def forward(
    hidden, weight, targets, index, count, largest, total, target_logit, hidden_stride, weight_stride, padded, V, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """largest[n, row], total[n, row]: the largest logit m of a vocabulary tile and its sum of exp(logit - m);
    target_logit[row]: the target's logit."""
    labelled = tl.load(count).to(tl.int32)
    tiles_m, tiles_n = tl.cdiv(labelled, BLOCK_M), tl.cdiv(V, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _grouped_tile(tile, tiles_m, tiles_n, GROUP)
        row, col = m * BLOCK_M, n * BLOCK_N
        s = _logits(
            hidden, weight, index, hidden_stride, weight_stride, row, col, V, C, BLOCK_M, BLOCK_N, BLOCK_K, EVEN
        )  # fmt: skip
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        s = tl.where(cols[None, :] < V, s, float("-inf"))
        row_max = tl.max(s, 1)
        offsets = n.to(tl.int64) * padded + rows
        tl.store(largest + offsets, row_max)
        tl.store(total + offsets, tl.sum(tl.exp2((s - row_max[:, None]) * _LOG2E), 1))
        target = tl.load(targets + tl.load(index + rows))
        here = (target >= col) & (target < tl.minimum(col + BLOCK_N, V)) & (rows < labelled)
        mine = tl.sum(tl.where(cols[None, :] == target[:, None], s, 0.0), 1)
        tl.store(target_logit + rows, mine, mask=here)


@triton.jit
def combine(
    largest,
    total,
    target_logit,
    count,
    row_largest,
    row_total,
    losses,
    padded,
    tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Each labelled row's largest logit, sum and loss from its tiles; inf, 1 and 0 in the rows after them."""
    labelled = tl.load(count)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < labelled
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = (start + tl.arange(0, TILES)).to(tl.int64)
        offsets = tile[:, None] * padded + row[None, :]
        mask = (tile[:, None] < tiles) & inside[None, :]
        m = tl.load(largest + offsets, mask=mask, other=float("-inf"))
        s = tl.load(total + offsets, mask=mask, other=0.0)
        new = tl.maximum(row_max, tl.max(m, 0))
        base = tl.where(new == float("-inf"), 0.0, new)  # rows without a label have no tiles
        sums = sums * tl.exp(row_max - base) + tl.sum(s * tl.exp(m - base[None, :]), 0)
        row_max = new
    row_max = tl.where(inside, row_max, float("inf"))
    sums = tl.where(inside, sums, 1.0)
    tl.store(row_largest + row, row_max)
    tl.store(row_total + row, sums)
    tl.store(losses + row, tl.where(inside, tl.log(sums) - (tl.load(target_logit + row) - row_max), 0.0))


@triton.jit(do_not_specialize=["chunk"])
def logits_gradient(
    hidden, weight, targets, index, count, largest, total, dlogits, hidden_stride, weight_stride, elements, chunk,
    filter_below, V, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    FILTER: tl.constexpr,
):  # fmt: skip
    """softmax - onehot of one chunk of the vocabulary, and zeros in rows that only fill up a tile. Columns that do are
    finite where the others are, and no product reads them against anything but zeros."""
    labelled = tl.load(count).to(tl.int32)
    columns = tl.multiple_of(_columns(labelled, elements, V), _ALIGN)
    before = chunk.to(tl.int64) * columns
    present = tl.maximum(tl.minimum(V - before, columns), 0).to(tl.int32)
    tiles_m, tiles_n = tl.cdiv(labelled, BLOCK_M), tl.cdiv(present, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _grouped_tile(tile, tiles_m, tiles_n, GROUP)
        row, col = m * BLOCK_M, n * BLOCK_N
        first = before.to(tl.int32) + col
        s = _logits(
            hidden, weight, index, hidden_stride, weight_stride, row, first, V, C, BLOCK_M, BLOCK_N, BLOCK_K, EVEN
        )  # fmt: skip
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        target = tl.load(targets + tl.load(index + rows), mask=rows < labelled, other=-1) - before
        # 0 after the labelled rows: their largest is inf.
        p = tl.exp2((s - tl.load(largest + rows)[:, None]) * _LOG2E) * (1.0 / tl.load(total + rows))[:, None]
        onehot = cols[None, :] == target[:, None]
        g = p - tl.where(onehot, 1.0, 0.0)
        if FILTER:
            g = tl.where((p >= filter_below) | onehot, g, 0.0)
        pointers = dlogits + rows.to(tl.int64)[:, None] * columns + cols[None, :]
        tl.store(pointers, g.to(dlogits.dtype.element_ty))


@triton.jit(do_not_specialize=["chunk"])
def weight_gradient(
    dlogits, hidden, index, count, scale, dweight, hidden_stride, elements, chunk, V, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dweight[chunk] = scale · dlogitsᵀ · hidden[index]: complete, as the chunk has all labelled rows."""
    labelled = tl.load(count).to(tl.int32)
    columns = tl.multiple_of(_columns(labelled, elements, V), _ALIGN)
    before = chunk.to(tl.int64) * columns
    present = tl.maximum(tl.minimum(V - before, columns), 0).to(tl.int32)
    factor = tl.load(scale)
    tiles_m, tiles_n = tl.cdiv(present, BLOCK_M), tl.cdiv(C, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _grouped_tile(tile, tiles_m, tiles_n, GROUP)
        k = tl.arange(0, BLOCK_K)
        rows, cols = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
        a = dlogits + k.to(tl.int64)[:, None] * columns + rows[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, labelled, BLOCK_K):
            # No mask: past the labelled rows dlogits is 0 up to its tile's end, and index names a labelled row.
            source = tl.load(index + start + k).to(tl.int64)
            b = hidden + source[:, None] * hidden_stride + cols[None, :]
            x = tl.load(b) if EVEN else tl.load(b, mask=cols[None, :] < C, other=0.0)
            acc = tl.dot(tl.load(a).T, x, acc, input_precision="ieee")
            a += BLOCK_K * columns.to(tl.int64)
        pointers = dweight + (before + rows)[:, None] * C + cols[None, :]
        out = (acc * factor).to(dweight.dtype.element_ty)
        mask = rows[:, None] < present
        tl.store(pointers, out, mask=mask if EVEN else mask & (cols[None, :] < C))


@triton.jit
def _accumulate(part, out, rest, start, columns, col: tl.constexpr, REST: tl.constexpr):
    """out + rest += part, at start + col, in each row's first ``columns``; rest is what rounding takes from out."""
    cols = col + tl.arange(0, part.shape[1])[None, :]
    mask = cols < columns
    part += tl.load(out + start + cols, mask=mask, other=0.0).to(tl.float32)
    if REST:
        part += tl.load(rest + start + cols, mask=mask, other=0.0).to(tl.float32)
    rounded = part.to(out.dtype.element_ty)
    tl.store(out + start + cols, rounded, mask=mask)
    if REST:
        tl.store(rest + start + cols, (part - rounded.to(tl.float32)).to(rest.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunk"])
def hidden_gradient(
    dlogits, weight, index, count, scale, dhidden, rest, weight_stride, elements, chunk, V, C,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """dhidden[index] += scale · dlogits · weight[chunk]. What rounding takes from dhidden is kept in ``rest``."""
    labelled = tl.load(count).to(tl.int32)
    columns = tl.multiple_of(_columns(labelled, elements, V), _ALIGN)
    before = chunk.to(tl.int64) * columns
    present = tl.maximum(tl.minimum(V - before, columns), 0).to(tl.int32)
    factor = tl.load(scale)
    tiles_m, tiles_n = tl.cdiv(labelled, BLOCK_M), tl.cdiv(C, BLOCK_N)
    tiles = tl.where(present > 0, tiles_m * tiles_n, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = _grouped_tile(tile, tiles_m, tiles_n, GROUP)
        k = tl.arange(0, BLOCK_K)
        rows, cols = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
        a = dlogits + rows.to(tl.int64)[:, None] * columns + k[None, :]
        b = weight + (before + k)[:, None] * weight_stride + cols[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, present, BLOCK_K):
            mask = (k[:, None] < present - start) & (cols[None, :] < C)
            w = tl.load(b) if EVEN else tl.load(b, mask=mask, other=0.0)
            acc = tl.dot(tl.load(a), w, acc, input_precision="ieee")
            a += BLOCK_K
            b += BLOCK_K * weight_stride
        # In quarters: the sum, its two parts and their addresses together do not fit the registers.
        target = tl.load(index + rows).to(tl.int64)[:, None] * C + n * BLOCK_N
        rows = tl.where(rows < labelled, C - n * BLOCK_N, 0)[:, None]  # columns of each row that exist
        acc = tl.reshape(acc * factor, (BLOCK_M, 2, 2, BLOCK_N // 4))
        left, right = tl.split(tl.permute(acc, (0, 2, 3, 1)))
        a0, a1 = tl.split(tl.permute(left, (0, 2, 1)))
        a2, a3 = tl.split(tl.permute(right, (0, 2, 1)))
        _accumulate(a0, dhidden, rest, target, rows, 0, REST)
        _accumulate(a1, dhidden, rest, target, rows, BLOCK_N // 4, REST)
        _accumulate(a2, dhidden, rest, target, rows, BLOCK_N // 2, REST)
        _accumulate(a3, dhidden, rest, target, rows, 3 * BLOCK_N // 4, REST)
