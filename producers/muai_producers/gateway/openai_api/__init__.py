"""OpenAI's API before the queue: what its clients send becomes requests, and what comes of them its answers."""
