"""A prompt made ready for the engine: its tokens, and its pictures by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import Tensor

from infer.requests.grammar import Constraint
from infer.requests.image_cache import Picture
from infer.requests.request import Options
from phi4rv.processing.processor import Processor, Prompt

UNDER_IMAGE = -1  # the token id where a patch stands


@dataclass(frozen=True)
class Request:
    """ids (T,) int64 of the prompt, UNDER_IMAGE under its pictures. It may be submitted several times."""

    prompt: Prompt
    options: Options
    ids: Tensor
    pictures: Sequence[Picture]
    constraint: Constraint | None

    @property
    def prompt_tokens(self) -> int:
        return len(self.ids)

    @property
    def image_tokens(self) -> int:
        return sum(p.end - p.begin for p in self.pictures)

    def page_key(self, before: bytes, known: Tensor, begin: int, end: int) -> bytes:
        """The key of the page that holds tokens begin : end of ``known``, by that of the page before it (b"": none)."""
        content = known[begin:end].numpy().tobytes()
        for picture in self.pictures:
            if picture.touches(begin, end):
                content += picture.digest + (begin - picture.begin).to_bytes(8, "little", signed=True)
        return hashlib.blake2b(before + content, digest_size=32).digest()


def prepare(
    processor: Processor,
    prompt: Prompt,
    options: Options,
    known: Container[bytes],
    constraint: Constraint | None = None,
    which: str = "the prompt",
) -> Request:
    """Tokenizes, and makes the patches of the pictures, but for those whose content is ``known``. UserError for a
    picture that cannot be read, a prompt that does not fit its template or, called ``which``, is over the window.
    """
    pictures = [Picture.of(processor, source) for source in prompt.images]
    sample = processor.tokens(prompt.messages(), [p.grid for p in pictures], prompt.mode)
    processor.check_window(sample, which)
    places = sample.image_positions.tolist()
    for picture in pictures:
        if picture.digest not in known:
            picture.read()
        picture.begin = places[0]
        places = places[picture.end - picture.begin :]
    ids = sample.input_ids.index_fill(0, sample.image_positions, UNDER_IMAGE)
    return Request(prompt, options, ids, pictures, constraint)
