"""Packed rows of random tokens and pixels whose documents are as long as those of ``benchmarks/data/mixture.py``."""

from __future__ import annotations

import math
from itertools import islice

import torch

from benchmarks.data.mixture import TEMPLATE_TOKENS, SampleLengths, mixture
from phi4rv.batch import NO_LABEL, PackedBatch, Sample, pack
from phi4rv.config import Config
from phi4rv.processing.images import PATCH_DIM
from train.data.flops import flops
from train.data.packing import pack_sequences
from train.recipe import PARTS

TOKENS = 8192  # of a row at full size
CASES = ("text", "images")


def make_batches(case: str, config: Config, tokens: int, rows: int) -> list[PackedBatch]:
    """Packed rows of at most ``tokens``, of documents as long as the mixture's, in proportion to 8192."""
    generator = torch.Generator().manual_seed(0)
    shrunk = (_shrink(lengths, tokens / TOKENS) for lengths in mixture())
    groups = pack_sequences(shrunk, lambda s: s.length, tokens)
    return [pack([_sample(s, case, config, generator) for s in group]) for group in islice(groups, rows)]


def _shrink(s: SampleLengths, scale: float) -> SampleLengths:
    """The sample at another scale. ``length`` counts what ``grid`` leaves of its patches."""
    frame = s.length - sum(s.patches) - s.labelled
    patches = tuple(max(1, int(n * scale)) for n in s.patches)
    labelled = max(1, int(s.labelled * scale))
    return SampleLengths(max(1, int(frame * scale)) + _num_patches(patches) + labelled, patches, labelled, s.thinking)


def _num_patches(patches: tuple[int, ...]) -> int:
    return sum(math.prod(grid(n)) for n in patches)


def grid(patches: int) -> tuple[int, int]:
    """Rows and columns of a picture of about 16:9 with at most so many patches."""
    rows = max(1, math.isqrt(patches * 9 // 16))
    return rows, patches // rows


def _sample(s: SampleLengths, case: str, config: Config, generator: torch.Generator) -> Sample:
    ids = torch.randint(config.vocab_size, (s.length,), generator=generator)
    labels = torch.full_like(ids, NO_LABEL)
    labels[-s.labelled :] = ids[-s.labelled :]
    patches = s.patches if case == "images" else ()
    placed = _num_patches(patches)
    return Sample(
        ids,
        labels,
        torch.randn(placed, PATCH_DIM, generator=generator),
        torch.tensor([grid(n) for n in patches], dtype=torch.int32).reshape(-1, 2),
        torch.arange(placed) + min(TEMPLATE_TOKENS, s.length - placed - s.labelled),
        s.thinking,
    )


def count_work(config: Config, rows: list[PackedBatch]) -> dict[str, float]:
    """What a step holds; counted as ``train/trainer.py`` counts it."""
    lengths = [n for row in rows for n in row.cu_seqlens.diff().tolist()]
    patches = [n for row in rows for n in row.cu_patches.diff().tolist()]
    labelled = sum(int((row.targets() != NO_LABEL).sum()) for row in rows)
    useful = flops(config, lengths, patches, labelled, PARTS).total
    return {"operations": useful, "tokens": sum(lengths), "images": len(patches)}
