"""Batches of requests from files: what is kept of them, and how lines become requests and answers."""
