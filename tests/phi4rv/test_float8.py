"""Training in fp8: the definition against numbers rounded by hand in float64, and whole runs beside bfloat16's."""

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.errors import UserError
from phi4rv.model.activation_checkpointing import CHECKPOINTING
from phi4rv.ops import reference
from phi4rv.quantization.float8_linear import Float8Linear, convert_to_float8_training
from tests.processes import read_log
from tests.processes import run as run_processes
from tests.small import mixed_data, small_checkpoint, small_model, timeless, weights
from tests.train.test_train_command import the_error
from train.data.loader import prefetch
from train.data.packed_dataset import PackedDataset
from train.data.stream import global_batches
from train.distributed.ranks import Ranks
from train.main import main
from train.optimizers.adamw import AdamW
from train.recipe import stage
from train.synthetic import tokenizer_corpus, write_dataset
from train.synthetic.tiny_model import build_tiny_model
from train.trainable import set_trainable
from train.trainer import train_step

VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
VALUES = VALUES[VALUES.isfinite()].unique()


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Units, the nearest that the format has, and the scales of the rows; x float64."""
    scales = x.abs().amax(1, keepdim=True) / 448
    return VALUES[(x[..., None] / scales[..., None] - VALUES).abs().argmin(-1)], scales


def test_definition_by_hand() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 32).double().requires_grad_()
    w = (torch.randn(16, 32) * torch.logspace(-2, 1, 16)[:, None]).double().requires_grad_()
    grad = torch.randn(9, 16).double()
    y = reference.fp8_linear(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), grad)
    (a, a_scales), (b, b_scales) = rounded(x.detach()), rounded(w.detach())
    torch.testing.assert_close(y, (a * a_scales) @ (b * b_scales).T, rtol=1e-5, atol=1e-6)
    g, g_scales = rounded(grad * b_scales.T)
    torch.testing.assert_close(dx, (g * g_scales) @ b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dw, grad.T @ x.detach())


def test_errors_are_those_of_three_bits() -> None:
    """Root mean squares of one rounding: 2⁻⁴ / √3 at the lower end of a binade, half of it at the upper."""
    torch.manual_seed(0)
    x, w, grad = torch.randn(200, 512), torch.randn(304, 512), torch.randn(200, 304)
    found = [], []
    for numbers, linear in zip(found, (reference.fp8_linear, nn.functional.linear), strict=True):
        leaves = [t.double().requires_grad_() for t in (x, w)]
        out = linear(*leaves)
        numbers += [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    errors = [float((ours - exact).norm() / exact.norm()) for ours, exact in zip(*found, strict=True)]
    assert 0.02 < errors[0] < 0.05 and 0.02 < errors[1] < 0.05 and errors[2] < 1e-12


def test_only_the_decoders_layers_are_replaced_and_keep_their_names() -> None:
    model, _ = small_model()
    before = dict(model.named_parameters())
    convert_to_float8_training(model)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    replaced = [n for n, m in model.named_modules() if isinstance(m, Float8Linear)]
    assert len(replaced) == 4 * model.config.num_hidden_layers and all(
        n.startswith("decoder.layers.") for n in replaced
    )


def test_widths_that_do_not_suit() -> None:
    config = dataclasses.replace(small_model()[0].config, intermediate_size=100)
    model = empty_model(config, "cpu", torch.float32)
    with pytest.raises(UserError, match=r"^--linear: .* multiples of 16, layers.0.mlp.gate_up_proj is 200 x 64$"):
        convert_to_float8_training(model)
    assert not any(isinstance(m, Float8Linear) for m in model.modules())


@pytest.mark.parametrize("overrides", [{"lora_rank": 4}, {"number": 1}])
def test_options_that_do_not_go_with_it(overrides: dict[str, Any]) -> None:
    number = overrides.pop("number", 2)
    with pytest.raises(UserError, match=r"^--linear: fp8 is for decoder weights that train"):
        stage(number, False, {**overrides, "linear": "fp8"})
    with pytest.raises(UserError, match=r"^--linear: 'fp4' is unknown, must be one of dtype, fp8$"):
        stage(2, False, {"linear": "fp4"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("inputs")
    line = ["--checkpoint", small_checkpoint(folder), "--data", mixed_data(folder), "--device", "cpu", "--stage", 2]
    line += ["--global-batch", 4, "--sequence-length", 256, "--warmup", 1, "--lr", 1e-3, "--seed", 3, "--max-steps", 40]
    return line


def losses(inputs: list[Any], output: Path, *more: Any) -> list[float]:
    assert main([*map(str, inputs), "--output", str(output), *map(str, more)]) == 0
    return [entry["loss"] for entry in timeless(output / "metrics.jsonl")]


def test_recomputation_changes_no_bit(inputs: list[Any], tmp_path: Path) -> None:
    """And the model that is left is the published one, in other weights than plain products leave."""
    line = [*inputs, "--max-steps", 5, "--dtype", "bfloat16"]
    plain, ours = (losses(line, tmp_path / kind, "--linear", kind) for kind in ("dtype", "fp8"))
    assert ours != plain
    for kind in CHECKPOINTING[1:]:
        assert losses(line, tmp_path / kind, "--linear", "fp8", "--checkpointing", kind) == ours, kind
    assert weights(tmp_path / "fp8" / "model").keys() == weights(tmp_path / "dtype" / "model").keys()


def test_the_embedded_model_learns_as_in_bfloat16(tmp_path: Path) -> None:
    """24 steps from random weights, the loss falls to a quarter; docs/fine-tune.md has longer runs."""
    chosen = stage(2, True, {})
    write_dataset(tmp_path, 2, "train", 64, seed=0)
    found = []
    for float8 in (False, True):
        model, processor = build_tiny_model(0, tokenizer_corpus(), "torch")
        model = model.to(torch.bfloat16)
        if float8:
            convert_to_float8_training(model)
        optimizer = AdamW(set_trainable(model, chosen), chosen, model.ops)
        dataset = PackedDataset([tmp_path / "stage2-train.jsonl"], processor, chosen)
        ahead = islice(prefetch(global_batches(dataset, 0)(), dataset, 0, 1), 8)
        steps = [list(ready.batches) for ready in ahead]
        found.append([train_step(model, optimizer, rows, 3e-4, Ranks())["loss"] for rows in 3 * steps])
    plain, ours = found
    assert plain[-1] < 0.25 * plain[0]
    assert ours == pytest.approx(plain, rel=0.05) and ours != plain
    assert sum(ours) == pytest.approx(sum(plain), rel=0.01)


def test_sharded(inputs: list[Any], tmp_path: Path) -> None:
    short = ["--max-steps", 4, "--linear", "fp8"]
    single = losses(inputs, tmp_path / "single", *short)
    log, output = tmp_path / "log", tmp_path / "out"
    argv = [*inputs, *short, "--output", output, "--shard", "full"]
    assert run_processes(2, log, argv) == [0, 0], read_log(log) + read_log(log, 1)
    both = [entry["loss"] for entry in timeless(output / "metrics.jsonl")]
    assert both == pytest.approx(single, rel=1e-3)  # a value at a half rounds either way


def test_a_run_goes_on_as_it_began(inputs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses(inputs, tmp_path, "--max-steps", 2, "--save-every", 2, "--linear", "fp8")
    argv = [*map(str, inputs), "--max-steps", "2", "--save-every", "2", "--output", str(tmp_path), "--resume"]
    capsys.readouterr()
    assert main(argv) == 2
    assert "was made with linear=fp8, this run has linear=dtype" in the_error(capsys)
