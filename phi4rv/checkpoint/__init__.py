"""Checkpoint folders: the published Hugging Face layout, in and out."""
