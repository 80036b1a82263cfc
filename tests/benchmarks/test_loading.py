"""The benchmark of loads: that it loads what it says, and whose share is held to the goal."""

from typing import Any

import pytest
import torch

from benchmarks import loading
from tests.small import small_config, small_model


def test_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a load takes 2 s and the copies 1 s."""
    calls: list[str] = []

    def timed(load: Any, device: torch.device) -> float:
        calls.append(load.__name__)
        load()
        return 1.0 if load.__name__ == "copies" else 2.0

    monkeypatch.setattr(loading, "fastest_seconds", timed)
    monkeypatch.setattr(loading, "COPIES", 2)
    ours, int4, theirs = loading.run(small_config(), torch.device("cpu"))
    assert calls == ["copies", "<lambda>", "<lambda>", "<lambda>"]
    assert (ours["case"], int4["case"], theirs["case"]) == ("ours", "int4", "safetensors")
    assert ours["bytes"] == int4["bytes"] and ours["bytes"] == 2 * sum(p.numel() for p in small_model()[0].parameters())
    assert ours["rate"] == ours["bytes"] / 2 and ours["copy_rate"] == 2 * loading.CHUNK_BYTES
    assert ours["verdict"] == "missed" and "verdict" not in theirs
    assert "missed" in loading.table([ours, int4, theirs]) and "safetensors" in loading.table([ours, int4, theirs])


def test_the_fastest_but_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 10, 15, 20, 24, 30, 36])
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(ticks))
    assert loading.fastest_seconds(lambda: None, torch.device("cpu")) == 4
