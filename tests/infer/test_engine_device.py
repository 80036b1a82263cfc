"""A decode step asks the host for nothing but its slots, as the meta device shows, which has no values to ask for."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infer.engine.config import Limits
from infer.engine.engine import Engine
from infer.requests.request import Options
from phi4rv.processing.processor import Prompt
from tests.small import small_model


class Copies(TorchDispatchMode):
    """Lists the operations that take from the host to the device, and whether they wait for what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # into its parts
            out = op.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = op(*args, **kwargs)
            devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            if len(devices) > 1:
                self.waits.append(not (args[2] if op is torch.ops.aten.copy_.default else kwargs.get("non_blocking")))
        return out


def on_meta(monkeypatch: pytest.MonkeyPatch, **limits: Any) -> Engine:
    model, processor = small_model(context=320)
    monkeypatch.setattr(Engine, "_calibrate", lambda engine: None)  # reads values, once
    model.to("meta").ops.paged_decode_attention = lambda q, *rest: q.clone()  # as kernels do, unlike the definition
    return Engine((model, processor), limits=Limits(**limits))


@pytest.mark.parametrize("cache_dtype", [None, "fp8"])
def test_a_step_asks_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch, cache_dtype: str | None) -> None:
    """So a graph can hold all of it."""
    steps = on_meta(monkeypatch, cache_dtype=cache_dtype).steps
    for count, width, plain in itertools.product((1, 8), (1, 5), (True, False)):
        with torch.inference_mode(), Copies() as copies:
            chosen = steps._decode(torch.zeros(count, dtype=torch.int64, device="meta"), width, plain)
        assert chosen.tokens.shape == (count, width)
        assert copies.waits == []


def test_a_step_is_launched_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """With graphs too, whose slots' numbers lie where they lay when it was recorded."""

    class Recorded:
        enabled = True

        def settled(self, key: Any) -> bool:
            return key is not None

        def run(self, key: Any, step: Callable[[], Any]) -> Any:
            return step()

    steps = on_meta(monkeypatch).steps
    steps.graphs = Recorded()  # type: ignore[assignment]
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    for slot in range(3):
        with torch.inference_mode(), Copies() as copies:
            steps.decode([slot], 5, True)
        assert copies.waits == [False]
    assert len(steps._which) == 1


def test_recording_graphs_in_the_middle_of_an_answer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch size, width and kind is run as often as a graph needs, by slots that are nobody's."""

    class Counted:
        enabled = True

        def __init__(self) -> None:
            self.runs: Counter[Any] = Counter()

        def settled(self, key: Any) -> bool:
            return self.runs[key] > 1

        def run(self, key: Any, step: Callable[[], Any]) -> Any:
            self.runs[key] += 1
            return step()

    engine = Engine(small_model(context=320), limits=Limits(page_size=16, max_running=20))
    options = Options(max_new_tokens=20)
    [alone] = engine.generate([Prompt("Hi")], options)
    engine.steps.graphs = counted = Counted()  # type: ignore[assignment]
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    for number, event in enumerate(engine.stream(Prompt("Hi"), options)):
        if number == 3:
            engine.warm_up()
        made = event.generation
    assert made is not None and made.token_ids == alone.token_ids
    keys = {key for key, runs in counted.runs.items() if runs > 1}
    assert keys == set(itertools.product((1, 2, 4, 8, 16, 20), (1, 5), (True, False)))
