"""Advice: what holds an instance up, what would help, by how much and why; for our instances and for vLLM servers."""
