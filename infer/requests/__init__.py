"""What one request goes through on the host: its prompt, images, constraint and text."""
