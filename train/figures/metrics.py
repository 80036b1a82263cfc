"""What a run shows while it goes and leaves behind: progress bar, metrics.jsonl, TensorBoard's events."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from phi4rv.errors import UserError
from train.anomalies import Spikes

METRICS = "metrics.jsonl"
T = TypeVar("T")
# What TensorBoard draws of a step, where a number is given.
DRAWN = (
    *("loss", "loss_reasoning", "loss_direct", "grad_norm", "lr", "skipped_steps"),
    *("tokens_per_second", "images_per_second", "tflops", "mfu", "data_wait", "memory"),
)


class Timed(Iterator[T]):
    """Passes an iterator's items on and adds up the seconds that it takes to give them."""

    def __init__(self, items: Iterable[T]):
        self.items, self.seconds = iter(items), 0.0

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began


def speed(counted: dict[str, float], seconds: float, world: int, peak: float | None) -> dict[str, float | None]:
    """Rates of a step over its whole time, the wait for data included.

    tflops = useful operations / (seconds · devices) / 10¹², and mfu = tflops / peak (model FLOPs utilisation, Chowdhery
    et al. 2022, appendix B). Useful are the products of ``data/flops.py``: no padding, no recomputation, no output
    layer on tokens without a label. ``peak``: TFLOP/s of a device's dense products, from ``planning/hardware.py`` or
    ``--peak-tflops``; mfu is None without it.
    """
    tflops = counted["operations"] / seconds / world / 1e12
    return {
        "seconds": seconds,
        "tokens_per_second": counted["tokens"] / seconds,
        "images_per_second": counted["images"] / seconds,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA tensors took on this rank's device so far, or of a CPU's process the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Progress:
    """The progress bar on stderr, and one JSON object a step appended to ``path``, flushed at once.

    A step's ``records`` are written where it was skipped or its loss is a spike. TensorBoard's events go into a folder
    beside ``path`` where the package is installed.
    """

    def __init__(self, path: Path, start: int, total: int):
        before = read_metrics(path) if path.exists() else []
        self.spikes = Spikes(e["loss"] for e in before if e.get("loss") is not None and not e.get("not_finite"))
        self.path, self.file = path, path.open("a", encoding="utf-8")
        self.events = tensorboard(path.parent / "tensorboard", start)
        often = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log keeps every state of the bar
        self.bar = tqdm(total=total, initial=start, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=often)

    def step(self, metrics: dict[str, Any]) -> None:
        odd = self._odd(metrics)
        metrics = {k: v for k, v in metrics.items() if k != "records"} | odd
        if odd:
            tqdm.write(_told(metrics), file=sys.stderr)
        self.write(metrics)
        if self.events:
            for name in DRAWN:
                if finite(metrics.get(name)):
                    self.events.add_scalar(name, metrics[name], metrics["step"])
        mfu = metrics.get("mfu")
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['images_per_second']:.0f} images/s" + (f", MFU {mfu:.1%}" if mfu else ""),
            refresh=False,
        )
        self.bar.update()

    def _odd(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What an unusual step has beside the others: why, and its records."""
        for what, name in (("loss", "loss"), ("gradient norm", "grad_norm")):
            if not finite(metrics[name]):
                return {"not_finite": f"the {what} is {metrics[name]}", "records": metrics["records"]}
        limit = self.spikes.add(metrics["loss"])
        return {} if limit is None else {"spike_over": limit, "records": metrics["records"]}

    def write(self, entry: dict[str, Any]) -> None:
        """JSON has no NaN: null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        try:
            self.file.write(json.dumps(plain) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room, then --resume") from None

    def close(self) -> None:
        self.bar.close()
        with suppress(OSError):  # what could not be written has been said
            self.file.close()
        if self.events:
            self.events.close()


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _told(metrics: dict[str, Any]) -> str:
    """One line for the log: ``step 7 skipped (1 so far): the loss is nan; records: a.jsonl:1, …``."""
    if "not_finite" in metrics:
        what = f"skipped ({metrics['skipped_steps']} so far): {metrics['not_finite']}"
    else:
        what = f"spike: the loss is {metrics['loss']:.3f}, usual is up to {metrics['spike_over']:.3f}"
    shown = metrics["records"][:5]
    more = len(metrics["records"]) - len(shown)
    rest = f" and {more} more, in metrics.jsonl" if more else ""
    return f"step {metrics['step']} {what}; records: {', '.join(shown)}{rest}"


def tensorboard(folder: Path, start: int) -> Any:
    """A writer of events after step ``start`` (a run taken up again hides later ones), None if not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl. UserError naming the line that is not one; a last line cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give a metrics.jsonl") from None
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines) and entries:
                break
            raise UserError(f"{path}:{number}: not JSON; a metrics.jsonl has one object a line") from None
        if not isinstance(entry, dict):
            raise UserError(f"{path}:{number}: no JSON object; a metrics.jsonl has one a line")
        entries.append(entry)
    return entries
