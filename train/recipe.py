"""The three stages as plain data: the report's Tables 2 and 3, and what the embedded tiny model takes instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from phi4rv.command_line import MOST, Kind, Number, OneOf
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


def _option(help: str, kind: Kind, **default: Any) -> Any:
    """A field of Stage together with what its option says and takes (``phi4rv.command_line.Parser.add``)."""
    return field(metadata={"help": help, "kind": kind}, **default)


POSITIVE, COUNT, SHARE = Number(int, 1, MOST), Number(int, 0, MOST), Number(float, 0, below=1)


@dataclass(frozen=True)
class Stage:
    """One stage's hyperparameters; every field but ``trains`` is a command-line option of the same name."""

    trains: tuple[str, ...]  # of PARTS; the others are frozen
    lr: float = _option("largest learning rate, that after the warm-up", Number(float, above=0, high=1000))
    schedule: str = _option(
        "course of the learning rate after the warm-up; cosine falls to --min-lr-ratio of --lr at the last step",
        OneOf(SCHEDULES),
    )
    min_lr_ratio: float = _option("learning rate of a cosine's last step, as a share of --lr", SHARE)
    warmup: float = _option(
        "steps in which the learning rate rises to --lr; below 1 a share of all steps", Number(float, 0)
    )
    weight_decay: float = _option(
        "AdamW's decoupled weight decay; of matrices, norms and biases have none", Number(float, 0)
    )
    beta1: float = _option("AdamW's beta1, the decay rate of the mean of gradients", SHARE)
    beta2: float = _option("AdamW's beta2, the decay rate of the mean of squared gradients", SHARE)
    clip: float = _option(
        "norm of the whole gradient above which it is scaled down to this norm; inf: never",
        Number(float, above=0, infinite=True),
    )
    global_batch: int = _option("samples a step, at least", POSITIVE)
    sequence_length: int = _option("tokens that a packed sequence holds at most", POSITIVE)
    epochs: int = _option("times that the data is gone through", POSITIVE, default=1)
    max_steps: int = _option("steps of the run, repeating the data as need be; 0: what --epochs give", COUNT, default=0)
    order: str = _option(
        "order of the records; file: the first epoch as they are written, later ones shuffled",
        OneOf(ORDERS),
        default="shuffled",
    )
    too_long: str = _option(
        "what becomes of a sample over --sequence-length; dropped, or shortened by its last turns",
        OneOf(TOO_LONG),
        default="drop",
    )
    sequence_multiple: int = _option(
        "packed sequences a step are a multiple of this; give the number of processes for equal shares; 0: the largest "
        "power of two that is at most a 16th of --global-batch",
        COUNT,
        default=0,
    )
    optimizer: str = _option(
        "what updates the weights; adamw keeps float32 masters and moments, layerwise steps inside the backward pass "
        "and keeps moments of 8 bits, on one GPU",
        OneOf(OPTIMIZERS),
        default="adamw",
    )
    clipping: str = _option(
        "how layerwise clips; exact takes every backward pass twice, delayed goes by the last step's norm",
        OneOf(CLIPPING),
        default="exact",
    )
    linear: str = _option(
        "what the products of the decoder's layers compute in; dtype: as --dtype says", OneOf(LINEAR), default="dtype"
    )
    lora_rank: int = _option(
        "rank of the adapters that train in place of the weights; 0: no adapters, the weights themselves train",
        COUNT,
        default=0,
    )
    lora_alpha: float = _option(
        "scale of the adapters; their product is multiplied by --lora-alpha / --lora-rank",
        Number(float, above=0),
        default=32.0,
    )
    lora_targets: str = _option(
        "layers that get an adapter; last names, or more, of published module paths, commas between",
        str,
        default="qkv_proj,o_proj,gate_up_proj,down_proj",
    )
    frozen_weights: str = _option(
        "format of the decoder's weights that adapters leave as they are; dtype: as --dtype says",
        OneOf(FROZEN),
        default="dtype",
    )

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


def options() -> list[str]:
    """Names of the fields that the command line can override."""
    return [f.name for f in fields(Stage) if f.metadata]


def add_option(add: Callable[..., None], name: str, *aliases: str, **others: Any) -> None:
    """Declares the option of the field ``name`` by ``add``; ``others`` in place of what the field says."""
    [told] = [f.metadata for f in fields(Stage) if f.name == name]
    add(_flag(name), *aliases, **{**told, "unset": defaults(name), **others})


def defaults(name: str, embedded: bool = True) -> str:
    """``0.001, 2e-05, 7e-07 in stages 1, 2, 3``, or one value where it is the same in all. ``embedded``: and without
    data."""

    def said(values: list[Any]) -> str:
        words = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
        return words[0] if len(set(words)) == 1 else f"{', '.join(words)} in stages {', '.join(map(str, STAGES))}"

    published = [getattr(STAGES[n], name) for n in STAGES]
    tiny = [EMBEDDED[n].get(name, value) for n, value in zip(STAGES, published, strict=True)]
    return said(published) + (f"; without --data {said(tiny)}" if embedded and tiny != published else "")


def _check(stage: Stage) -> None:
    """UserError naming the first option out of its range."""
    for f in fields(stage):
        kind, value = f.metadata.get("kind"), getattr(stage, f.name)
        if isinstance(kind, Number | OneOf) and (said := kind.fault(value)):
            raise UserError(f"{_flag(f.name)}: {said}")
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
