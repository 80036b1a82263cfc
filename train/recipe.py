"""The three stages as plain data: the report's Tables 2 and 3, and what the embedded tiny model takes instead."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from phi4rv.errors import UserError
from phi4rv.ops.low_precision import FORMATS

SCHEDULES = ("cosine", "constant")
TOO_LONG = ("drop", "shorten")
ORDERS = ("shuffled", "file")
PARTS = ("vision", "projector", "decoder")
OPTIMIZERS = ("adamw", "layerwise")
CLIPPING = ("exact", "delayed")
FROZEN = ("dtype", *FORMATS)
LINEAR = ("dtype", "fp8")


@dataclass(frozen=True)
class Stage:
    """One stage's hyperparameters; every field but ``trains`` is a command-line option of the same name."""

    trains: tuple[str, ...]  # of PARTS; the others are frozen
    lr: float
    schedule: str  # cosine falls to min_lr_ratio x lr at the last step
    min_lr_ratio: float
    warmup: float  # below 1 a share of the steps, else a number of them
    weight_decay: float  # on matrices; norms and biases are left alone
    beta1: float
    beta2: float
    clip: float  # global gradient norm
    global_batch: int  # samples a step, at least
    sequence_length: int  # tokens a packed sequence, at most
    epochs: int = 1
    max_steps: int = 0  # 0: as many as the epochs give; else exactly so many, repeating the data
    order: str = "shuffled"  # or file: the first epoch as it is written, later ones shuffled
    too_long: str = "drop"  # a sample over sequence_length: drop it, or shorten it by its last turns
    sequence_multiple: int = 0  # sequences a step: a multiple of it; the ranks, for equal shares. 0: see multiple()
    optimizer: str = "adamw"  # float32 masters and moments; or layerwise: steps inside the backward pass, 8-bit moments
    clipping: str = (
        "exact"  # of layerwise: exact takes every backward pass twice; delayed clips by the last step's norm
    )
    linear: str = (
        "dtype"  # products of the decoder's layers: as --dtype says, or in fp8 (phi4rv/quantization/float8_linear.py)
    )
    lora_rank: int = 0  # 0: the weights themselves train; else adapters of this rank on lora_targets, and they alone
    lora_alpha: float = 32.0  # the adapter's product is multiplied by lora_alpha / lora_rank
    lora_targets: str = "qkv_proj,o_proj,gate_up_proj,down_proj"  # last names, or more, of published module paths
    frozen_weights: str = "dtype"  # under adapters, of the decoder's layers: as --dtype says, or in one of FORMATS

    def multiple(self) -> int:
        """``sequence_multiple``, or the largest power of two that is at most a 16th of the global batch.

        Steps may not depend on the number of ranks, and 705 sequences are no equal work for 64 of them. 64 for
        the report's global batches; they become 3 % larger on the mean.
        """
        return self.sequence_multiple or 1 << max(0, (self.global_batch // 16).bit_length() - 1)


STAGES = {
    1: Stage(
        trains=("projector",),
        lr=1e-3,
        schedule="cosine",
        min_lr_ratio=0.0,
        warmup=0.03,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        clip=1.0,
        global_batch=1024,
        sequence_length=2048,
    ),
    2: Stage(
        trains=PARTS,
        lr=2e-5,
        schedule="cosine",
        min_lr_ratio=0.1,
        warmup=500,
        weight_decay=1e-4,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
        global_batch=1920,
        sequence_length=8192,
    ),
}
STAGES[3] = replace(STAGES[2], lr=7e-7, sequence_length=16384)

# A model of 2 M random weights learns nothing at the rates of a pretrained one, nor from batches of 1920.
EMBEDDED: dict[int, dict[str, Any]] = {
    1: {"lr": 1e-4, "global_batch": 8, "sequence_length": 2048, "max_steps": 60},
    2: {"lr": 5e-4, "warmup": 0.03, "global_batch": 4, "sequence_length": 1100, "max_steps": 640, "order": "file"},
    3: {"lr": 1.5e-4, "warmup": 0.03, "global_batch": 8, "sequence_length": 4096, "max_steps": 300},
}
# Records that the embedded generator writes for each stage: (train, held out).
EMBEDDED_RECORDS = {1: (800, 50), 2: (9000, 200), 3: (5000, 200)}


def stage(number: int, embedded: bool, overrides: dict[str, Any]) -> Stage:
    """Stage ``number`` of the report, changed first by EMBEDDED if ``embedded`` and then by ``overrides``."""
    if number not in STAGES:
        raise UserError(f"--stage: {number} is unknown, must be one of {', '.join(map(str, STAGES))}")
    chosen = replace(STAGES[number], **(EMBEDDED[number] if embedded else {}))
    chosen = replace(chosen, **{key: value for key, value in overrides.items() if value is not None})
    _check(chosen)
    return chosen


def options() -> dict[str, type]:
    """Name and type of each field that the command line can override."""
    kinds = {"float": float, "int": int, "str": str}
    return {f.name: kinds[str(f.type)] for f in fields(Stage) if f.name != "trains"}


def _check(stage: Stage) -> None:
    """UserError naming the first option out of its range."""
    choices: dict[str, tuple[str, ...]] = {"schedule": SCHEDULES, "too_long": TOO_LONG, "order": ORDERS}
    choices |= {"optimizer": OPTIMIZERS, "clipping": CLIPPING, "frozen_weights": FROZEN, "linear": LINEAR}
    for name, allowed in choices.items():
        if getattr(stage, name) not in allowed:
            raise UserError(f"{_flag(name)}: {getattr(stage, name)!r} is unknown, must be one of {', '.join(allowed)}")
    for name in ("lr", "clip", "global_batch", "sequence_length", "epochs", "lora_alpha"):
        if not getattr(stage, name) > 0:
            raise UserError(f"{_flag(name)}: {getattr(stage, name)} must be above 0")
    for name in ("warmup", "weight_decay", "max_steps", "sequence_multiple", "lora_rank"):
        if not getattr(stage, name) >= 0:
            raise UserError(f"{_flag(name)}: {getattr(stage, name)} must be 0 or more")
    for name in ("min_lr_ratio", "beta1", "beta2"):
        if not 0 <= getattr(stage, name) < 1:
            raise UserError(f"{_flag(name)}: {getattr(stage, name)} must be in [0, 1)")
    for name in ("lr", "warmup", "weight_decay", "lora_alpha"):
        if math.isinf(getattr(stage, name)):
            raise UserError(f"{_flag(name)}: {getattr(stage, name)} must be a finite number")
    if stage.frozen_weights != "dtype" and not stage.lora_rank:
        raise UserError(f"--frozen-weights: {stage.frozen_weights} needs adapters to train: give --lora-rank")
    if stage.linear == "fp8" and (stage.lora_rank or "decoder" not in stage.trains):
        raise UserError("--linear: fp8 is for decoder weights that train: not for stage 1, and leave --lora-rank out")
    if stage.clipping == "delayed" and stage.optimizer != "layerwise":
        raise UserError(f"--clipping: delayed is for --optimizer layerwise; {stage.optimizer} knows the norm in time")
    if stage.optimizer == "layerwise" and stage.lora_rank:
        raise UserError("--optimizer: layerwise is for training the weights themselves: leave --lora-rank out")
    if stage.optimizer == "layerwise" and stage.global_batch > 1:
        raise UserError(
            f"--global-batch: {stage.global_batch} may need several sequences a step, and layerwise, which keeps no "
            "gradients, takes a step from each: give --global-batch 1 and as long a --sequence-length as fits"
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
