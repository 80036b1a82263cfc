"""What a run shows and leaves behind: metrics, curves, predictions."""
