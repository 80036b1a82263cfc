"""Phi-4-reasoning-vision on packed sequences: load, prompt, run, save.

model, processor = phi4rv.load(path)
batch = processor([phi4rv.Prompt("<image>\\nWhere is Save?", images=[picture], mode="nothink")])
logits = model(batch)
"""

from phi4rv.adapters.peft import merge_adapter
from phi4rv.batch import PackedBatch, Sample, pack
from phi4rv.checkpoint.huggingface import load, save
from phi4rv.config import Config, VisionConfig
from phi4rv.errors import UserError
from phi4rv.model.phi4rv import Phi4RV
from phi4rv.processing.chat_template import Message
from phi4rv.processing.processor import Processor, Prompt

__version__ = "0.1.0"  # a literal: pyproject.toml reads it without importing torch

__all__ = [
    "Config",
    "Message",
    "PackedBatch",
    "Phi4RV",
    "Processor",
    "Prompt",
    "Sample",
    "UserError",
    "VisionConfig",
    "load",
    "merge_adapter",
    "pack",
    "save",
]
