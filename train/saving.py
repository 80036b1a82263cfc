"""Saving a run and taking it up again: ``step-N`` folders that are either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from phi4rv.checkpoint import write
from phi4rv.config import read_json
from phi4rv.errors import UserError
from phi4rv.files import whole_folder
from phi4rv.model import Phi4RV
from phi4rv.processor import Processor
from train.optimizer import Optimizer

STATE, OPTIMIZER, MODEL = "state.json", "optimizer.safetensors", "model"


def save_step(output: Path, model: Phi4RV, processor: Processor, optimizer: Optimizer, run: dict[str, Any]) -> Path:
    """Writes ``output/step-N``: the model in the published layout, the optimizer, and what the run was told.

    Nothing else is random: the data's order follows from the seed and the step.
    """
    path = output / f"step-{optimizer.steps}"
    with whole_folder(path) as folder:
        (folder / MODEL).mkdir()
        write(model, processor, folder / MODEL)
        save_file({k: v.cpu() for k, v in optimizer.state().items()}, folder / OPTIMIZER)
        state = {"step": optimizer.steps, "skipped_steps": optimizer.skipped, "recipe": asdict(optimizer.stage), **run}
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    return path


def remove_broken(output: Path) -> None:
    """Removes half-written folders that a killed run left in ``output``; those of a living process stay."""
    for path in output.glob(".*.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def newest_step(output: Path) -> Path | None:
    """The ``step-N`` folder of the largest N, if there is one."""
    found = [p for p in output.glob("step-*") if p.name.removeprefix("step-").isdigit() and p.is_dir()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def resume(path: Path, optimizer: Optimizer, run: dict[str, Any]) -> None:
    """Takes the optimizer back to ``path``. UserError if the run was told otherwise then, naming the option."""
    state = read_json(path / STATE)
    then, now = {**state.get("recipe", {}), **state}, {**asdict(optimizer.stage), **run}
    for key, value in now.items():
        was = then.get(key)
        if json.loads(json.dumps(value)) != was:
            raise UserError(
                f"--resume: {path} was made with {key}={was}, this run has {key}={value}; "
                "give the same options, or start in another --output"
            )
    try:
        optimizer.load_state(load_file(path / OPTIMIZER), state["step"], state.get("skipped_steps", 0))
    except FileNotFoundError:
        raise UserError(f"{path / OPTIMIZER}: missing; the save is not whole, resume from another") from None
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path / OPTIMIZER}: cannot be read ({error}); resume from another save") from None


def trim_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps after ``step``, which a resumed run takes again, and a last line cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry.get("step", 0) <= step and "heldout" not in entry:
            kept.append(line)
    path.write_text("".join(line + "\n" for line in kept))
