"""Pictures by their content: their patches, and their projected features, which are kept."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from phi4rv.errors import UserError
from phi4rv.processing.images import image_size, image_to_patches, open_image
from phi4rv.processing.processor import Processor

Source = Image.Image | str | Path | bytes
# Patches (P, 768) and grid of each image -> its projected features (P, C).
Encode = Callable[[Sequence[tuple[Tensor, tuple[int, int]]]], list[Tensor]]


@dataclass
class Picture:
    """A picture at ``begin`` of the prompt, one token for each of ``grid``'s patches. ``source`` is kept, so that its
    patches can be made again; ``patches`` (P, 768) are dropped once its features are known.
    """

    source: Image.Image | bytes
    name: str | None
    digest: bytes
    grid: tuple[int, int]
    bounds: tuple[int, int]
    begin: int = 0
    patches: Tensor | None = None

    @staticmethod
    def of(processor: Processor, source: Source) -> Picture:
        """From a path, a file's bytes or an image; of files only the header is read. UserError for what is none."""
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
            source = upright.copy() if upright is source else upright  # who gave it may change or close it
            size, content = source.size, source.tobytes()
        kind = b"file" if isinstance(source, bytes) else f"{size[0]}x{size[1]}".encode()
        digest = hashlib.blake2b(content, digest_size=32, person=kind[:16]).digest()
        return Picture(source, name, digest, processor.grid(*size), (config.min_num_patches, config.max_num_patches))

    @property
    def end(self) -> int:
        return self.begin + self.grid[0] * self.grid[1]

    def touches(self, begin: int, end: int) -> bool:
        """Whether it has tokens of begin : end of the prompt."""
        return self.begin < end and begin < self.end

    def read(self) -> Tensor:
        """Its patches, made where there are none."""
        if self.patches is None:
            self.patches, grid = image_to_patches(open_image(self.source, self.name), *self.bounds)
            if grid != self.grid:
                raise UserError(f"{self.name or 'image'}: its header gives another size than it has")
        return self.patches

    def part(self, features: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Of its features (P, C) those at tokens begin : end of the prompt, and their places behind ``begin``."""
        first, last = max(begin, self.begin), min(end, self.end)
        return features[first - self.begin : last - self.begin], torch.arange(first - begin, last - begin)


class ImageCache:
    """Projected features (P, C) by the pictures' content, the least recently used forgotten beyond ``most`` bytes."""

    def __init__(self, most: int):
        self.most, self._used = most, 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self.hits = self.misses = 0

    def __contains__(self, digest: object) -> bool:
        return digest in self._features

    def fetch(self, pictures: Sequence[Picture], encode: Encode) -> list[Tensor]:
        """The features of each picture; ``encode`` makes those that are not known, each content once."""
        found = {p.digest: known for p in pictures if (known := self._known(p.digest)) is not None}
        missing = list({p.digest: p for p in pictures if p.digest not in found}.values())
        self.misses += len(missing)
        self.hits += len(pictures) - len(missing)
        made = encode([(p.read(), p.grid) for p in missing])
        for picture, piece in zip(missing, made, strict=True):
            found[picture.digest] = piece.clone()  # not the whole pass of the tower that it is a part of
            self._keep(picture.digest, found[picture.digest])
        for picture in pictures:
            picture.patches = None
        return [found[p.digest] for p in pictures]

    def _known(self, digest: bytes) -> Tensor | None:
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def _keep(self, digest: bytes, features: Tensor) -> None:
        if features.nbytes > self.most:
            return
        self._features[digest] = features
        self._used += features.nbytes
        while self._used > self.most:
            self._used -= self._features.popitem(last=False)[1].nbytes
