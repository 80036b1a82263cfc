"""What a run with ``--lora-rank`` does differently: which layers get adapters."""

from __future__ import annotations

from phi4rv.adapters.peft import add_adapters, linear_layers, match_target_modules
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from train.recipe import Stage


def adapt(model: Phi4RV, stage: Stage, seed: int) -> None:
    """Freezes the model and puts adapters on ``stage.lora_targets``.

    UserError naming a target that is no linear layer, or in a part that the stage freezes.
    """
    known = linear_layers(model)
    names = [known[path] for path in match_target_modules(list(known), targets(model, stage))]
    add_adapters(model, names, stage.lora_rank, stage.lora_alpha, seed)


def targets(model: Phi4RV, stage: Stage) -> list[str]:
    """``stage.lora_targets`` one by one, each checked against the model and the stage."""
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
