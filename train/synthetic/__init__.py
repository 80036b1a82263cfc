"""The trainer's built-in data: drawn screens, charts and scenes with questions, deterministic by seed."""

from train.synthetic.records import texts, write_dataset

__all__ = ["texts", "write_dataset"]
