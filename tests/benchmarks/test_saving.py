"""The benchmark of saves: what counts as a stall, and that the real loop saves what it says."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import saving


class FakeLoop:
    """Steps of 1 s, of 1.5 s beside a write; a write lasts two of them."""

    def __init__(self) -> None:
        self.now, self.left = 0.0, 0

    def step(self) -> None:
        self.now += 1.5 if self.left else 1.0
        self.left = max(0, self.left - 1)

    def save(self) -> None:
        self.now, self.left = self.now + 0.25, 2

    def is_writing(self) -> bool:
        return self.left > 0

    def wait(self) -> None:
        assert not self.left

    def torch_save(self) -> None:
        self.now += 3

    def dcp_save(self) -> None:
        self.now += 5

    def size(self) -> int:
        return 10**6


def fake_stall(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    loop: Any = FakeLoop()
    monkeypatch.setattr(saving.time, "perf_counter", lambda: loop.now)
    return saving.stall(loop, rounds=3)


def test_a_stall_is_the_copies_and_the_slower_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_stall(monkeypatch)
    assert found["step_ms"] == 1000 and found["steps_beside_the_write"] == 2
    assert found["ours_ms"] == pytest.approx(250 + 2 * 500) and found["ours_begin_ms"] == 250
    assert (found["torch_save_ms"], found["dcp_save_ms"]) == (3000, 5000)
    assert found["ours_share"] == pytest.approx(1.25 / saving.SAVE_EVERY) and found["verdict"] == "met"
    monkeypatch.setattr(saving, "SAVE_EVERY", 50)
    assert fake_stall(monkeypatch)["verdict"] == "missed"
    text = saving.table([found])
    assert "every 200 steps of 1000 ms" in text and "0.625% of the time" in text


def test_the_real_loop(tmp_path: Path) -> None:
    loop = saving.TrainingLoop(tmp_path)
    found = saving.stall(loop, rounds=1)
    parameters = sum(p.numel() for p in loop.model.parameters())
    trained = sum(p.numel() for p in loop.optimizer.params.values())
    assert found["bytes"] == 4 * (parameters + 2 * trained)
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["step-1"]
    assert (tmp_path / "torch.pt").stat().st_size >= found["bytes"]
    assert sum(p.stat().st_size for p in (tmp_path / "dcp").iterdir()) >= found["bytes"]
