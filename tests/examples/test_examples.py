"""The programs of examples/, run as their docstrings say, on models that are small enough for it."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import infer
from examples import batch_inference, chat_client, custom_kernel, finetune_30_records
from tests import small
from tests.serving import serving


def test_every_example_is_listed() -> None:
    folder = small.ROOT / "examples"
    listed = re.findall(r"\[(\w+\.py)\]\(\1\)", (folder / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in folder.glob("*.py"))


def test_the_page_shows_the_kernel_as_it_is() -> None:
    """The parts of custom_kernel.py that docs/kernels.md walks through."""
    source = "\n".join(map(str.strip, (small.ROOT / "examples" / "custom_kernel.py").read_text().splitlines()))
    page = (small.ROOT / "docs" / "kernels.md").read_text()
    parts = re.findall(r"<!-- not run: a part of examples/custom_kernel\.py -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(parts) >= 8
    for part in parts:
        assert "\n".join(map(str.strip, part.splitlines())) in source, part


def test_finetuning_lowers_the_loss_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune_30_records.main(["--output", str(tmp_path), "--max-steps", "10"])
    told = capsys.readouterr().out
    first, last = map(float, re.findall(r"loss: (\S+) in the first step, (\S+) in the last", told)[0])
    assert last < first / 4
    assert re.search(r"asked about a green circle: \S", told)
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 30
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_batch_is_answered_in_order_and_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than are read ahead, one of them without its picture."""
    monkeypatch.setattr(batch_inference, "CONFIG", infer.EngineConfig(max_running=2, cache_tokens=4096))
    monkeypatch.setattr(batch_inference, "AHEAD", 4)
    checkpoint = small.small_checkpoint(tmp_path)
    image = small.picture(tmp_path, "a.png", 60, 40)
    prompts = [{"id": str(i), "prompt": "Count. " * (1 + i % 3), "mode": "nothink"} for i in range(6)]
    prompts[2] |= {"prompt": "<image>\nWhat is this?", "images": [image]}
    prompts[4] |= {"prompt": "<image>\nAnd this?", "images": ["nowhere.png"]}
    asked, output = small.write_jsonl(tmp_path / "prompts.jsonl", prompts), tmp_path / "answers.jsonl"
    argv = [str(checkpoint), str(asked), str(output), "--max-new-tokens", "8"]

    batch_inference.main(argv)
    whole = output.read_text()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["id"] for answer in answers] == [prompt["id"] for prompt in prompts]
    assert "nowhere.png" in answers[4]["error"]
    assert all(answer["text"] and answer["thinking"] is None for answer in answers if "error" not in answer)

    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:10])  # stopped in the middle of a line
    batch_inference.main(argv)
    assert output.read_text() == whole


def test_the_client_chats_with_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two turns, the first with a picture and a thought, to the tokens that the engine gives without the server."""
    engine = infer.Engine(small.small_model(context=4096), config=infer.EngineConfig(cache_tokens=4096))
    image = tmp_path / small.picture(tmp_path, "a.png", 60, 40)
    monkeypatch.setenv("PHI4RV_API_KEY", "secret")
    with serving(engine, api_key="secret") as served:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {image}\nWhat is this?\nAnd then?\n"))
        chat_client.main(["--url", served.url, "--effort", "low", "--max-tokens", "12"])
        thoughts = re.findall(r"\033\[2m(.*?)\033\[0m", capsys.readouterr().out, re.DOTALL)
        assert "".join(thoughts).strip()

        monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\nAnd then?\n"))
        chat_client.main(["--url", served.url, "--effort", "none", "--max-tokens", "12"])
        told = capsys.readouterr().out
        assert told.strip() and chat_client.DIM not in told
        assert engine.stats.finished["length"] + engine.stats.finished["stop"] == 4

        monkeypatch.setenv("PHI4RV_API_KEY", "wrong")
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n"))
        with pytest.raises(SystemExit, match="error: Authorization"):
            chat_client.main(["--url", served.url])
    with pytest.raises(SystemExit, match=r"does not answer .*start python -m infer\.serve"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello?\n"))
        chat_client.main(["--url", served.url])


def test_the_kernel_is_right_and_a_wrong_one_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["custom_kernel"])
    monkeypatch.setattr(custom_kernel, "IMPLEMENTATIONS", custom_kernel.IMPLEMENTATIONS.copy())
    monkeypatch.setattr("phi4rv.ops.registry.IMPLEMENTATIONS", custom_kernel.IMPLEMENTATIONS)
    custom_kernel.main()
    assert "runs as triton" in capsys.readouterr().out
    x = torch.tensor([float("nan"), -1.0, 3.0])
    assert custom_kernel.squared_relu(x.to(custom_kernel.DEVICE)).tolist()[1:] == [0.0, 9.0]
    monkeypatch.setattr(custom_kernel, "definition", lambda x: torch.relu(x).square() + 0.01 * x.clamp(max=0))
    with pytest.raises(AssertionError, match="largest error"):
        custom_kernel.check()
