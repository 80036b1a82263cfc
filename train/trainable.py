"""Which parameters a stage trains: those of its parts, or LoRA adapters alone."""

from __future__ import annotations

from torch import nn

from phi4rv.adapters.peft import add_adapters, linear_layers, match_target_modules
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from train.recipe import PARTS, Stage


def set_trainable(model: Phi4RV, stage: Stage) -> dict[str, nn.Parameter]:
    """Freezes what the stage does not train; returns name -> parameter of the rest that a loss can reach.

    With ``stage.lora_rank`` these are the adapters, which ``add_lora`` must have added.
    """
    unused = {id(p) for p in model.vision.unused_parameters()}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        assert part in PARTS, name
        if not stage.lora_rank:
            parameter.requires_grad_(part in stage.trains and id(parameter) not in unused)
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def add_lora(model: Phi4RV, stage: Stage, seed: int) -> None:
    """Freezes the model and adds adapters to ``stage.lora_targets``.

    UserError naming a target that is no linear layer, or is in a part that the stage freezes.
    """
    known = linear_layers(model)
    names = [known[path] for path in match_target_modules(list(known), lora_targets(model, stage))]
    add_adapters(model, names, stage.lora_rank, stage.lora_alpha, seed)


def lora_targets(model: Phi4RV, stage: Stage) -> list[str]:
    """``stage.lora_targets`` as a list, each checked against the model and the stage."""
    known = linear_layers(model)
    given = [target.strip() for target in stage.lora_targets.split(",")]
    for target in given:
        found = {known[path].split(".")[0] for path in match_target_modules(list(known), [target])}
        if not found:
            names = dict.fromkeys(p.rpartition(".")[2] for p in known if not p.rpartition(".")[2].isdigit())
            projector = [p.removeprefix("model.") for p, n in known.items() if n.startswith("projector.")]
            raise UserError(
                f"--lora-targets: {target!r} is no linear layer of the model, must be among "
                f"{', '.join([*names, *projector])}, or longer ends of their paths"
            )
        if frozen := found - {*stage.trains}:
            raise UserError(f"--lora-targets: {target} is in {', '.join(sorted(frozen))}, which this stage freezes")
    return given
