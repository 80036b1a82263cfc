"""Inference: ``engine = infer.Engine(path)``, ``engine.stream(prompt)``, ``engine.generate(prompts)``."""

from infer.engine.config import Limits
from infer.engine.engine import Engine
from infer.requests.request import Event, Generation, Options, Sampling, TokenLogprob

__all__ = ["Engine", "Event", "Generation", "Limits", "Options", "Sampling", "TokenLogprob"]
