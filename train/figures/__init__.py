"""Metrics of a run, curves, and the sheet of predictions."""
