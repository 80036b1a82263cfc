"""Triton kernels, one file an operation: forward and backward beside each other, launched from plain functions on
tensors, and registered as ``torch.library`` operators under ``phi4rv_triton``.

Nothing here knows of the model: ``phi4rv/ops/registry.py`` chooses, ``phi4rv/ops/reference.py`` defines what is right,
and of ``phi4rv`` only the formats of numbers (``ops/low_precision.py``) and the projector's gradient are imported.
"""
