"""Which candidate ``benchmarks.tune`` chooses, with kernels and a clock that are not real."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tune
from benchmarks.kernels.case import Case, Draw
from benchmarks.tune import Candidate
from triton_kernels.common.tuning import Config, SearchSpace

CPU = torch.device("cpu")


def _inputs(draw: Draw) -> tuple[Tensor]:
    return (draw.normal(8, dtype=torch.float32, grad=True),)


class Kernel:
    """Doubles its input; what each ``SIZE`` does and how long it takes is given."""

    def __init__(self, times: dict[int, float], effects: dict[int, Callable[[Tensor], Tensor]] | None = None):
        self.times, self.effects, self.runs = times, effects or {}, 0
        self.space = SearchSpace("toy.kernel", {"row": [{"SIZE": size} for size in times], "other": [{"SIZE": 0}]})

    def __call__(self, x: Tensor) -> Tensor:
        size = self.space.pick("row", CPU)["SIZE"]
        return self.effects.get(size, lambda y: y)(2 * x)

    def timer(self, make: Any) -> float:
        make()()
        return self.times[self.space.pick("row", CPU)["SIZE"]]

    def case(self, shape: str = "8", backward: bool = False) -> Case:
        return Case(
            "toy", shape, lambda draw: (draw.normal(8, dtype=torch.float32, grad=True),), self, backward=backward
        )

    def candidates(self, *cases: Case) -> list[Candidate]:
        found = tune.tune(cases or [self.case()], "cpu", self.timer)
        assert found.keys() == {("toy.kernel", "row")}
        return found["toy.kernel", "row"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Leaves the list of spaces as it was."""
    spaces = list(SearchSpace.all)
    yield
    SearchSpace.all[:] = spaces


def chosen(candidates: list[Candidate]) -> Config | None:
    best = tune.fastest_candidate(candidates)
    return best.config if best else None


def test_fastest_is_chosen() -> None:
    assert chosen(Kernel({1: 3.0, 2: 1.0, 4: 2.0}).candidates()) == {"SIZE": 2}


def test_noise_does_not_replace_the_default() -> None:
    assert chosen(Kernel({1: 1.0, 2: 0.995}).candidates()) == {"SIZE": 1}


def test_wrong_and_failing_candidates_are_not_chosen() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of shared memory\nand more")

    effects = {2: lambda x: x + 1e-3, 3: lambda x: x * torch.nan, 4: fail, 5: lambda x: x * (1 + 1e-7)}
    candidates = Kernel({1: 9.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}, effects).candidates()
    assert chosen(candidates) == {"SIZE": 5}
    assert [bool(candidate.error) for candidate in candidates] == [False, True, True, True, False]
    assert candidates[3].error == "RuntimeError: out of shared memory"


def test_nothing_is_chosen_if_the_default_fails() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError

    kernel = Kernel({1: 1.0, 2: 2.0})
    candidates = [Candidate({"SIZE": size}) for size in (1, 2)]
    kernel.effects[1] = fail
    tune._measure(kernel.case(), "cpu", kernel.space, candidates, kernel.timer)
    assert chosen(candidates) is None
    assert list(tune.report_lines({("toy.kernel", "row"): candidates}))[2] == "         -  SIZE=2"


def test_shapes_count_alike() -> None:
    """Half the time of a short shape is worth more than a tenth less of a long one."""
    candidates = [
        Candidate({"SIZE": 1}, {"short": 1.0, "long": 100.0}),
        Candidate({"SIZE": 2}, {"short": 0.5, "long": 101.0}),
        Candidate({"SIZE": 3}, {"short": 1.0, "long": 90.0}),
        Candidate({"SIZE": 4}, {"short": 0.1}, error="differs at the other"),
    ]
    assert chosen(candidates) == {"SIZE": 2}


def test_every_shape_is_timed() -> None:
    kernel = Kernel({1: 1.0, 2: 0.5})
    candidates = kernel.candidates(kernel.case("8"), kernel.case("9"))
    assert [candidate.ms for candidate in candidates] == [{"toy 8": 1.0, "toy 9": 1.0}, {"toy 8": 0.5, "toy 9": 0.5}]


def test_only_what_is_timed_counts_as_used() -> None:
    """A backward case computes its result beforehand, with kernels that are not its own."""
    kernel = Kernel({1: 1.0, 2: 0.5})
    assert tune.tune([kernel.case(backward=True)], "cpu", kernel.timer) == {}


def test_no_shape_is_begun_after_the_deadline() -> None:
    kernel = Kernel({1: 1.0, 2: 0.5})
    assert tune.tune([kernel.case()], "cpu", kernel.timer, deadline=0.0) == {}


def test_operators_in_place_are_compared_by_what_they_write() -> None:
    def double(x: Tensor) -> None:
        x.mul_(2)

    case = Case("toy", "3", lambda draw: (draw.normal(3, dtype=torch.float32),), double)
    (written,) = tune.prepare(case, "cpu")()()
    assert torch.equal(written, 2 * Draw("cpu", torch.float32).normal(3))


def test_table_keeps_what_was_not_measured(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    file.write_text('{"A": {"x.y": {"row": {"SIZE": 1}}}, "B": {"x.y": {"row": {"SIZE": 1}, "old": {"SIZE": 7}}}}')
    candidates = {
        ("x.y", "row"): [Candidate({"SIZE": 1}, {"8": 2.0}), Candidate({"SIZE": 2, "num_warps": 8}, {"8": 1.0})],
        ("x.z", "row"): [Candidate({"SIZE": 1}, error="failed")],
    }
    tune.write(candidates, "B", file)
    assert json.loads(file.read_text()) == {
        "A": {"x.y": {"row": {"SIZE": 1}}},
        "B": {"x.y": {"row": {"SIZE": 2, "num_warps": 8}, "old": {"SIZE": 7}}},
    }
    assert '"row": {"SIZE": 2, "num_warps": 8}' in file.read_text()


def test_report_marks_the_chosen() -> None:
    lines = list(tune.report_lines(tune.tune([(kernel := Kernel({1: 2.0, 2: 1.0})).case()], "cpu", kernel.timer)))
    assert lines == ["toy.kernel row: toy 8 2 ms", "     1.000  SIZE=1", "  *  0.500  SIZE=2"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "error: benchmarks.tune: no GPU is here; timings of another device mean nothing\n"


def test_real_kernels_are_found() -> None:
    """At the tiny shapes every operation picks from spaces of its own, and all its candidates agree."""
    from benchmarks.kernels.cases import gelu

    candidates = tune.tune(gelu.cases(tiny=True), "cpu", lambda make: 1.0)
    assert candidates.keys() == {(f"gelu.{way}", kind) for way in ("forward", "backward") for kind in ("tanh", "erf")}
    assert not [candidate.error for candidates in candidates.values() for candidate in candidates if candidate.error]
