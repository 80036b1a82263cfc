"""Inference, measured, and the report's protocol."""
