"""Context parallelism: a few ranks share each packed row, for rows whose activations do not fit one GPU.

All-to-all attention (DeepSpeed-Ulysses, Jacobs et al. 2023) over packed documents. Each of N neighbouring ranks holds
a run of the row's tokens, T / N of them, and does everything but attention on them alone. For attention the ranks
exchange tokens for heads: each gets all T tokens of H / N query heads, with the key heads that these read, attends
inside the row's documents as one rank would, and sends the outputs back to where the tokens are.

Per decoder layer a rank so sends T / N · (2 H + 2 G) · D numbers, of which 1 / N stay with itself, forward, and as many
backward; with ``--checkpointing full`` the forward ones twice. G counts a key head once for every rank that reads it.
At T = 16384 and N = 2 these are 105 MB a layer and direction for the published model in bfloat16. What a rank keeps of
a row in the decoder and the loss is an Nth, and of the tower what its images need; weights and the optimizer's state
are what ``--shard`` leaves of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phi4rv.batch import PackedBatch
from phi4rv.config import Config
from phi4rv.errors import UserError
from phi4rv.model.decoder import AttentionFn
from train.distributed.ranks import PATIENCE, Ranks


@dataclass(frozen=True)
class Context:
    """This rank's place among the ``size`` neighbours that share its rows. ``group`` exchanges in the model,
    ``loading`` on the loader's thread.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    loading: dist.ProcessGroup | None = None

    def own(self, batch: PackedBatch) -> PackedBatch:
        """This rank's part of a row that every rank of the group has."""
        return batch if self.size == 1 else replace(cut(batch, self.size)[self.rank], context=self)

    def hand_out(self, batch: PackedBatch | None, source: int) -> PackedBatch | None:
        """This rank's part of the row that rank ``source`` of the group has, or None if that has none.

        One of them reads it for all: an image that is late or unreadable for one cannot make their rows differ.
        """
        if self.size == 1:
            return batch
        pieces: list[Any] | None = None
        if self.rank == source:
            pieces = cut(batch, self.size) if batch is not None else [None] * self.size
        box: list[Any] = [None]
        dist.scatter_object_list(box, pieces, group=self.loading, group_src=source)
        return None if box[0] is None else replace(box[0], context=self)


ALONE = Context()


def join_context(size: int, ranks: Ranks, replicas: int = 1) -> Context:
    """Groups of ``size`` neighbouring ranks. UserError where they do not divide the ranks of a copy of the model."""
    if size == 1:
        return ALONE
    if size < 1 or ranks.world % (replicas * size):
        copies = f" in {replicas} copies of the model" if replicas > 1 else ""
        raise UserError(
            f"--context: {ranks.world} process(es){copies} cannot share rows {size} at a time; "
            f"give a divisor of {max(1, ranks.world // replicas)}"
        )
    group, _ = dist.new_subgroups(size, timeout=PATIENCE)
    loading, _ = dist.new_subgroups(size, timeout=PATIENCE, backend="gloo")
    return Context(ranks.rank % size, size, group, loading)


def check_heads(config: Config, size: int) -> None:
    """UserError if ``size`` ranks cannot share the query heads evenly."""
    heads = config.num_attention_heads
    if heads % size:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"--context: {size} processes cannot share {heads} query heads evenly; give one of {divisors}")


@dataclass(frozen=True, kw_only=True)
class Slice(PackedBatch):
    """Tokens ``bounds[rank]:bounds[rank + 1]`` of a packed row, and the images that they show a part of.

    ``cu_seqlens``, ``max_seqlen`` and ``reasoning`` are the whole row's. ``following`` (t,) int64 and ``reasoned`` (t,)
    bool are these tokens' part of its targets and reasoning rows; ``first_patch`` is where the patches that have a
    place here begin among those of the images, as the row may be cut inside of one.
    """

    bounds: tuple[int, ...]
    following: Tensor
    reasoned: Tensor
    first_patch: int
    context: Context = ALONE

    def targets(self) -> Tensor:
        return self.following

    def reasoning_rows(self) -> Tensor:
        return self.reasoned

    def drop_dummy_patches(self, features: Tensor) -> Tensor:
        return features[self.first_patch : self.first_patch + len(self.image_positions)]

    def distribute_attention(self, attend: AttentionFn) -> AttentionFn:
        return exchanged(attend, self.context, [stop - start for start, stop in pairwise(self.bounds)])


def cut(row: PackedBatch, count: int) -> list[Slice]:
    """``row``, on the CPU, in ``count`` runs of tokens whose lengths differ by one at most; some may be empty.

    An image on a cut goes to both sides, each of which uses the features of its own patches.
    """
    bounds = tuple(len(row.input_ids) * i // count for i in range(count + 1))
    targets, reasoned = row.targets(), row.reasoning_rows()
    patches = torch.searchsorted(row.image_positions, torch.tensor(bounds)).tolist()  # they ascend
    slices = []
    for (start, stop), (low, high) in zip(pairwise(bounds), pairwise(patches), strict=True):
        here = slice(start, stop)
        shown = (row.cu_patches[1:] > low) & (row.cu_patches[:-1] < high)
        images = shown.nonzero().flatten().tolist() if high > low else []
        first, last = (images[0], images[-1] + 1) if images else (0, 0)
        begin, end = int(row.cu_patches[first]), int(row.cu_patches[last])
        # Copies: what is sent of a view is all that it is a view of.
        slices.append(
            Slice(
                input_ids=row.input_ids[here].clone(),
                positions=row.positions[here].clone(),
                cu_seqlens=row.cu_seqlens,
                max_seqlen=row.max_seqlen,
                labels=None if row.labels is None else row.labels[here].clone(),
                patches=row.patches[begin:end].clone(),
                grids=row.grids[first:last].clone(),
                cu_patches=row.cu_patches[first : last + 1] - begin,
                max_patches=int(row.cu_patches[first : last + 1].diff().max()) if images else 0,
                image_positions=row.image_positions[low:high] - start,
                reasoning=row.reasoning,
                bounds=bounds,
                following=targets[here].clone(),
                reasoned=reasoned[here].clone(),
                first_patch=low - begin,
            )
        )
    return slices


def exchanged(attend: AttentionFn, context: Context, lengths: Sequence[int]) -> AttentionFn:
    """``attend``, which takes a whole row, for this rank's ``lengths[rank]`` tokens of it: q (t, H, D), k and v
    (t, G, D) -> (t, H, D). Every rank of the group calls it, forward and backward, in the same order.
    """
    rank, size = context.rank, context.size

    def attend_across(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (own, heads, dim), keys = q.shape, k.shape[1]
        shares = [heads_of(r, size, heads, keys) for r in range(size)]
        parts = [torch.cat([q[:, a], k[:, b], v[:, b]], dim=1) for a, b in shares]
        width = parts[rank].shape[1]
        sent, received = [part.numel() for part in parts], [n * width * dim for n in lengths]
        row = Exchange.apply(torch.cat([part.flatten() for part in parts]), sent, received, context.group)
        queries = heads // size
        q, k, v = row.view(-1, width, dim).split([queries, *[(width - queries) // 2] * 2], dim=1)
        index = keys_by_query(rank, size, heads, keys)
        if index != list(range(k.shape[1])):
            k, v = (torch.stack([x[:, i] for i in index], dim=1) for x in (k, v))
        out = attend(layer, q, k, v)
        sent, received = [n * queries * dim for n in lengths], [own * queries * dim] * size
        back = Exchange.apply(out.flatten(), sent, received, context.group)
        return back.view(size, own, queries, dim).transpose(0, 1).reshape(own, heads, dim)

    return attend_across


def heads_of(rank: int, size: int, heads: int, keys: int) -> tuple[slice, slice]:
    """Which of ``heads`` query heads a rank attends with, and which of ``keys`` key heads these read."""
    start, stop, group = heads * rank // size, heads * (rank + 1) // size, heads // keys
    return slice(start, stop), slice(start // group, (stop - 1) // group + 1)


def keys_by_query(rank: int, size: int, heads: int, keys: int) -> list[int]:
    """The rank's key heads, counted from its first, each so often that equally many of its query heads read each.

    Where the ranks divide the key heads that is once; else a group of query heads may be cut, and the groups' parts
    on a rank are of unequal sizes: their greatest common divisor is what reads one.
    """
    queries, keyed = heads_of(rank, size, heads, keys)
    group = heads // keys
    each = math.gcd(heads // size, group)
    return [query // group - keyed.start for query in range(queries.start, queries.stop, each)]


class Exchange(torch.autograd.Function):
    """Runs of x (n,), ``sent[r]`` numbers to rank r, for the runs that the ranks send here, in their order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.back = received, sent, group
        return _exchange(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad.contiguous(), *ctx.back), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty(sum(received))
    dist.all_to_all_single(out, x, received, sent, group)
    return out
