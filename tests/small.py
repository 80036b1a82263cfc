"""A model, data and runs small enough to train within a test."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import phi4rv
from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.outputs import Generation
from infer.requests.sampling_params import SamplingParams
from phi4rv.checkpoint.huggingface import empty_model
from phi4rv.config import Config, VisionConfig
from phi4rv.processing.processor import Processor, Prompt
from train.figures.metrics import read_metrics
from train.synthetic.tiny_model import init_weights

ROOT = Path(__file__).parent.parent
PUBLISHED = Path(__file__).parent / "data" / "tiny-checkpoint"
# What a clock or the machine decides, and so differs from run to run.
GREEDY = SamplingParams()
TIMES = ("seconds", "tokens_per_second", "images_per_second", "tflops", "mfu", "data_wait", "memory")


def small_config(context: int = 1024) -> Config:
    return Config(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        min_num_patches=4,
        max_num_patches=12,
        bos_token_id=1008,
        eos_token_id=1011,
        pad_token_id=1013,
        dtype="float32",
        vision=VisionConfig(
            hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_patches=16
        ),
    )


def small_model(seed: int = 0, context: int = 1024) -> tuple[phi4rv.Phi4RV, Processor]:
    """200 k float32 parameters, with the tokenizer of the tiny checkpoint and a short chat template."""
    config = small_config(context)
    files = {p.name: p.read_bytes() for p in PUBLISHED.iterdir() if p.suffix == ".json"}
    files = {name: files[name] for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")}
    files["chat_template.jinja"] = (ROOT / "train" / "synthetic" / "tiny_chat_template.jinja").read_bytes()
    model = empty_model(config, "cpu", torch.float32).to_empty(device="cpu")
    init_weights(model, seed)
    return model, Processor(files, config)


def small_checkpoint(folder: Path, **options: Any) -> Path:
    path = folder / "checkpoint"
    phi4rv.save(*small_model(**options), path)
    return path


def picture(folder: Path, name: str, width: int, height: int) -> str:
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    image.putpixel((width // 2, height // 2), (255, 0, 0))
    image.save(folder / name)
    return name


def record(question: str, answer: str, *images: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": list(images), "conversations": [turns]}


def mixed_records(folder: Path, count: int) -> list[dict[str, Any]]:
    """Questions of no, one and two pictures, of many lengths."""
    made = []
    for i in range(count):
        pictures = [picture(folder, f"{i}-{k}.png", 20 + 17 * i % 90, 30 + 11 * k) for k in range(i % 3)]
        question = "<image> " * len(pictures) + f"What is number {i}? " + "Look well. " * (i % 5)
        made.append(record(question, f"<nothink>It is {i * i}." + " Yes." * (i % 4), *pictures))
    return made


def write_jsonl(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def mixed_data(folder: Path, count: int = 12) -> Path:
    return write_jsonl(folder / "data.jsonl", mixed_records(folder, count))


def timeless(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what the clock decides."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = phi4rv.load(folder, device="cpu")
    return dict(model.named_parameters())


def generate(
    model: phi4rv.Phi4RV,
    processor: Processor,
    prompts: Sequence[Prompt],
    count: int,
    sampling_params: SamplingParams = GREEDY,
    **config: Any,
) -> list[Generation]:
    """Answers of a new engine, which then holds nothing any more."""
    engine = Engine((model, processor), config=EngineConfig(**config))
    made = engine.generate(prompts, replace(sampling_params, max_new_tokens=count))
    engine.check()
    assert engine.stats.pages_used == 0
    return made


def saved_bytes(run: Callable[[], Any], model: phi4rv.Phi4RV) -> int:
    """Bytes that autograd keeps of ``run()`` for a backward pass, the model's parameters left out."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for t in kept.values())
