"""The features of images that were encoded before, by the images' content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

from infer.requests.image_input import ImageInput

# Patches (P, 768) and grid of each image -> its projected features (P, C).
Encoder = Callable[[Sequence[tuple[Tensor, tuple[int, int]]]], list[Tensor]]


class ImageCache:
    """Projected features (P, C) by the images' digests; beyond ``max_bytes`` the least recently used are evicted."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self._bytes = max_bytes, 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self.hits = self.misses = 0

    def __contains__(self, digest: object) -> bool:
        return digest in self._features

    def get_or_encode(self, images: Sequence[ImageInput], encode: Encoder) -> list[Tensor]:
        """The features of each image; ``encode`` computes those that are not cached, each content once."""
        found = {i.digest: cached for i in images if (cached := self._get(i.digest)) is not None}
        missing = list({i.digest: i for i in images if i.digest not in found}.values())
        self.misses += len(missing)
        self.hits += len(images) - len(missing)
        encoded = encode([(image.load_patches(), image.grid) for image in missing])
        for image, features in zip(missing, encoded, strict=True):
            found[image.digest] = features.clone()  # a view would keep the tower's whole batch alive
            self._put(image.digest, found[image.digest])
        for image in images:
            image.patches = None
        return [found[image.digest] for image in images]

    def _get(self, digest: bytes) -> Tensor | None:
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def _put(self, digest: bytes, features: Tensor) -> None:
        if features.nbytes > self.max_bytes:
            return
        self._features[digest] = features
        self._bytes += features.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._features.popitem(last=False)[1].nbytes
