"""The contenders of ``benchmarks/train_step.py``: our training step, and the same one by transformers.

Both have bfloat16 weights (float32 on a CPU) with float32 masters and moments, train all that the language model
reads, divide the summed loss by the labelled tokens of the step, and clip by the gradient's global norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.models import Transformers, random_model
from phi4rv.batch import NO_LABEL, PackedBatch
from phi4rv.config import Config
from phi4rv.quantization.float8_linear import convert_to_float8_training
from train import recipe
from train.distributed.ranks import Ranks
from train.optimizers.adamw import EPS, AdamW
from train.trainable import set_trainable
from train.trainer import train_step

STAGE = recipe.stage(2, False, {})


class Phi4RVTrainer:
    """The trainer's step, with the kernels of one kind (``ops.KERNELS``); ``float8``: as with ``--linear fp8``."""

    def __init__(
        self, config: Config, kernels: str, device: torch.device, dtype: torch.dtype, float8: bool = False
    ):  # fmt: skip
        self.model = random_model(config, kernels, device, dtype)
        if float8:
            convert_to_float8_training(self.model)
        self.optimizer = AdamW(set_trainable(self.model, STAGE), STAGE, self.model.ops)

    def step(self, rows: Sequence[PackedBatch]) -> float:
        """The mean loss over the step's labelled tokens."""
        return float(train_step(self.model, self.optimizer, rows, STAGE.lr, Ranks())["loss"])


class TransformersTrainer(Transformers):
    """``Transformers``, trained.

    Documents are kept apart by their position ids: by flash-attn's offsets, or by a mask for PyTorch's SDPA. ``how``:
    "" with SDPA; "flash-attn"; "Liger", Liger-Kernel's rotary embedding, norms, SwiGLU and fused loss, patched into the
    classes, so only in a process that makes no other model; "compiled", each layer by torch.compile, lengths dynamic.
    The last two attend with flash-attn where it is installed. AdamW is torch's fused one on float32 masters; a
    weight's gradients of several rows are summed in its own dtype.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, how: str = ""):
        if how == "Liger":
            from liger_kernel.transformers import apply_liger_kernel_to_phi3

            apply_liger_kernel_to_phi3()
        attention = {"": "sdpa", "flash-attn": "flash_attention_2"}.get(how)
        super().__init__(config, device, dtype, attention=attention)
        modules = nn.ModuleList([self.decoder, self.tower, self.projector]).train()
        tower = getattr(self.tower, "vision_model", self.tower)  # older versions of transformers 5 nest it
        for module in (tower.encoder.layers[-1], tower.post_layernorm, tower.head):
            module.requires_grad_(False)
        if how == "compiled":
            for layer in (*self.decoder.model.layers, *tower.encoder.layers):
                layer.compile(dynamic=True)
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
        x = self.embeddings(row)
        out = self.decoder(
            inputs_embeds=x[None],
            position_ids=row.positions[None].long(),
            labels=row.labels[None],
            num_items_in_batch=torch.tensor(labelled, device=x.device),
            use_cache=False,
        )
        return out.loss
