"""The trainer's built-in data: drawn screens, charts and scenes with questions, deterministic by seed."""

from train.synthetic.records import tokenizer_corpus, write_dataset

__all__ = ["tokenizer_corpus", "write_dataset"]
