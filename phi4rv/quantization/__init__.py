"""Linear layers in 8 and 4 bits, and fp8 training."""
