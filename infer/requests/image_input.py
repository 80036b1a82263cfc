"""An image of a prompt: identified by its content, cut into patches only when they are needed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from phi4rv.errors import UserError
from phi4rv.processing.images import image_size, image_to_patches, open_image
from phi4rv.processing.processor import Processor

Source = Image.Image | str | Path | bytes


@dataclass
class ImageInput:
    """An image at ``begin`` of the prompt, one token for each of ``grid``'s patches.

    ``source`` is kept, so that its patches can be computed again; ``patches`` (P, 768) are dropped once its features
    are known.
    """

    source: Image.Image | bytes
    name: str | None
    digest: bytes
    grid: tuple[int, int]
    bounds: tuple[int, int]
    begin: int = 0
    patches: Tensor | None = None

    @staticmethod
    def from_source(processor: Processor, source: Source) -> ImageInput:
        """From a path, a file's bytes or an image; of files only the header is read. UserError if it is no image."""
        config, name = processor.config, None
        if isinstance(source, str | os.PathLike):
            name = str(source)
            try:
                source = Path(source).read_bytes()
            except OSError:
                open_image(source)  # says what is wrong with it
                raise
        if isinstance(source, bytes):
            size, content = image_size(source, name), source
        else:
            upright = open_image(source)
            source = upright.copy() if upright is source else upright  # the caller may change or close it
            size, content = source.size, source.tobytes()
        kind = b"file" if isinstance(source, bytes) else f"{size[0]}x{size[1]}".encode()
        digest = hashlib.blake2b(content, digest_size=32, person=kind[:16]).digest()
        return ImageInput(source, name, digest, processor.grid(*size), (config.min_num_patches, config.max_num_patches))

    @property
    def end(self) -> int:
        return self.begin + self.grid[0] * self.grid[1]

    def overlaps(self, begin: int, end: int) -> bool:
        """Whether any of its tokens are among tokens begin : end of the prompt."""
        return self.begin < end and begin < self.end

    def load_patches(self) -> Tensor:
        """Its patches (P, 768), computed if they are not there."""
        if self.patches is None:
            self.patches, grid = image_to_patches(open_image(self.source, self.name), *self.bounds)
            if grid != self.grid:
                raise UserError(f"{self.name or 'image'}: its header gives another size than it has")
        return self.patches

    def slice_features(self, features: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Of its features (P, C) those at tokens begin : end of the prompt, and their positions behind ``begin``."""
        first, last = max(begin, self.begin), min(end, self.end)
        return features[first - self.begin : last - self.begin], torch.arange(first - begin, last - begin)
