"""Context parallelism: N ranks share each packed row, for rows whose activations do not fit one GPU.

All-to-all attention (DeepSpeed-Ulysses, Jacobs et al. 2023) over packed documents. Each of N neighbouring ranks holds
a contiguous shard of the row, T / N tokens, and does everything but attention on it alone. For attention an all-to-all
exchanges tokens for heads: each rank gets all T tokens of H / N query heads, with the key heads that these read,
attends inside the row's documents as one rank would, and a second all-to-all sends the outputs back.

Per decoder layer a rank sends T / N · (2 H + 2 G) · D numbers, 1 / N of them to itself, forward, and as many backward;
with ``--checkpointing full`` the forward ones twice. G counts a key head once for every rank that reads it. At
T = 16384 and N = 2 these are 105 MB a layer and direction for the published model in bfloat16. Of a row's activations a
rank holds an Nth in the decoder and the loss, and in the tower those of its images; weights and optimizer states are
sharded by ``--shard`` alone.
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

from phi4rv.batch import AttentionFn, PackedBatch
from phi4rv.config import Config
from phi4rv.errors import UserError
from train.distributed.ranks import TIMEOUT, Ranks


@dataclass(frozen=True)
class ContextParallel:
    """This rank among the ``size`` neighbours that share its rows. ``group`` communicates in the model,
    ``loader_group`` on the loader's thread.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    loader_group: dist.ProcessGroup | None = None

    def shard(self, batch: PackedBatch) -> PackedBatch:
        """This rank's shard of a row that every rank of the group has."""
        return batch if self.size == 1 else replace(shard_sequence(batch, self.size)[self.rank], cp=self)

    def scatter(self, batch: PackedBatch | None, source: int) -> PackedBatch | None:
        """This rank's shard of the row that rank ``source`` of the group has, or None if that has none.

        One rank loads a row for all: an image that one of them cannot read in time would make their rows differ.
        """
        if self.size == 1:
            return batch
        shards: list[Any] | None = None
        if self.rank == source:
            shards = shard_sequence(batch, self.size) if batch is not None else [None] * self.size
        received: list[Any] = [None]
        dist.scatter_object_list(received, shards, group=self.loader_group, group_src=source)
        return None if received[0] is None else replace(received[0], cp=self)


NO_CONTEXT_PARALLEL = ContextParallel()


def init_context_parallel(size: int, ranks: Ranks, replicas: int = 1) -> ContextParallel:
    """Groups of ``size`` neighbouring ranks. UserError if ``size`` does not divide the ranks of a model replica."""
    if size == 1:
        return NO_CONTEXT_PARALLEL
    if size < 1 or ranks.world_size % (replicas * size):
        copies = f" in {replicas} replicas" if replicas > 1 else ""
        raise UserError(
            f"--context: {ranks.world_size} process(es){copies} cannot share rows {size} at a time; "
            f"give a divisor of {max(1, ranks.world_size // replicas)}"
        )
    group, _ = dist.new_subgroups(size, timeout=TIMEOUT)
    loader_group, _ = dist.new_subgroups(size, timeout=TIMEOUT, backend="gloo")
    return ContextParallel(ranks.rank % size, size, group, loader_group)


def check_heads(config: Config, size: int) -> None:
    """UserError if ``size`` ranks cannot share the query heads evenly."""
    heads = config.num_attention_heads
    if heads % size:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"--context: {size} processes cannot share {heads} query heads evenly; give one of {divisors}")


@dataclass(frozen=True, kw_only=True)
class SequenceShard(PackedBatch):
    """Tokens ``bounds[rank]:bounds[rank + 1]`` of a packed row, and the images with patches among them.

    ``cu_seqlens``, ``max_seqlen`` and ``reasoning`` are the whole row's. ``local_targets`` (t,) int64 and
    ``local_reasoning`` (t,) bool are these tokens' part of its targets and reasoning rows; ``first_patch`` is the first
    of the images' patches whose position is in this shard, as a shard may begin inside an image.
    """

    bounds: tuple[int, ...]
    local_targets: Tensor
    local_reasoning: Tensor
    first_patch: int
    cp: ContextParallel = NO_CONTEXT_PARALLEL

    def targets(self) -> Tensor:
        return self.local_targets

    def reasoning_rows(self) -> Tensor:
        return self.local_reasoning

    def drop_dummy_patches(self, features: Tensor) -> Tensor:
        return features[self.first_patch : self.first_patch + len(self.image_positions)]

    def distribute_attention(self, attend: AttentionFn) -> AttentionFn:
        return ulysses_attention(attend, self.cp, [stop - start for start, stop in pairwise(self.bounds)])


def shard_sequence(row: PackedBatch, count: int) -> list[SequenceShard]:
    """``row``, on the CPU, in ``count`` contiguous shards whose lengths differ by at most one; some may be empty.

    An image on a boundary goes to both shards, each of which uses the features of its own patches.
    """
    bounds = tuple(len(row.input_ids) * i // count for i in range(count + 1))
    targets, reasoning_rows = row.targets(), row.reasoning_rows()
    patches = torch.searchsorted(row.image_positions, torch.tensor(bounds)).tolist()  # they ascend
    shards = []
    for (start, stop), (low, high) in zip(pairwise(bounds), pairwise(patches), strict=True):
        tokens = slice(start, stop)
        shown = (row.cu_patches[1:] > low) & (row.cu_patches[:-1] < high)
        images = shown.nonzero().flatten().tolist() if high > low else []
        first, last = (images[0], images[-1] + 1) if images else (0, 0)
        begin, end = int(row.cu_patches[first]), int(row.cu_patches[last])
        # clone: pickling a view would send the whole storage.
        shards.append(
            SequenceShard(
                input_ids=row.input_ids[tokens].clone(),
                positions=row.positions[tokens].clone(),
                cu_seqlens=row.cu_seqlens,
                max_seqlen=row.max_seqlen,
                labels=None if row.labels is None else row.labels[tokens].clone(),
                patches=row.patches[begin:end].clone(),
                grids=row.grids[first:last].clone(),
                cu_patches=row.cu_patches[first : last + 1] - begin,
                max_patches=int(row.cu_patches[first : last + 1].diff().max()) if images else 0,
                image_positions=row.image_positions[low:high] - start,
                reasoning=row.reasoning,
                bounds=bounds,
                local_targets=targets[tokens].clone(),
                local_reasoning=reasoning_rows[tokens].clone(),
                first_patch=low - begin,
            )
        )
    return shards


def ulysses_attention(attend: AttentionFn, cp: ContextParallel, lengths: Sequence[int]) -> AttentionFn:
    """Wraps ``attend``, which takes a whole row, for this rank's ``lengths[rank]`` tokens of it: q (t, H, D), k and v
    (t, G, D) -> (t, H, D). Every rank of the group calls it, forward and backward, in the same order.
    """
    rank, size = cp.rank, cp.size

    def sharded_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (local_tokens, heads, dim), keys = q.shape, k.shape[1]
        shares = [local_heads(r, size, heads, keys) for r in range(size)]
        parts = [torch.cat([q[:, a], k[:, b], v[:, b]], dim=1) for a, b in shares]
        width = parts[rank].shape[1]
        input_splits, output_splits = [part.numel() for part in parts], [n * width * dim for n in lengths]
        row = AllToAll.apply(torch.cat([part.flatten() for part in parts]), input_splits, output_splits, cp.group)
        queries = heads // size
        q, k, v = row.view(-1, width, dim).split([queries, *[(width - queries) // 2] * 2], dim=1)
        index = kv_head_index(rank, size, heads, keys)
        if index != list(range(k.shape[1])):
            k, v = (torch.stack([x[:, i] for i in index], dim=1) for x in (k, v))
        out = attend(layer, q, k, v)
        input_splits, output_splits = [n * queries * dim for n in lengths], [local_tokens * queries * dim] * size
        out = AllToAll.apply(out.flatten(), input_splits, output_splits, cp.group)
        return out.view(size, local_tokens, queries, dim).transpose(0, 1).reshape(local_tokens, heads, dim)

    return sharded_attention


def local_heads(rank: int, size: int, heads: int, keys: int) -> tuple[slice, slice]:
    """Which of ``heads`` query heads a rank attends with, and which of ``keys`` key heads these read."""
    start, stop, group = heads * rank // size, heads * (rank + 1) // size, heads // keys
    return slice(start, stop), slice(start // group, (stop - 1) // group + 1)


def kv_head_index(rank: int, size: int, heads: int, keys: int) -> list[int]:
    """Indices into the rank's key heads, repeated so that each is read by equally many consecutive query heads.

    No repeats where the number of ranks divides that of key heads. Else a rank may have parts of groups of query heads,
    of unequal sizes: their greatest common divisor is the new group size.
    """
    queries, key_heads = local_heads(rank, size, heads, keys)
    group = heads // keys
    group_size = math.gcd(heads // size, group)
    return [query // group - key_heads.start for query in range(queries.start, queries.stop, group_size)]


class AllToAll(torch.autograd.Function):
    """``all_to_all_single`` with a backward pass: x (n,), split by rank -> what the ranks send here, in their order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.reverse = output_splits, input_splits, group
        return _all_to_all(x, input_splits, output_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad.contiguous(), *ctx.reverse), None, None, None


def _all_to_all(
    x: Tensor, input_splits: list[int], output_splits: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    out = x.new_empty(sum(output_splits))
    dist.all_to_all_single(out, x, output_splits, input_splits, group)
    return out
