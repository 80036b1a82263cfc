"""Metrics of a run: progress bar, metrics.jsonl, TensorBoard events, throughput and MFU."""

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
from train.anomalies import LossSpikes

METRICS = "metrics.jsonl"
T = TypeVar("T")
# Metrics of a step that are written to TensorBoard, where they are finite.
TENSORBOARD_SCALARS = (
    *("loss", "loss_reasoning", "loss_direct", "grad_norm", "lr", "skipped_steps"),
    *("tokens_per_second", "images_per_second", "tflops", "mfu", "data_wait", "memory"),
)


class TimedIterator(Iterator[T]):
    """Passes on an iterator's items and adds up the seconds spent waiting for them."""

    def __init__(self, items: Iterable[T]):
        self.items, self.seconds = iter(items), 0.0

    def __next__(self) -> T:
        began = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - began


def throughput(
    stats: dict[str, float], seconds: float, world_size: int, peak_tflops: float | None
) -> dict[str, float | None]:
    """Rates of a step over its whole time, the wait for data included.

    tflops = model FLOPs / (seconds · devices) / 10¹², and mfu = tflops / peak_tflops (model FLOPs utilisation,
    Chowdhery et al. 2022, appendix B). Model FLOPs are those of ``data/flops.py``: no padding, no recomputation, no
    output layer on tokens without a label. ``peak_tflops``: a device's dense matrix products, from
    ``planning/hardware.py`` or ``--peak-tflops``; mfu is None without it.
    """
    tflops = stats["operations"] / seconds / world_size / 1e12
    return {
        "seconds": seconds,
        "tokens_per_second": stats["tokens"] / seconds,
        "images_per_second": stats["images"] / seconds,
        "tflops": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: peak CUDA memory allocated on this rank's device; on a CPU the process's peak resident set size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MetricsLogger:
    """A progress bar on stderr, and one JSON object a step appended to ``path``, flushed at once.

    ``records`` are written for a step that was skipped or whose loss is a spike. TensorBoard events go to a folder
    beside ``path`` if the package is installed.
    """

    def __init__(self, path: Path, start: int, total: int):
        before = read_metrics(path) if path.exists() else []
        self.spikes = LossSpikes(e["loss"] for e in before if e.get("loss") is not None and not e.get("not_finite"))
        self.path, self.file = path, path.open("a", encoding="utf-8")
        self.events = tensorboard_writer(path.parent / "tensorboard", start)
        seconds = 0.2 if sys.stderr.isatty() else 10.0  # between updates; a log file keeps every one
        self.bar = tqdm(
            total=total, initial=start, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=seconds
        )

    def log_step(self, metrics: dict[str, Any]) -> None:
        anomaly = self._anomaly(metrics)
        metrics = {k: v for k, v in metrics.items() if k != "records"} | anomaly
        if anomaly:
            tqdm.write(_anomaly_line(metrics), file=sys.stderr)
        self.write(metrics)
        if self.events:
            for name in TENSORBOARD_SCALARS:
                if is_finite(metrics.get(name)):
                    self.events.add_scalar(name, metrics[name], metrics["step"])
        mfu = metrics.get("mfu")
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['images_per_second']:.0f} images/s" + (f", MFU {mfu:.1%}" if mfu else ""),
            refresh=False,
        )
        self.bar.update()

    def _anomaly(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Of a skipped step or a loss spike: the reason, and its records."""
        for what, name in (("loss", "loss"), ("gradient norm", "grad_norm")):
            if not is_finite(metrics[name]):
                return {"not_finite": f"the {what} is {metrics[name]}", "records": metrics["records"]}
        limit = self.spikes.add(metrics["loss"])
        return {} if limit is None else {"spike_over": limit, "records": metrics["records"]}

    def write(self, entry: dict[str, Any]) -> None:
        """Appends a line; NaN and infinities become null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        try:
            self.file.write(json.dumps(plain) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); make room, then --resume") from None

    def close(self) -> None:
        self.bar.close()
        with suppress(OSError):  # ``write`` has raised already
            self.file.close()
        if self.events:
            self.events.close()


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _anomaly_line(metrics: dict[str, Any]) -> str:
    """One line for the log: ``step 7 skipped (1 so far): the loss is nan; records: a.jsonl:1, …``."""
    if "not_finite" in metrics:
        what = f"skipped ({metrics['skipped_steps']} so far): {metrics['not_finite']}"
    else:
        what = f"spike: the loss is {metrics['loss']:.3f}, usual is up to {metrics['spike_over']:.3f}"
    shown = metrics["records"][:5]
    more = len(metrics["records"]) - len(shown)
    rest = f" and {more} more, in metrics.jsonl" if more else ""
    return f"step {metrics['step']} {what}; records: {', '.join(shown)}{rest}"


def tensorboard_writer(folder: Path, start: int) -> Any:
    """A SummaryWriter that hides events after step ``start`` of an earlier run; None if TensorBoard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, without an incomplete last line. UserError naming a line that is not one."""
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
