"""Inference: ``engine = infer.Engine(path)``, ``engine.stream(prompt)``, ``engine.generate(prompts)``."""

from infer.engine.config import EngineConfig
from infer.engine.engine import Engine
from infer.requests.outputs import Generation, StreamEvent, TokenLogprob
from infer.requests.sampling_params import SamplingParams

__all__ = ["Engine", "EngineConfig", "Generation", "SamplingParams", "StreamEvent", "TokenLogprob"]
