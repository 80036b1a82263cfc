"""The processes of a run: what they exchange, how the model is sharded, who watches whom."""
