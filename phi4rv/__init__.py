"""Phi-4-reasoning-vision on packed sequences: load, prompt, run, save.

model, processor = phi4rv.load(path)
batch = processor([phi4rv.Prompt("<image>\\nWhere is Save?", images=[picture], mode="nothink")])
logits = model(batch)
"""

from phi4rv.batch import PackedBatch, Sample, pack
from phi4rv.chat import Message
from phi4rv.checkpoint import load, save
from phi4rv.config import Config, VisionConfig
from phi4rv.errors import UserError
from phi4rv.lora import merge_adapter
from phi4rv.model import Phi4RV
from phi4rv.processor import Processor, Prompt

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
