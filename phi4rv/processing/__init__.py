"""From pictures, conversations and records to packed inputs, and from generated text to answers."""
