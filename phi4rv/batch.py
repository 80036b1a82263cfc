"""``Sample`` and ``PackedBatch``: one flat row of tokens, one flat row of patches, and where each thing begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from phi4rv.ops.reference import NO_LABEL

# attention_fn(layer, q (T, H, D), k (T, G, D), v (T, G, D)) -> (T, H, D). Training packs documents, the engine keeps a
# KV cache: which keys a row attends to is up to the caller, so the decoder knows of neither.
AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """One document before packing.

    ``input_ids`` (T,) int64 with ``NO_LABEL``-free ids (any id at image positions), ``labels`` (T,) int64 or None,
    ``image_positions`` (P,) int64 inside the document, ``grids`` (I, 2) int32, ``patches`` (P, 768) float32.
    ``reasoning``: its first answer begins with a thought.
    """

    input_ids: Tensor
    labels: Tensor | None
    patches: Tensor
    grids: Tensor
    image_positions: Tensor
    reasoning: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class PackedBatch:
    """What ``train`` and ``infer`` hand to the model; nothing in it is padded.

    field               shape, type              meaning
    ``input_ids``       (T,) int64               token ids; any id at image positions
    ``positions``       (T,) int32               position inside its document
    ``cu_seqlens``      (D+1,) int32             document offsets
    ``max_seqlen``      int                      longest document
    ``labels``          (T,) int64 or None       targets before shifting, -100 where none
    ``patches``         (P, 768)                 normalised pixels
    ``grids``           (I, 2) int32             rows, columns of each image
    ``cu_patches``      (I+1,) int32             image offsets
    ``max_patches``     int                      most patches of an image, 0 without images
    ``image_positions`` (P,) int64               where in the token row each patch goes
    ``reasoning``       (D,) bool or None        documents whose first answer begins with a thought
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor | None
    patches: Tensor
    grids: Tensor
    cu_patches: Tensor
    max_patches: int
    image_positions: Tensor
    reasoning: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on ``device``."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def documents(self) -> int:
        return len(self.cu_seqlens) - 1

    def reasoning_rows(self) -> Tensor:
        """(T,) bool: the rows of the documents that reason."""
        if self.reasoning is None:
            return torch.zeros_like(self.input_ids, dtype=torch.bool)
        return self.reasoning.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.input_ids))

    def targets(self) -> Tensor:
        """(T,) int64: the label of the **next** position of the same document, ``NO_LABEL`` where there is none."""
        if self.labels is None:
            raise ValueError("the batch has no labels: build it from samples that carry them")
        shifted = torch.roll(self.labels, -1)
        ends = self.cu_seqlens[1:].long() - 1
        return shifted.index_fill(0, ends, NO_LABEL)

    def drop_dummy_patches(self, features: Tensor) -> Tensor:
        """The features (P, C) of the patches that go into the row, without those of a trailing dummy image, which a
        rank without images encodes where other ranks have some (``train/distributed/fsdp.py``).
        """
        count = len(self.image_positions)
        return features if len(features) == count else features[:count]

    def distribute_attention(self, attention_fn: AttentionFn) -> AttentionFn:
        """``attention_fn``, which takes a whole row, for the tokens that this rank holds: all of them, unless ranks
        share a row (``train/distributed/context_parallel.py``).
        """
        return attention_fn


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Concatenates ``samples`` into one row. Labels are kept if every sample has them, else None."""
    if not samples or any(len(s) == 0 for s in samples):
        raise ValueError("pack needs one or more samples, none of them empty")
    lengths = torch.tensor([len(s) for s in samples])
    starts = _cu_seqlens(lengths)
    grids = torch.cat([s.grids for s in samples])
    patch_counts = grids.prod(dim=1)
    labels = [s.labels for s in samples]
    return PackedBatch(
        input_ids=torch.cat([s.input_ids for s in samples]),
        positions=torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths.tolist()]),
        cu_seqlens=starts,
        max_seqlen=int(lengths.max()),
        labels=torch.cat([x for x in labels if x is not None]) if all(x is not None for x in labels) else None,
        patches=torch.cat([s.patches for s in samples]),
        grids=grids,
        cu_patches=_cu_seqlens(patch_counts),
        max_patches=int(patch_counts.max()) if len(grids) else 0,
        image_positions=torch.cat(
            [s.image_positions + start for s, start in zip(samples, starts.tolist(), strict=False)]
        ),
        reasoning=torch.tensor([s.reasoning for s in samples]),
    )


def image_batch(patches: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> PackedBatch:
    """Images alone, for the vision tower: patches (P_i, 768) and rows, columns of each. No tokens, no documents."""
    sizes = torch.tensor(grids, dtype=torch.int32).view(-1, 2)
    counts = sizes.prod(dim=1)
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        input_ids=nothing,
        positions=nothing.to(torch.int32),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        max_seqlen=0,
        labels=None,
        patches=torch.cat(list(patches)),
        grids=sizes,
        cu_patches=_cu_seqlens(counts),
        max_patches=int(counts.max()),
        image_positions=nothing,
    )


def _cu_seqlens(lengths: Tensor) -> Tensor:
    """(N+1,) int32 running sum of (N,) lengths, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
