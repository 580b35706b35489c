"""Webhooks: word of a request's end, posted to an address that the request names."""
