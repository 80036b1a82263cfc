"""AdamW: with accumulated gradients, sharded, or layer by layer inside the backward pass."""
