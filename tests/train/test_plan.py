"""The plan's arithmetic against published formulas, numbers worked out by hand and what the kernels really keep."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phi4rv.batch import Sample, pack
from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.config import Config, VisionConfig
from phi4rv.model.activation_checkpointing import CHECKPOINTING
from tests.small import saved_bytes, small_checkpoint, write_jsonl
from train import recipe
from train.distributed.fsdp import SHARDS
from train.plan import main, mean_sample
from train.planning import duration, memory
from train.planning.hardware import GPUS, peak_tflops, peak_tflops_by_name
from train.planning.memory import DataStats, ParameterCounts, RunConfig
from train.recipe import STAGES
from train.synthetic.tiny_model import init_weights

PARAMETERS = 15_119_518_144
SHARES = {"image_share": 0.5, "labelled_share": 0.25}


def test_zero_is_the_papers() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs, K = 12: 31.4, 16.6 and 1.9 GB, and 120 alone."""
    totals = [sum(memory.zero_bytes(7.5e9, 64, shard, 2, 2, 12).values()) / 1e9 for shard in SHARDS[1:]]
    assert [round(total, 1) for total in totals] == [31.4, 16.6, 1.9]
    assert sum(memory.zero_bytes(7.5e9, 1, "optimizer", 2, 2, 12).values()) == 120e9


def test_the_published_models_sizes() -> None:
    counts = ParameterCounts.of(Config(), STAGES[2])
    assert counts.all == PARAMETERS
    # The tower's last layer, its last norm and its head are never read: 15.2 M, 2304 and 15.2 M parameters.
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 2 * 2 * 1152
    head = 1152 + 4 * (1152 * 1152 + 1152) + 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152
    assert counts.all - counts.trained == layer + 2 * 1152 + head
    assert counts.linear == 40 * (5120 * 7680 + 5120 * 5120 + 5120 * 35840 + 17920 * 5120)
    assert counts.layer == counts.linear // 40 + 2 * 5120
    assert counts.largest_unit == 100352 * 5120
    assert counts.lora_dims == 40 * (5120 + 7680 + 5120 + 5120 + 5120 + 35840 + 17920 + 5120)
    assert ParameterCounts.of(Config(), STAGES[1]).trained == 1152 * 5120 + 5120 + 5120 * 5120 + 5120


def kept_by_autograd(layers: int, tower: int, T: int = 24, grid: tuple[int, int] = (2, 3)) -> tuple[int, Config]:
    """Bytes that the Triton kernels' forward pass keeps, parameters left out."""
    vision = VisionConfig(144, 288, tower, 2, num_patches=16)
    config = Config(64, 256, 384, layers, 2, 1, dtype="float16", vision=vision)
    model = empty_model(config, "cpu", torch.float16, "triton").to_empty(device="cpu")
    init_weights(model, 0)
    patches, ids = grid[0] * grid[1], torch.arange(T)
    sample = Sample(ids, ids, torch.rand(patches, 768), torch.tensor([grid], dtype=torch.int32), torch.arange(patches))
    return saved_bytes(lambda: model.loss_sum(pack([sample])), model), config


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_activations_are_what_the_kernels_keep() -> None:
    """One more layer of the decoder, and one more of the tower."""
    pytest.importorskip("triton")
    (base, config), (deeper, _), (taller, _) = (kept_by_autograd(*n) for n in ((1, 2), (2, 2), (1, 3)))
    assert (deeper - base) / 24 == memory.decoder_layer_bytes(config, "none")
    assert (taller - base) / 6 == memory.vision_layer_bytes(config, "none")


def test_activations_by_hand() -> None:
    """Of a token in a layer of the published decoder: residual and normed row twice, q, k and v, attended, gate and
    up, their product; in bfloat16.
    """
    config = Config()
    none = 2 * (4 * 5120 + 7680 + 5120 + 3 * 17920) + 4 * 42
    assert [memory.decoder_layer_bytes(config, kind) for kind in CHECKPOINTING] == [
        none,
        2 * (3 * 5120 + 7680 + 5120 + 2 * 17920) + 4 * 40,
        2 * 2 * 5120,
        0,
    ]
    assert none - memory.decoder_layer_bytes(config, "none", inputs=False) == 2 * (2 * 5120 + 17920)


def gigabytes(run_config: RunConfig, stage: int = 2) -> dict[str, float]:
    config = Config()
    data = mean_sample(stage, SHARES)
    parts = memory.memory_by_kind(config, STAGES[stage], ParameterCounts.of(config, STAGES[stage]), data, run_config)
    return {kind: size / 1e9 for kind, size in parts.items()}


def test_every_kind_of_frozen_weight_has_its_bytes() -> None:
    assert tuple(memory.FROZEN_BYTES) == recipe.FROZEN


def test_memory_by_hand() -> None:
    one = gigabytes(RunConfig())
    trained, frozen = 15.089037984, 0.030480160
    assert one["weights"] == pytest.approx(2 * (trained + frozen))
    assert (one["masters"], one["gradients"], one["moments"]) == pytest.approx((4 * trained, 4 * trained, 8 * trained))
    assert one["buffers"] == pytest.approx(2 * 0.51380224)
    many = gigabytes(RunConfig(240, "full"))
    assert many["weights"] == pytest.approx(one["weights"] / 240)
    assert many["gradients"] == pytest.approx(4 * trained / 240)
    assert many["buffers"] == pytest.approx(6 * 0.51380224 + 2 * (0.51380224 + 0.34079744))
    low = gigabytes(RunConfig(optimizer="layerwise"))
    assert low["moments"] == pytest.approx(2 * trained * (1 + 4 / 256))
    assert low["masters"] == low["gradients"] == 0
    int4 = gigabytes(RunConfig(lora_rank=16, frozen_weights="int4"))
    adapters = 16 * 3_481_600 / 1e9
    linear = 13.631488
    assert int4["weights"] == pytest.approx(2 * (15.119518144 - linear) + linear * (0.5 + 2 / 128) + 2 * adapters)
    assert int4["moments"] == pytest.approx(8 * adapters)
    stage1 = gigabytes(RunConfig(), 1)
    assert stage1["moments"] == pytest.approx(8 * 0.03212288)


def test_collectives_by_hand() -> None:
    """ZeRO 1 and 2 send 2 elements a parameter, ZeRO 3 three (Rajbhandari et al. 2020, section 7), at one pass a step;
    here gradients are float32, twice as wide as weights.
    """
    counts = ParameterCounts(1000, 1000, 0, 0, 0, 0)
    ring = 9 / 10
    for shard, gathers in (("optimizer", 1), ("gradients", 1), ("full", 2)):
        sent = duration.collective_bytes(counts, RunConfig(10, shard), 1)
        assert sent == pytest.approx({"reduce-scatter": ring * 4000, "all-gather": ring * 2000 * gathers})
    sent = [sum(duration.collective_bytes(counts, RunConfig(10, shard), 3).values()) / ring for shard in SHARDS[1:]]
    assert sent == pytest.approx([4000 + 2000, 3 * 4000 + 2000, 3 * (4000 + 2 * 2000)])


def test_links_by_hand() -> None:
    gpu = replace(GPUS["h100"], nvlink=400, network=50, node=8)
    inside, across, seconds = duration.link_seconds(80e9, gpu, 16)
    assert (inside, across) == (70e9, 10e9)
    assert seconds == pytest.approx(max(70 / 400, 10 / 50) / duration.LINK_EFFICIENCY)
    assert duration.link_seconds(80e9, gpu, 8) == pytest.approx((80e9, 0, 80 / 400 / duration.LINK_EFFICIENCY))


def test_time_by_hand() -> None:
    """24 samples of a whole row each on 8 GPUs are 3 rows a GPU; half of the peak is reached."""
    stage = replace(STAGES[2], global_batch=24, sequence_length=1000)
    config, data = Config(), DataStats(samples=2400, tokens=1000, patches=0, labelled=0)
    counts = ParameterCounts.of(config, stage)
    useful, computed = duration.sample_flops(config, stage, data, RunConfig(8))
    assert useful == computed == pytest.approx(6 * counts.linear * 1000 + 6 * 40 * 5120 * 1000 * 1001)
    made = duration.step_time(config, stage, counts, data, RunConfig(8), GPUS["h100"], 0.5)
    assert made.compute == pytest.approx(3 * useful / (0.5 * 989.5e12))
    assert made.days == pytest.approx(100 * (made.compute + made.update) / 86400)
    assert made.update == pytest.approx(counts.trained / 8 * 30 / 3350e9)
    halves = replace(data, tokens=900)
    assert duration.micro_batches(stage, halves, RunConfig(8)) == (pytest.approx(2.7), 3)
    assert duration.sample_flops(config, stage, data, RunConfig(8, checkpointing="full")) == (
        useful,
        pytest.approx(useful * 4 / 3),
    )
    layerwise = RunConfig(optimizer="layerwise")
    assert duration.sample_flops(config, stage, data, layerwise) == (useful, 2 * useful)
    assert duration.sample_flops(config, replace(stage, clipping="delayed"), data, layerwise) == (useful, useful)
    lora = duration.sample_flops(config, stage, data, RunConfig(lora_rank=8))[0]
    assert lora == useful - 2 * counts.linear * 1000


def read(capsys: pytest.CaptureFixture[str], *line: object) -> dict[str, Any]:
    assert main([*map(str, line), "--json"]) == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


def test_the_reports_run(capsys: pytest.CaptureFixture[str]) -> None:
    """240 B200 in 4 days. 6 · 15,119,518,144 · 201.9e9 / (240 · 4 · 86400 s) = 220.8 TFLOP/s, 9.8 % of 2250. At the
    share of the peak that this is by useful products, the plan comes to 4 days within 5 %: it takes whole rows.
    """
    made = read(capsys, "--gpus", 240, "--gpu", "b200")
    report = made["report"]
    assert report["tflops_6pd"] == pytest.approx(6 * PARAMETERS * 201.9e9 / (240 * 4 * 86400) / 1e12)
    assert report["tflops_6pd"] == pytest.approx(220.8, abs=0.1) and report["share_6pd"] == pytest.approx(
        0.098, abs=1e-3
    )
    assert report["share_useful"] < report["share_6pd"]
    assert 4.0 <= report["days_planned"] < 4.2
    assert made["first_fit"] == "--shard optimizer --checkpointing none", "the report's ZeRO 1"
    assert made["equal_shares"] == "--sequence-multiple 240"
    with_share = read(capsys, "--gpus", 240, "--gpu", "b200", "--efficiency", report["share_useful"])
    assert with_share["chosen"]["days"] == pytest.approx(4 * 188.5 / 201.9, rel=0.05)


def test_the_first_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    made = read(capsys, "--gpus", 240, "--gpu", "h100")
    first = next(row for row in made["settings"] if row["total"] <= 80e9)
    assert made["first_fit"] == first["options"] == made["chosen"]["options"]
    assert len(made["settings"]) == 3 * len(CHECKPOINTING)
    assert read(capsys, "--gpus", 240, "--memory", 5)["first_fit"] is None
    [only] = read(capsys, "--gpus", 16, "--shard", "full", "--checkpointing", "selective")["settings"]
    assert only["setting"]["gpus"] == 16 and only["options"] == "--shard full --checkpointing selective"
    two = read(capsys, "--gpus", 240, "--sequences-per-gpu", 2)
    assert two["settings"][0]["memory"]["activations"] == 2 * made["settings"][0]["memory"]["activations"]
    assert (made["chosen"]["micro_steps"], two["chosen"]["micro_steps"]) == (3, 2)


def test_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The issue's: LoRA inside 80 GB, and inside 48 with int4; all weights of the model inside 80."""
    rows = {row["options"]: row for row in read(capsys, "--gpus", 1)["settings"]}
    assert rows["--optimizer adamw --checkpointing full"]["total"] > 250e9
    assert rows["--optimizer layerwise --checkpointing full"]["total"] < 80e9
    assert rows["--lora-rank 16 --checkpointing selective"]["total"] < 80e9
    assert rows["--lora-rank 16 --frozen-weights int4 --checkpointing full"]["total"] < 48e9
    assert main(["--gpus", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    table = said[next(i for i, line in enumerate(said) if line.startswith("on one GPU of")) :]
    assert table[1].split() == ["--optimizer", "adamw", "no", "no"]
    assert table[2].split() == ["--optimizer", "layerwise", "--checkpointing", "full", "no"]


def test_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    made = read(capsys, "--gpus", 8, "--lora", 4, "--frozen-weights", "int4")
    assert made["trained"] == 4 * 3_481_600
    assert made["first_fit"] == "--shard none --lora-rank 4 --frozen-weights int4 --checkpointing none"


def test_the_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "240", "--gpu", "b200", "--stage", "3"]) == 0
    said = capsys.readouterr().out
    assert "15,119,518,144 parameters" in said
    assert "the first that fits 180 GB: --shard" in said
    assert "image share 0.5 (assumed)" in said
    assert max(map(len, said.splitlines())) < 180


def steps(mfu: float | None) -> list[dict[str, Any]]:
    """Ten steps: the first slow, as compiling makes it; of the others two of one size and seven of another."""
    made = []
    for number in range(1, 11):
        operations = 100 if number < 4 else 300
        entry = {"step": number, "operations": operations, "tokens": 10, "patches": 4, "labelled": 2}
        made.append(entry | {"mfu": mfu and (0.01 if number == 1 else mfu * (1 if number < 4 else 3))})
    return made


def test_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All operations by all peak-seconds: 9 steps of 1000 peak-operations of time, at shares 0.1 and 0.3."""
    file = write_jsonl(tmp_path / "metrics.jsonl", steps(0.1))
    made = read(capsys, "--gpus", 8, "--measured", file, "--image-share", 0.25)
    shares = made["shares"]
    assert shares["efficiency"] == {"value": pytest.approx((2 * 100 + 7 * 300) / 9000), "from": "measured"}
    assert shares["labelled_share"] == {"value": pytest.approx(0.2), "from": "measured"}
    assert shares["image_share"] == {"value": 0.25, "from": "given"}
    twice = read(capsys, "--gpus", 8, "--efficiency", 2 * shares["efficiency"]["value"], "--labelled-share", 0.2)
    assert made["chosen"]["compute_seconds"] == pytest.approx(2 * twice["chosen"]["compute_seconds"], rel=0.02)


WRONG: dict[str, Callable[[Path], tuple[list[object], str]]] = {
    "gpu": lambda d: (["--gpu", "h900"], "--gpu: 'h900' is unknown, must be one of a100, h100, h200, b200"),
    "stage": lambda d: (["--stage", 7], "--stage: '7' is unknown"),
    "gpus": lambda d: (["--gpus", 0], "--gpus: 0 must be 1 to 10^9"),
    "share": lambda d: (["--image-share", 1.5], "--image-share: 1.5 must be 0 to 1"),
    "efficiency": lambda d: (["--efficiency", 0], "--efficiency: 0.0 must be 1e-06 to 1"),
    "layerwise": lambda d: (["--gpus", 2, "--optimizer", "layerwise"], "--optimizer: layerwise is for one GPU"),
    "frozen": lambda d: (["--frozen-weights", "int4"], "--frozen-weights: int4 needs adapters"),
    "checkpoint": lambda d: (["--checkpoint", d], "config.json: missing"),
    "no file": lambda d: (["--measured", d / "gone"], "gone is no file"),
    "no mfu": lambda d: (["--measured", write_jsonl(d / "m.jsonl", steps(None))], "has no step with an mfu"),
    "too much": lambda d: (["--measured", write_jsonl(d / "m.jsonl", steps(0.9))], "--peak-tflops was too small"),
    "not JSON": lambda d: (["--measured", write_jsonl(d / "m.jsonl", ["{", "{}"])], "m.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    line, words = WRONG[kind](tmp_path)
    assert main([*([] if "--gpus" in line else ["--gpus", "1"]), *map(str, line)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and words in error


def test_another_models_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = read(capsys, "--gpus", 1, "--checkpoint", small_checkpoint(tmp_path))
    assert made["parameters"] == 301_280


def test_peaks_by_name() -> None:
    assert peak_tflops_by_name("NVIDIA H100 80GB HBM3") == peak_tflops_by_name("NVIDIA H200") == 989.5
    assert peak_tflops_by_name("NVIDIA B200") == 2250
    assert peak_tflops_by_name("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops_by_name("NVIDIA GB200") is None, "another clock"
    assert peak_tflops_by_name("NVIDIA H100 PCIe") is peak_tflops_by_name("NVIDIA GeForce RTX 4090") is None
    assert peak_tflops(torch.device("cpu")) is None
