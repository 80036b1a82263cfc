"""A decode step needs only its indices from the host, as the meta device shows, which has no values to read."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.sampling_params import SamplingParams
from phi4rv.processing.processor import Prompt
from tests.small import small_model


class Copies(TorchDispatchMode):
    """Lists the operations that take from the host to the device, and whether they wait for what is in flight."""

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


def on_meta(monkeypatch: pytest.MonkeyPatch, **config: Any) -> Engine:
    model, processor = small_model(context=320)
    monkeypatch.setattr(Engine, "_set_kv_cache_scales", lambda engine: None)  # reads values, once
    model.to("meta").ops.paged_decode_attention = lambda q, *rest: q.clone()  # as kernels do, unlike the definition
    return Engine((model, processor), config=EngineConfig(**config))


@pytest.mark.parametrize("cache_dtype", [None, "fp8"])
def test_a_step_needs_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch, cache_dtype: str | None) -> None:
    """So a graph can hold all of it."""
    runner = on_meta(monkeypatch, cache_dtype=cache_dtype).model_runner
    for count, query_len, all_greedy in itertools.product((1, 8), (1, 5), (True, False)):
        with torch.inference_mode(), Copies() as copies:
            indices = torch.zeros(count, dtype=torch.int64, device="meta")
            output = runner._decode(indices, query_len, all_greedy)
        assert output.token_ids.shape == (count, query_len)
        assert copies.waits == []


def test_a_step_is_launched_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """With graphs too, whose indices lie where they lay at the capture."""

    class Captured:
        enabled = True

        def warmed_up(self, key: Any) -> bool:
            return key is not None

        def run(self, key: Any, step: Callable[[], Any]) -> Any:
            return step()

    runner = on_meta(monkeypatch).model_runner
    runner.cuda_graphs = Captured()  # type: ignore[assignment]
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    for index in range(3):
        with torch.inference_mode(), Copies() as copies:
            runner.decode([index], 5, True)
        assert copies.waits == [False]
    assert len(runner._static_indices) == 1


def test_capturing_graphs_in_the_middle_of_an_answer_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch size, query length and kind is run as often as a graph needs, on padding rows."""

    class Counted:
        enabled = True

        def __init__(self) -> None:
            self.runs: Counter[Any] = Counter()

        def warmed_up(self, key: Any) -> bool:
            return self.runs[key] > 1

        def run(self, key: Any, step: Callable[[], Any]) -> Any:
            self.runs[key] += 1
            return step()

    engine = Engine(small_model(context=320), config=EngineConfig(page_size=16, max_running=20))
    params = SamplingParams(max_new_tokens=20)
    [alone] = engine.generate([Prompt("Hi")], params)
    engine.model_runner.cuda_graphs = counted = Counted()  # type: ignore[assignment]
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    for number, event in enumerate(engine.stream(Prompt("Hi"), params)):
        if number == 3:
            engine.warm_up()
        made = event.generation
    assert made is not None and made.token_ids == alone.token_ids
    keys = {key for key, runs in counted.runs.items() if runs > 1}
    assert keys == set(itertools.product((1, 2, 4, 8, 16, 20), (1, 5), (True, False)))
