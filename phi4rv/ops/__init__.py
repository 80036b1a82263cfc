"""Every operation: its definition, its implementations, and which of them a model runs."""
