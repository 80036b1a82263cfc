"""Triton kernels, one file an operation: forward and backward beside each other, launched from plain functions on
tensors, and registered as ``torch.library`` operators under ``phi4rv_triton``.

Nothing here knows of ``phi4rv``: ``phi4rv/ops.py`` chooses, ``phi4rv/reference.py`` defines what is right.
"""
