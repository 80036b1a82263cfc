"""The HTTP side of the engine: ``python -m infer.serve``."""
