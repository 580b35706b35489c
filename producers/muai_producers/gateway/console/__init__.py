"""The gateway's console: a page for people at `/`, and the read-only data behind it under `/v1/console`."""
