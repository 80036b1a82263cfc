"""One request on the host: its prompt, images, sampling parameters, grammar and text."""
