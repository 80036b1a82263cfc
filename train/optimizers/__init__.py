"""AdamW, with or without a backward pass around it."""
