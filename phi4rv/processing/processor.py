"""Text and pictures to samples, and tokens back to text: tokenizer, chat template and image rule of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer

from phi4rv.batch import NO_LABEL, PackedBatch, Sample, pack
from phi4rv.config import Config, read_json
from phi4rv.errors import ContextLengthError, UserError
from phi4rv.processing.answers import NOTHINK_SPELLINGS
from phi4rv.processing.chat_template import IMAGE_TOKEN, THINK, ChatTemplate, Message, split_at_images
from phi4rv.processing.images import PATCH_DIM, image_to_patches, open_image, target_grid

TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.json"
# What a Hugging Face folder holds beside weights and config; written back byte for byte.
FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "generation_config.json",
    TEMPLATE,
)
REQUIRED = (TOKENIZER, TEMPLATE)


@dataclass(frozen=True)
class Prompt:
    """A question: text, or the messages of several turns, with one image for each ``<image>`` mark in them.

    images: PIL images, paths or encoded bytes. mode: ``auto`` (the model decides), ``think`` or ``nothink``.
    """

    text: str | Sequence[Message]
    images: Sequence[Image.Image | str | Path | bytes] = field(default_factory=tuple)
    mode: str = "auto"

    def messages(self) -> list[Message]:
        return [Message("user", self.text)] if isinstance(self.text, str) else list(self.text)


class Processor:
    """``processor([Prompt(…), …])`` -> PackedBatch. ``files``: name -> bytes, as in the checkpoint's folder."""

    def __init__(self, files: dict[str, bytes], config: Config, name: str = "checkpoint"):
        for required in REQUIRED:
            if required not in files:
                raise UserError(f"{name}/{required}: missing; a checkpoint in the Hugging Face layout has one")
        self.files, self.config = files, config
        try:
            self.tokenizer = Tokenizer.from_buffer(files[TOKENIZER])
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{name}/{TOKENIZER}: not a tokenizer file ({error})") from None
        largest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= config.vocab_size:
            raise UserError(f"{name}/{TOKENIZER}: token id {largest} is outside vocab_size {config.vocab_size}")
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.nothink_token = next((s for s in NOTHINK_SPELLINGS if s in vocabulary), NOTHINK_SPELLINGS[0])
        special_tokens = {
            "bos_token": self.tokenizer.id_to_token(config.bos_token_id) or "",
            "eos_token": self.tokenizer.id_to_token(config.eos_token_id) or "",
        }
        try:
            source = files[TEMPLATE].decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name}/{TEMPLATE}: not UTF-8 text") from None
        self.template = ChatTemplate(source, f"{name}/{TEMPLATE}", special_tokens, self.nothink_token)

    @staticmethod
    def from_folder(folder: Path, config: Config) -> Processor:
        """Reads the files of FILES that the folder has."""
        files = {}
        for path in (folder / name for name in FILES if (folder / name).is_file()):
            if path.suffix == ".json":
                read_json(path)  # a broken one is reported with its line
            try:
                files[path.name] = path.read_bytes()
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return Processor(files, config, str(folder))

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def __call__(self, prompts: Sequence[Prompt]) -> PackedBatch:
        """Encodes and packs ``prompts``, without labels. UserError for one over the context window: nothing is cut."""
        samples = [self.encode(prompt) for prompt in prompts]
        for number, sample in enumerate(samples, 1):
            self.check_window(sample, f"prompt {number}" if len(samples) > 1 else "the prompt")
        return pack(samples)

    def check_window(self, sample: Sample, which: str) -> None:
        """WindowError, naming ``which`` prompt it is, for one over the context window."""
        if len(sample) > self.config.context:
            raise ContextLengthError(
                f"{which} has {len(sample)} tokens ({len(sample.image_positions)} of them from images), "
                f"the model's window holds {self.config.context}; shorten the text or shrink the images"
            )

    def encode(self, prompt: Prompt) -> Sample:
        """The tokens of one prompt, up to where the answer begins, with its patches."""
        images = [open_image(image) for image in prompt.images]
        bounds = self.config.min_num_patches, self.config.max_num_patches
        patched = [image_to_patches(image, *bounds) for image in images]
        sample = self.tokens(prompt.messages(), [grid for _, grid in patched], prompt.mode)
        return with_patches(sample, [patches for patches, _ in patched])

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of this size gets."""
        return target_grid(width, height, self.config.min_num_patches, self.config.max_num_patches)

    def tokens(
        self,
        messages: Sequence[Message],
        grids: Sequence[tuple[int, int]],
        mode: str = "auto",
        labelled: bool = False,
    ) -> Sample:
        """A sample without its patches: the rendered chat, cut at ``<image>``, each piece tokenized by itself.

        labelled: the messages end with an answer, and each token the assistant wrote (its ``<|im_end|>`` included)
        is its own label; otherwise the row ends where the answer begins. The answer is tokenized apart from what
        precedes it, as it is when it is generated.
        """
        answers = [message.content for message in messages if message.role == "assistant"]
        rendered = self.template.render(messages, mode, add_generation_prompt=not labelled)
        split_at_images(rendered.text, len(grids))
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        remaining = iter(grids)
        for text, answer in _segments(rendered.text, rendered.spans if labelled else []):
            for number, piece in enumerate(split_at_images(text, text.count(IMAGE_TOKEN))):
                if number:
                    rows, cols = next(remaining)
                    positions += range(len(ids), len(ids) + rows * cols)
                    ids += [0] * (rows * cols)
                    labels += [NO_LABEL] * (rows * cols)
                encoded = self.tokenizer.encode(piece, add_special_tokens=False).ids
                ids += encoded
                labels += encoded if answer else [NO_LABEL] * len(encoded)
        return Sample(
            input_ids=torch.tensor(ids),
            labels=torch.tensor(labels) if labelled else None,
            patches=torch.empty(0, PATCH_DIM),
            grids=torch.tensor(list(grids), dtype=torch.int32).view(-1, 2),
            image_positions=torch.tensor(positions, dtype=torch.int64),
            reasoning=labelled and answers[0].lstrip().startswith(THINK),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens written out (``answers.parse_answer`` reads them)."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def with_patches(sample: Sample, patches: Sequence[torch.Tensor]) -> Sample:
    """``sample`` with the patches (P_i, 768) of its images, in order."""
    return dataclasses.replace(sample, patches=torch.cat([sample.patches[:0], *patches]))


def _segments(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """``text`` cut at the spans: (piece, whether the assistant wrote it), empty pieces left out."""
    cuts = [0, *(edge for span in spans for edge in span), len(text)]
    pieces = [(text[a:b], number % 2 == 1) for number, (a, b) in enumerate(pairwise(cuts))]
    return [piece for piece in pieces if piece[0]]
