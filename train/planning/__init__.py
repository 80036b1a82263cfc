"""Memory, communication and time of a run, computed."""
