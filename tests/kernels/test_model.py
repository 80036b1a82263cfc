"""The whole model on Triton kernels alone: the golden cases of the published code, one optimizer step, generation."""

from __future__ import annotations

import parity
import pytest
import torch

import phi4rv
from infer.engine import generate
from tests.kernels.check import PLACE, Place

CASES = parity.cases()


@pytest.fixture(scope="module", params=PLACE)
def on_triton(request: pytest.FixtureRequest) -> tuple[phi4rv.Phi4RV, phi4rv.Processor]:
    place: Place = request.param
    return phi4rv.load(parity.CHECKPOINT, device=place[0], dtype=torch.float32, kernels="triton")


def test_every_operation_is_a_triton_kernel(on_triton: tuple[phi4rv.Phi4RV, phi4rv.Processor]) -> None:
    assert set(on_triton[0].ops.chosen.values()) == {"triton"}


@pytest.mark.parametrize("case", CASES)
def test_golden_cases(on_triton: tuple[phi4rv.Phi4RV, phi4rv.Processor], case: parity.Case) -> None:
    for name, error in parity.errors(*on_triton, case).items():
        assert error < parity.BOUNDS[name], f"{name}: {error}"


def test_golden_tokens(on_triton: tuple[phi4rv.Phi4RV, phi4rv.Processor]) -> None:
    made = generate(*on_triton, [case.prompt for case in CASES], max_new_tokens=3)
    assert [generation.token_ids for generation in made] == [case.record["greedy"][:3] for case in CASES]
