"""What ``benchmarks/train_step.py`` times: our training step, and the same one as transformers makes it.

Both have bfloat16 weights (float32 on a CPU) with float32 masters and moments, train all that the language model
reads, divide the summed loss by the labelled tokens of the step, and clip by the gradient's global norm.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from phi4rv.batch import NO_LABEL, PackedBatch
from phi4rv.checkpoint import empty_model
from phi4rv.config import Config
from phi4rv.float8 import use_float8
from train import recipe
from train.optimizer import EPS, Optimizer
from train.ranks import Ranks
from train.trainer import take_step, trainable

STAGE = recipe.stage(2, False, {})
SPREAD = 0.02  # standard deviation of random weights, transformers' own


class Ours:
    """The trainer's step, with the kernels of one kind (``ops.KERNELS``); ``float8``: as with ``--linear fp8``."""

    def __init__(
        self, config: Config, kernels: str, device: torch.device, dtype: torch.dtype, float8: bool = False
    ):  # fmt: skip
        self.model = empty_model(config, device, dtype, kernels).to_empty(device=device)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.ndim >= 2:
                    p.normal_(0.0, SPREAD)
                else:
                    p.fill_(0.0 if name.endswith("bias") else 1.0)
        if float8:
            use_float8(self.model)
        self.optimizer = Optimizer(trainable(self.model, STAGE), STAGE, self.model.ops)

    def step(self, rows: Sequence[PackedBatch]) -> float:
        """The mean loss over the step's labelled tokens."""
        return float(take_step(self.model, self.optimizer, rows, STAGE.lr, Ranks())["loss"])


class Theirs:
    """Phi-3 and SigLIP2 of transformers, put together as the published code does.

    Documents are kept apart by their position ids: by flash-attn's offsets where that is installed, else by a mask
    for PyTorch's SDPA. The tower gets the images of a row padded to the longest of them (the published code pads to
    3600 patches) and computes its last layer and its head, which nobody reads. ``liger``: Liger-Kernel's rotary
    embedding, norms, SwiGLU and fused loss, patched into the classes, so only in a process that makes no other model.
    AdamW is torch's fused one on float32 masters; a weight's gradients of several rows are summed in its own dtype.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, liger: bool = False):
        from transformers import Phi3ForCausalLM, Siglip2VisionModel

        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_phi3

            apply_liger_kernel_to_phi3()
        attention = {"attn_implementation": attention_of(device), "dtype": dtype}
        with torch.device(device):
            self.decoder = Phi3ForCausalLM._from_config(_phi3(config), **attention)
            self.tower = Siglip2VisionModel._from_config(_siglip2(config), **attention)
            wide, hidden = config.vision.hidden_size, config.hidden_size
            self.projector = nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden)).to(dtype)
        modules = nn.ModuleList([self.decoder, self.tower, self.projector]).train()
        tower = getattr(self.tower, "vision_model", self.tower)  # older versions of transformers 5 nest it
        for module in (tower.encoder.layers[-1], tower.post_layernorm, tower.head):
            module.requires_grad_(False)
        self.params = [p for p in modules.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        groups = [
            {"params": [m for m in self.masters if m.ndim >= 2], "weight_decay": STAGE.weight_decay},
            {"params": [m for m in self.masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (STAGE.beta1, STAGE.beta2)
        self.adamw = torch.optim.AdamW(groups, STAGE.lr, betas, EPS, fused=device.type == "cuda")

    def step(self, rows: Sequence[PackedBatch]) -> float:
        """The mean loss over the step's labelled tokens."""
        labelled = sum(int((row.targets() != NO_LABEL).sum()) for row in rows)
        total = torch.zeros((), device=self.params[0].device)
        for row in rows:
            loss = self.loss(row, labelled)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.params, STAGE.clip)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad if master.dtype == grad.dtype else grad.to(master.dtype)
        self.adamw.step()
        if self.masters[0] is not self.params[0]:
            with torch.no_grad():
                torch._foreach_copy_([p.data for p in self.params], self.masters)
        for tensor in (*self.params, *self.masters):
            tensor.grad = None
        return float(total)

    def loss(self, row: PackedBatch, labelled: int) -> Tensor:
        """Summed over the row, divided by ``labelled``. A document's first token must have no label: transformers
        shifts labels across documents.
        """
        assert row.labels is not None
        x = self.decoder.get_input_embeddings()(row.input_ids)
        if len(row.patches):
            x = x.index_copy(0, row.image_positions, self.projector(self.features(row)))
        out = self.decoder(
            inputs_embeds=x[None],
            position_ids=row.positions[None].long(),
            labels=row.labels[None],
            num_items_in_batch=torch.tensor(labelled, device=x.device),
            use_cache=False,
        )
        return out.loss

    def features(self, row: PackedBatch) -> Tensor:
        """(P, c): what the published model reads of the tower, without the padding."""
        images = [row.patches[a:b] for a, b in pairwise(row.cu_patches.tolist())]
        pixels = nn.utils.rnn.pad_sequence(images, batch_first=True).to(self.tower.dtype)
        sizes = torch.tensor([len(image) for image in images], device=pixels.device)
        mask = torch.arange(pixels.shape[1], device=pixels.device) < sizes[:, None]
        states = self.tower(
            pixel_values=pixels, pixel_attention_mask=mask.long(), spatial_shapes=row.grids, output_hidden_states=True
        ).hidden_states
        return states[-2][mask]


def attention_of(device: torch.device) -> str:
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
