"""Asynchronous checkpoints of a run and resuming from them: ``step-N`` folders that are complete or not there.

A folder holds ``state.json``, ``config.json`` with the tokenizer's files, and model, optimizer and RNG states in the
format of torch.distributed.checkpoint: each rank writes its own shards, and any number of ranks can read them.
``python -m train.export`` converts one to the Hugging Face layout. Several nodes need a shared output folder.
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
from train.distributed.fsdp import to_local
from train.distributed.ranks import Ranks, new_gloo_group
from train.optimizers.adamw import AdamW
from train.optimizers.layerwise import LayerwiseAdamW
from train.recipe import Stage

STATE, INDEX, MODEL, ADAPTER = "state.json", ".metadata", "model", "adapter"
KEEP_ALL = 0


class AsyncCheckpointer:
    """Writes saves on a thread while training continues, one at a time. ``keep``: how many of the newest, 0 for all."""

    def __init__(self, output: Path, ranks: Ranks, keep: int = KEEP_ALL):
        self.output, self.ranks, self.keep = output, ranks, keep
        self.group = new_gloo_group(ranks)
        self.pid = ranks.broadcast(os.getpid())
        self.failure: str | None = None
        self._thread: threading.Thread | None = None

    def save(
        self,
        model: Phi4RV,
        processor: Processor,
        optimizer: AdamW | LayerwiseAdamW,
        dtype: torch.dtype,
        run: dict[str, Any],
    ) -> None:
        """Copies everything to the CPU and starts to write ``step-N``; every rank calls it after the same step.

        Waits if the previous save is still being written. ``run``: the run's options, and the position in the data.
        """
        self.wait()
        path = self.output / f"step-{optimizer.steps}"
        if self.ranks.broadcast(is_complete(path)):
            return
        tensors = {name: copy_to_cpu(t) for name, t in state_dict(model, optimizer).items()}
        tensors[rng_key(self.ranks.rank)] = rng_state()
        state = {"step": optimizer.steps, "skipped_steps": optimizer.skipped, "recipe": asdict(optimizer.stage), **run}
        device = model.device

        def write_checkpoint() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a new thread has device 0
            try:
                self._write(path, tensors, lambda folder: _write_metadata(folder, model, processor, dtype, state))
            except (Exception, CheckpointException) as error:
                self.failure = f"{path}: cannot be written ({_root_cause(error)})"

        self._thread = threading.Thread(target=write_checkpoint, name="save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is complete. UserError, on every rank, if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.failure = next(filter(None, self.ranks.all_gather(self.failure)), None)
        if self.failure:
            latest = latest_step(self.output)
            raise UserError(
                f"{self.failure}; nothing of it was left behind. Make room, then --resume, which continues from "
                f"{latest or 'the beginning'}"
            )

    def is_writing(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def latest(self) -> Path | None:
        """The newest save, once the one that is being written is complete or has failed."""
        self.close()
        return latest_step(self.output)

    def close(self) -> None:
        """Waits for the last save without raising, also where an error ends the run."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, path: Path, tensors: dict[str, Tensor], write_metadata: Any) -> None:
        partial = path.with_name(f".{path.name}.partial-{self.pid}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of a single process
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=self.group)
            # dcp.save returns on rank 0 only after every rank has written and flushed its files.
            if self.ranks.is_main_process:
                write_metadata(partial)
                fsync_folder(partial)
                replace_folder(partial, path)
                fsync_folder(self.output, deep=False)
                self._remove_old()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _remove_old(self) -> None:
        for path in saved_steps(self.output)[: -self.keep] if self.keep else []:
            # Renamed first: a half-removed folder must not look like a save.
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            path.rename(old)
            shutil.rmtree(old, ignore_errors=True)


def state_dict(model: Phi4RV, optimizer: AdamW | LayerwiseAdamW) -> dict[str, Tensor]:
    """The live tensors that a save holds: ``model/name``, in float32 where there is a master, and moments.

    Of a model with adapters only these: the base is the run's ``--checkpoint``.
    """
    state = optimizer.state_dict()
    masters = {n.removeprefix("master/"): t for n, t in state.items() if n.startswith("master/")}
    parameters = optimizer.params if optimizer.stage.lora_rank else dict(model.named_parameters())
    weights = {f"model/{n}": masters.get(n, p.detach()) for n, p in parameters.items()}
    return weights | {n: t for n, t in state.items() if not n.startswith("master/")}


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a DTensor a copy of this rank's shard."""
    copy = to_local(tensor.detach()).to("cpu", copy=True)
    if not isinstance(tensor, DTensor):
        return copy
    return DTensor(copy, tensor._spec, requires_grad=False)  # from_local would move it back to the mesh's device


def rng_key(rank: int) -> str:
    return f"random/{rank}"


def rng_state() -> Tensor:
    """States of this process's CPU and CUDA generators, concatenated (uint8)."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return torch.cat(states)


def set_rng_state(state: Tensor) -> None:
    """The inverse of ``rng_state``; a GPU's generator is left alone if the save has no state for it."""
    cpu = len(torch.get_rng_state())
    torch.set_rng_state(state[:cpu].clone())
    if torch.cuda.is_available() and len(state) > cpu:
        torch.cuda.set_rng_state(state[cpu:].clone())


def _write_metadata(
    folder: Path, model: Phi4RV, processor: Processor, dtype: torch.dtype, state: dict[str, Any]
) -> None:
    write_config_and_processor(model, processor, folder, dtype)
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")


def _root_cause(error: BaseException) -> str:
    """Message of the first error, on whichever rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def save_final_model(
    output: Path,
    model: Phi4RV,
    processor: Processor,
    stage: Stage,
    dtype: torch.dtype,
    ranks: Ranks,
    checkpoint: str | None = None,
) -> None:
    """Writes ``output/model`` in the Hugging Face layout, or ``output/adapter``, of base ``checkpoint``, in PEFT's.

    Rank 0 writes; every rank takes part in gathering sharded weights, one by one.
    """

    def gather_tensor(name: str, parameter: Tensor) -> Tensor:
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).to("cpu", dtype)

    if ranks.is_main_process and stage.lora_rank:
        with atomic_folder(output / ADAPTER) as folder:
            write_adapter(model, folder, str(checkpoint))
    elif ranks.is_main_process:
        with atomic_folder(output / MODEL) as folder:
            write_checkpoint(model, processor, folder, gather_tensor)
    else:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                gather_tensor(name, parameter.detach())


def remove_partial(output: Path) -> None:
    """Removes half-written folders that a killed run left in ``output``; those of a living process stay."""
    for path in [*output.glob(".*.partial-*"), *output.glob(".*.old-*")]:
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def is_complete(path: Path) -> bool:
    return (path / STATE).is_file() and (path / INDEX).is_file()


def saved_steps(output: Path) -> list[Path]:
    """The ``step-N`` folders that hold a complete save, by N."""
    found = [p for p in output.glob("step-*") if p.name.removeprefix("step-").isdigit() and is_complete(p)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def incomplete_steps(output: Path) -> list[Path]:
    """``step-N`` folders with missing files: something removed them, as a save gets this name when it is complete."""
    return [p for p in sorted(output.glob("step-*")) if p.name.removeprefix("step-").isdigit() and not is_complete(p)]


def latest_step(output: Path) -> Path | None:
    """The complete ``step-N`` folder of the largest N, if there is one."""
    return next(reversed(saved_steps(output)), None)


def resume(path: Path, model: Phi4RV, optimizer: AdamW | LayerwiseAdamW, ranks: Ranks, run: dict[str, Any]) -> None:
    """Loads model, optimizer and RNG states from ``path``, saved by any number of ranks.

    UserError naming an option that differs from the saved run's.
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
    tensors = state_dict(model, optimizer)
    key = rng_key(ranks.rank)
    if key in saved_keys(path):  # with more ranks than when saving, the others keep their seed
        tensors[key] = rng_state()
    load_tensors(path, tensors)
    optimizer.load_state_dict(optimizer.state_dict(), state["step"], state.get("skipped_steps", 0))
    if key in tensors:
        set_rng_state(tensors[key])


def saved_keys(path: Path) -> set[str]:
    try:
        return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    except FileNotFoundError:
        raise UserError(f"{path / INDEX}: missing; the save is incomplete, resume from another") from None
    except Exception as error:  # unpickling broken bytes raises anything
        raise UserError(f"{path / INDEX}: cannot be read ({_root_cause(error)}); resume from another save") from None


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Loads a save into ``tensors``, each rank its shards. UserError if it is damaged, or lacks one of them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path))
    except (Exception, CheckpointException) as error:
        raise UserError(f"{path}: cannot be read ({_root_cause(error)}); resume from another save") from None


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps after ``step``, which a resumed run repeats, and an incomplete last line."""
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
