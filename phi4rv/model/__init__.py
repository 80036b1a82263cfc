"""The model: vision tower, projector and decoder on packed rows."""
