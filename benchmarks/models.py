"""Models that benchmarks run beside each other: ours with random weights, and the same one as transformers makes it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from phi4rv.batch import PackedBatch
from phi4rv.checkpoint.huggingface import HF_PREFIXES, empty_model, hf_name
from phi4rv.config import Config
from phi4rv.model.phi4rv import Phi4RV

INIT_STD = 0.02  # standard deviation of random weights, transformers' own


def random_model(config: Config, kernels: str | None, device: torch.device, dtype: torch.dtype) -> Phi4RV:
    """Normal matrices, unit norms, zero biases, drawn on the device from PyTorch's own generator."""
    model = empty_model(config, device, dtype, kernels).to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p.normal_(0.0, INIT_STD)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


class Transformers:
    """Phi-3 and SigLIP2 of transformers, put together as the published code does.

    The tower gets the images of a row padded to the longest of them (the published code pads to 3600 patches) and
    computes its last layer and its head, which nobody reads. ``model``: whose weights it shares; without it they are
    random. ``attention``: transformers' name of an implementation; without it ``default_attention``'s.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        model: Phi4RV | None = None,
        attention: str | None = None,
    ):
        from transformers import Phi3ForCausalLM, Siglip2VisionModel

        options = {"attn_implementation": attention or default_attention(device), "dtype": dtype}
        with torch.device(device if model is None else "meta"):
            self.decoder = Phi3ForCausalLM._from_config(_phi3(config), **options)
            self.tower = Siglip2VisionModel._from_config(_siglip2(config), **options)
            wide, hidden = config.vision.hidden_size, config.hidden_size
            self.projector = nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden)).to(dtype)
        if model is not None:
            self._share(model, device)

    def _share(self, model: Phi4RV, device: torch.device) -> None:
        """Takes the weights of ``model`` as they are, without a copy."""
        tower = getattr(self.tower, "vision_model", self.tower)  # older versions of transformers 5 nest it
        for ours, theirs, prefix in (
            ("decoder.", self.decoder, ""),
            ("vision.", tower, HF_PREFIXES[0][1]),
            ("projector.", self.projector, HF_PREFIXES[1][1]),
        ):
            named = {hf_name(n): p for n, p in model.named_parameters() if n.startswith(ours)}
            theirs.load_state_dict({n.removeprefix(prefix): p for n, p in named.items()}, assign=True)
        # The one module whose buffers no checkpoint holds.
        rotary = self.decoder.model.rotary_emb
        self.decoder.model.rotary_emb = type(rotary)(rotary.config).to(device)

    def embeddings(self, row: PackedBatch) -> Tensor:
        """(T, C): of a packed row's tokens, the projected patches in their places."""
        x = self.decoder.get_input_embeddings()(row.input_ids)
        if len(row.patches):
            x = x.index_copy(0, row.image_positions, self.encode_images(row))
        return x

    def encode_images(self, row: PackedBatch) -> Tensor:
        """(P, C): what the published model reads of the tower, without the padding, projected."""
        images = [row.patches[a:b] for a, b in pairwise(row.cu_patches.tolist())]
        pixels = nn.utils.rnn.pad_sequence(images, batch_first=True).to(self.tower.dtype)
        sizes = torch.tensor([len(image) for image in images], device=pixels.device)
        mask = torch.arange(pixels.shape[1], device=pixels.device) < sizes[:, None]
        states = self.tower(
            pixel_values=pixels, pixel_attention_mask=mask.long(), spatial_shapes=row.grids, output_hidden_states=True
        ).hidden_states
        return self.projector(states[-2][mask])

    def generate(
        self, embeddings: Tensor, new: int, stops: Collection[int], take: Callable[[list[int]], None], static: bool
    ) -> None:  # fmt: skip
        """Greedy tokens behind ``embeddings`` (1, T, C): at most ``new``, or up to one of ``stops``. ``take`` gets each
        as it is made. ``static``: with the cache of fixed size, for which transformers compiles on a GPU.
        """
        self.decoder.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
            streamer=_Streamer(take),
            **({"cache_implementation": "static"} if static else {}),
        )


class _Streamer:
    """What ``generate`` calls with the prompt's ids, of which there are none, and then with those of each step."""

    def __init__(self, take: Callable[[list[int]], None]):
        self.take = take

    def put(self, ids: Tensor) -> None:
        if ids.numel():
            self.take(ids.flatten().tolist())

    def end(self) -> None:
        pass


def default_attention(device: torch.device) -> str:
    """What transformers attends with: flash-attn where it is installed."""
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else "sdpa"


def _phi3(config: Config) -> Any:
    from transformers import Phi3Config

    return Phi3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=config.max_position_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )


def _siglip2(config: Config) -> Any:
    from transformers import Siglip2VisionConfig

    return Siglip2VisionConfig(
        hidden_size=config.vision.hidden_size,
        intermediate_size=config.vision.intermediate_size,
        num_hidden_layers=config.vision.num_hidden_layers,
        num_attention_heads=config.vision.num_attention_heads,
        num_patches=config.vision.num_patches,
        layer_norm_eps=config.vision.layer_norm_eps,
    )
