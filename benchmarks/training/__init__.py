"""The training step, measured."""
