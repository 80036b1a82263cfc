"""Saving a run and taking it up again: ``step-N`` folders that are either whole or not there.

A folder holds ``state.json``, ``config.json`` with the tokenizer's files, and model, optimizer and random states in
the format of torch.distributed.checkpoint: each rank writes what it alone has, and any number of ranks reads it.
``python -m train.export`` makes the published layout of one. Several nodes need an output folder that all see.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from phi4rv.adapters.peft import write_adapter
from phi4rv.checkpoint.atomic_folder import atomic_folder, fsync_folder, replace_folder
from phi4rv.checkpoint.huggingface import write_checkpoint, write_config_and_processor
from phi4rv.config import read_json
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.processor import Processor
from train.distributed.fsdp import local
from train.distributed.ranks import Ranks, own_group
from train.optimizers.adamw import Optimizer
from train.optimizers.layerwise import Layerwise
from train.recipe import Stage

STATE, INDEX, MODEL, ADAPTER = "state.json", ".metadata", "model", "adapter"
KEEP_ALL = 0


class Saver:
    """Writes saves on a thread while training goes on; one at a time. ``keep``: so many of the newest, 0 for all."""

    def __init__(self, output: Path, ranks: Ranks, keep: int = KEEP_ALL):
        self.output, self.ranks, self.keep = output, ranks, keep
        self.group = own_group(ranks)
        self.pid = ranks.from_first(os.getpid())
        self.failure: str | None = None
        self._thread: threading.Thread | None = None

    def begin(
        self,
        model: Phi4RV,
        processor: Processor,
        optimizer: Optimizer | Layerwise,
        dtype: torch.dtype,
        run: dict[str, Any],
    ) -> None:
        """Copies everything to the CPU and starts to write ``step-N``; every rank calls it after the same step.

        Waits if the save before is still being written. ``run``: what the run was told, and the data's position.
        """
        self.wait()
        path = self.output / f"step-{optimizer.steps}"
        if self.ranks.from_first(whole(path)):
            return
        copies = {name: on_cpu(t) for name, t in contents(model, optimizer).items()}
        copies[random_name(self.ranks.rank)] = random_state()
        state = {"step": optimizer.steps, "skipped_steps": optimizer.skipped, "recipe": asdict(optimizer.stage), **run}
        device = model.device

        def work() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread begins on the first
            try:
                self._write(path, copies, lambda folder: _describe(folder, model, processor, dtype, state))
            except (Exception, CheckpointException) as error:
                self.failure = f"{path}: cannot be written ({_reason(error)})"

        self._thread = threading.Thread(target=work, name="save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Till the last save is whole. UserError, on every rank, if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.failure = next(filter(None, self.ranks.gather(self.failure)), None)
        if self.failure:
            newest = newest_step(self.output)
            raise UserError(
                f"{self.failure}; nothing of it was left behind. Make room, then --resume, which goes on from "
                f"{newest or 'the beginning'}"
            )

    def writing(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def newest(self) -> Path | None:
        """The newest save, once the one that is being written is whole or has failed."""
        self.close()
        return newest_step(self.output)

    def close(self) -> None:
        """Lets the last save be written, also where an error ends the run."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, path: Path, copies: dict[str, Tensor], describe: Any) -> None:
        partial = path.with_name(f".{path.name}.partial-{self.pid}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a single process it says that there is no other
                dcp.save(copies, storage_writer=dcp.FileSystemWriter(partial), process_group=self.group)
            # The first rank is told by every other that its files are written and flushed before it comes here.
            if self.ranks.first:
                describe(partial)
                fsync_folder(partial)
                replace_folder(partial, path)
                fsync_folder(self.output, deep=False)
                self._remove_old()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _remove_old(self) -> None:
        for path in steps(self.output)[: -self.keep] if self.keep else []:
            # Renamed first: a folder half removed must not look like a save.
            gone = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def contents(model: Phi4RV, optimizer: Optimizer | Layerwise) -> dict[str, Tensor]:
    """The live tensors that a save holds: ``model/name``, in float32 where there is a master, and moments.

    Where adapters train, they stand for the model: their base is the checkpoint that the run names.
    """
    state = optimizer.state()
    masters = {n.removeprefix("master/"): t for n, t in state.items() if n.startswith("master/")}
    held = optimizer.params if optimizer.stage.lora_rank else dict(model.named_parameters())
    weights = {f"model/{n}": masters.get(n, p.detach()) for n, p in held.items()}
    return weights | {n: t for n, t in state.items() if not n.startswith("master/")}


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy that training does not change; of a sharded tensor a copy of this rank's part."""
    copy = local(tensor.detach()).to("cpu", copy=True)
    if not isinstance(tensor, DTensor):
        return copy
    return DTensor(copy, tensor._spec, requires_grad=False)  # from_local would move it back to the mesh's device


def random_name(rank: int) -> str:
    return f"random/{rank}"


def random_state() -> Tensor:
    """This process's generators', one after the other (uint8)."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return torch.cat(states)


def set_random_state(state: Tensor) -> None:
    """The inverse of ``random_state``; a GPU's is left out where there was none."""
    own = len(torch.get_rng_state())
    torch.set_rng_state(state[:own].clone())
    if torch.cuda.is_available() and len(state) > own:
        torch.cuda.set_rng_state(state[own:].clone())


def _describe(folder: Path, model: Phi4RV, processor: Processor, dtype: torch.dtype, state: dict[str, Any]) -> None:
    write_config_and_processor(model, processor, folder, dtype)
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")


def _reason(error: BaseException) -> str:
    """What went wrong first, on whichever rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def save_result(
    output: Path,
    model: Phi4RV,
    processor: Processor,
    stage: Stage,
    dtype: torch.dtype,
    ranks: Ranks,
    checkpoint: str | None = None,
) -> None:
    """What was trained: ``output/model`` in the published layout, or ``output/adapter``, of ``checkpoint``, in PEFT's.

    The first rank writes; sharded weights are gathered one by one, by all together.
    """

    def gathered(name: str, parameter: Tensor) -> Tensor:
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).to("cpu", dtype)

    if ranks.first and stage.lora_rank:
        with atomic_folder(output / ADAPTER) as folder:
            write_adapter(model, folder, str(checkpoint))
    elif ranks.first:
        with atomic_folder(output / MODEL) as folder:
            write_checkpoint(model, processor, folder, gathered)
    else:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                gathered(name, parameter.detach())


def remove_broken(output: Path) -> None:
    """Removes half-written folders that a killed run left in ``output``; those of another living process stay."""
    for path in [*output.glob(".*.partial-*"), *output.glob(".*.old-*")]:
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def whole(path: Path) -> bool:
    return (path / STATE).is_file() and (path / INDEX).is_file()


def steps(output: Path) -> list[Path]:
    """The ``step-N`` folders that hold a whole save, by N."""
    found = [p for p in output.glob("step-*") if p.name.removeprefix("step-").isdigit() and whole(p)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def broken_steps(output: Path) -> list[Path]:
    """``step-N`` folders that something else has taken a part of: a save is renamed to its place when it is whole."""
    return [p for p in sorted(output.glob("step-*")) if p.name.removeprefix("step-").isdigit() and not whole(p)]


def newest_step(output: Path) -> Path | None:
    """The whole ``step-N`` folder of the largest N, if there is one."""
    return next(reversed(steps(output)), None)


def resume(path: Path, model: Phi4RV, optimizer: Optimizer | Layerwise, ranks: Ranks, run: dict[str, Any]) -> None:
    """Takes model, optimizer and random states back to ``path``, saved by any number of ranks.

    UserError if the run was told otherwise then, naming the option.
    """
    state = read_json(path / STATE)
    then, now = {**state.get("recipe", {}), **state}, {**asdict(optimizer.stage), **run}
    for key, value in now.items():
        was = then.get(key)
        if json.loads(json.dumps(value)) != was:
            raise UserError(
                f"--resume: {path} was made with {key}={was}, this run has {key}={value}; "
                "give the same options, or start in another --output"
            )
    tensors = contents(model, optimizer)
    own = random_name(ranks.rank)
    if own in saved_names(path):  # with more ranks than then, the others keep what the seed gave them
        tensors[own] = random_state()
    read(path, tensors)
    optimizer.load_state(optimizer.state(), state["step"], state.get("skipped_steps", 0))
    if own in tensors:
        set_random_state(tensors[own])


def saved_names(path: Path) -> set[str]:
    try:
        return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    except FileNotFoundError:
        raise UserError(f"{path / INDEX}: missing; the save is not whole, resume from another") from None
    except Exception as error:  # whatever unpickling makes of broken bytes
        raise UserError(f"{path / INDEX}: cannot be read ({_reason(error)}); resume from another save") from None


def read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills ``tensors`` from a save, each rank its parts. UserError if it is damaged, or they are not in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path))
    except (Exception, CheckpointException) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}); resume from another save") from None


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
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.replace(path)
