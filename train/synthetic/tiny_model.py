"""The built-in tiny model: the published architecture with 2 M random parameters, and a tokenizer of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.config import Config, VisionConfig
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.processor import TEMPLATE, TOKENIZER, Processor

VOCAB_SIZE = 1024
# The published special tokens; <think> and </think> are ordinary text to a decoder that skips special ones.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_84|>", "<|dummy_85|>")
THINKING_TOKENS = ("<think>", "</think>")
# Words, punctuation and numbers apart, but a coordinate is one piece, so that a box takes few steps to write.
COORDINATE = re.compile(r"Ġ?[01]\.\d\d")
PRETOKENIZER = r" ?\d\.\d\d| ?\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"


def tiny_config() -> Config:
    """Vision head dim 72, language head dim 128, two query heads to a key head, 16 to 96 patches an image."""
    return Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        min_num_patches=16,
        max_num_patches=96,
        bos_token_id=VOCAB_SIZE - 8,
        eos_token_id=VOCAB_SIZE - 5,
        pad_token_id=VOCAB_SIZE - 3,
        dtype="float32",
        vision=VisionConfig(
            hidden_size=144, intermediate_size=288, num_hidden_layers=3, num_attention_heads=2, num_patches=64
        ),
    )


def build_tiny_model(seed: int, texts: Iterable[str], kernels: str | None = None) -> tuple[Phi4RV, Processor]:
    """Random float32 model on the CPU, and the processor whose tokenizer is trained on ``texts``."""
    config = tiny_config()
    processor = Processor(_processor_files(config, texts), config, "embedded default")
    model = empty_model(config, "cpu", torch.float32, kernels).to_empty(device="cpu")
    init_weights(model, seed)
    init_coordinate_embeddings(model, processor.tokenizer, seed)
    return model, processor


def init_weights(model: Phi4RV, seed: int) -> None:
    """Normal(0, 1/sqrt(inputs)) matrices, branches into the residual scaled down by depth, unit norms, zero biases.

    The position table starts as sines of the grid (Vaswani et al. 2017, in two dimensions): a few hundred steps are
    too few to find the plane's neighbourhoods in random rows. Token embeddings and the projector's output start small,
    so that what the layers add soon outweighs them; at 0.5 the same steps learned far less from the image.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim < 2:
                p.fill_(1.0)
            elif "embed_tokens" in name:
                p.normal_(0, 0.04, generator=generator)
            else:
                p.normal_(0, p.shape[-1] ** -0.5, generator=generator)
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                layers = model.config.num_hidden_layers if "decoder" in name else len(model.vision.layers())
                p.mul_((2 * layers) ** -0.5)
        model.projector.get_parameter("2.weight").mul_(0.1)
        table = model.vision.embeddings.position_embedding.weight
        table.copy_(grid_sinusoids(math.isqrt(table.shape[0]), table.shape[1]))


def init_coordinate_embeddings(model: Phi4RV, tokenizer: Tokenizer, seed: int) -> None:
    """Starts the tokens ``0.00`` … ``1.00`` as sines of their value, in and out, at the usual row norm.

    Random rows would have to learn from examples that 0.31 lies beside 0.32. Each side is turned by a rotation of
    its own: were they alike, every coordinate would begin by predicting itself.
    """
    values = {i: float(t.lstrip("Ġ")) for t, i in tokenizer.get_vocab().items() if COORDINATE.fullmatch(t)}
    ids, width = torch.tensor(list(values)), model.config.hidden_size
    code = sinusoids(torch.tensor(list(values.values())), width, 0.04, 4.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (model.decoder.embed_tokens.weight, model.decoder.lm_head.weight):
            rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
            scale = weight.norm(dim=1).mean() / code.norm(dim=1).mean()
            weight[ids] = (weight[ids] + 2 * scale * code @ rotation) / 5**0.5


def sinusoids(values: Tensor, channels: int, shortest: float, longest: float) -> Tensor:
    """(N,) -> (N, channels): sines and cosines, wavelengths spread evenly in the logarithm."""
    half = channels // 2
    wavelengths = shortest * (longest / shortest) ** (torch.arange(half) / max(1, half - 1))
    angles = values[:, None] * (2 * math.pi / wavelengths)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_sinusoids(side: int, channels: int) -> Tensor:
    """(side², channels): sines and cosines of row and column, wavelengths from 2 to 4 x side cells."""
    axis = sinusoids(torch.arange(side), channels // 2, 2.0, 4.0 * side)
    rows, cols = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    return torch.cat([rows, cols], dim=1)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with the published special tokens as its last eight ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    size = VOCAB_SIZE - len(SPECIAL_TOKENS) - len(THINKING_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    every_coordinate = [f"[{n / 100:.2f}, {n / 100:.2f}]" for n in range(101)] * 100
    tokenizer.train_from_iterator(chain(texts, every_coordinate), trainer)
    if tokenizer.get_vocab_size() < size:
        raise ValueError(f"the texts give only {tokenizer.get_vocab_size()} of {size} pieces")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in THINKING_TOKENS])
    return tokenizer


def _processor_files(config: Config, texts: Iterable[str]) -> dict[str, bytes]:
    """The published folder's files beside weights and config."""
    bos, eos, pad = "<|endoftext|>", "<|im_end|>", "<|dummy_85|>"
    tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    objects = {
        "tokenizer_config.json": {**tokens, "tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": tokens,
        "preprocessor_config.json": {
            "image_processor_type": "Siglip2ImageProcessorNoUpscale",
            "min_num_patches": config.min_num_patches,
            "max_num_patches": config.max_num_patches,
            "patch_size": 16,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 2,
        },
        "generation_config.json": {**ids, "do_sample": True, "temperature": 0.8, "top_p": 0.95},
    }
    files = {name: json.dumps(value, indent=2).encode() for name, value in objects.items()}
    files[TOKENIZER] = train_tokenizer(texts).to_str().encode()
    files[TEMPLATE] = (Path(__file__).parent / "tiny_chat_template.jinja").read_bytes()
    return files
