"""A request: its prompt's tokens, its images by their content, and how it is to be answered."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import Tensor

from infer.requests.grammar import Grammar
from infer.requests.image_input import ImageInput
from infer.requests.sampling_params import SamplingParams
from phi4rv.processing.processor import Processor, Prompt

IMAGE_PLACEHOLDER = -1  # the token id where a patch goes


@dataclass(frozen=True)
class Request:
    """token_ids (T,) int64 of the prompt, IMAGE_PLACEHOLDER under its images. It may be submitted several times."""

    prompt: Prompt
    sampling_params: SamplingParams
    token_ids: Tensor
    images: Sequence[ImageInput]
    grammar: Grammar | None

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def image_tokens(self) -> int:
        return sum(image.end - image.begin for image in self.images)

    def page_hash(self, parent: bytes, token_ids: Tensor, begin: int, end: int) -> bytes:
        """Hash of the page of tokens begin : end of ``token_ids``, given that of the page before it (b"": none)."""
        content = token_ids[begin:end].numpy().tobytes()
        for image in self.images:
            if image.overlaps(begin, end):
                content += image.digest + (begin - image.begin).to_bytes(8, "little", signed=True)
        return hashlib.blake2b(parent + content, digest_size=32).digest()


def prepare_request(
    processor: Processor,
    prompt: Prompt,
    sampling_params: SamplingParams,
    cached_images: Container[bytes],
    grammar: Grammar | None = None,
    which: str = "the prompt",
) -> Request:
    """Tokenizes, and computes the patches of the images, but for those whose digest is in ``cached_images``.

    UserError for an image that cannot be read, a prompt that does not fit its template or, called ``which``, is longer
    than the context window.
    """
    images = [ImageInput.from_source(processor, source) for source in prompt.images]
    sample = processor.tokens(prompt.messages(), [image.grid for image in images], prompt.mode)
    processor.check_window(sample, which)
    positions = sample.image_positions.tolist()
    for image in images:
        if image.digest not in cached_images:
            image.load_patches()
        image.begin = positions[0]
        positions = positions[image.end - image.begin :]
    token_ids = sample.input_ids.index_fill(0, sample.image_positions, IMAGE_PLACEHOLDER)
    return Request(prompt, sampling_params, token_ids, images, grammar)
