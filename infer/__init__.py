"""Inference: ``engine = infer.Engine(path)``, ``engine.stream(prompt)``, ``engine.generate(prompts)``."""

from infer.engine import Engine
from infer.limits import Limits
from infer.request import Event, Generation, Options, Sampling, TokenLogprob

__all__ = ["Engine", "Event", "Generation", "Limits", "Options", "Sampling", "TokenLogprob"]
