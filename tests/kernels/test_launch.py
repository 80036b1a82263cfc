"""What the launch functions share, and the choice of configurations."""

from __future__ import annotations

import json

import pytest
import torch

from triton_kernels.common import launch, tuning

CPU = torch.device("cpu")


def test_rows_copy_only_what_is_not_adjacent() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    assert launch.flatten_to_2d(x).shape == (6, 4) and launch.flatten_to_2d(x).data_ptr() == x.data_ptr()
    assert launch.flatten_to_2d(x[0, 0]).shape == (1, 4)
    strided = x.view(6, 4)[:, 1:3]
    assert launch.flatten_to_2d(strided).data_ptr() == strided.data_ptr()
    turned = x.view(6, 4).T
    assert launch.flatten_to_2d(turned).stride(-1) == 1 and torch.equal(launch.flatten_to_2d(turned), turned)


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check_float(torch.ones(1), "op: x")
    with pytest.raises(ValueError, match=r"^op: x is torch.int32, must be float32, float16 or bfloat16$"):
        launch.check_float(torch.ones(1, dtype=torch.int32), "op: x")
    monkeypatch.setattr(launch, "INTERPRETED", True)
    with pytest.raises(ValueError, match=r"^op: x is bfloat16, which Triton's interpreter computes wrongly"):
        launch.check_float(torch.ones(1, dtype=torch.bfloat16), "op: x")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    launch.check_float(torch.ones(1, dtype=torch.bfloat16), "op: x")


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> tuning.SearchSpace:
    monkeypatch.setattr(tuning.SearchSpace, "all", [])
    return tuning.SearchSpace("toy.kernel", {"a": [{"B": 1}, {"B": 2}], "b": [{"B": 3}]})


def test_first_candidate_unless_measured(space: tuning.SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert space.pick("a", CPU) == {"B": 1}
    monkeypatch.setattr(tuning, "_tuned_configs", lambda: {"cpu": {"toy.kernel": {"a": {"B": 2}}}})
    assert (space.pick("a", CPU), space.pick("b", CPU)) == ({"B": 2}, {"B": 3})


def test_forced_only_where_it_is_a_candidate(space: tuning.SearchSpace) -> None:
    with space.forced({"B": 2}):
        assert (space.pick("a", CPU), space.pick("b", CPU)) == ({"B": 2}, {"B": 3})
    assert space.pick("a", CPU) == {"B": 1}


def test_measured_configurations_are_candidates() -> None:
    """The table on disk names only kernels, cases and configurations that exist."""
    for spaces in json.loads(tuning.TABLE.read_text()).values():
        for name, cases in spaces.items():
            space = next(s for s in tuning.SearchSpace.all if s.name == name)
            assert all(config in space.cases[case] for case, config in cases.items()), name
