"""Checkpoint folders: the Hugging Face layout, in and out."""
