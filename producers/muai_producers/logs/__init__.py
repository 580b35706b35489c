"""Logs: what every line says of the request or batch that it is about, how it is written, and what is kept out of it.

The standard library's logging, not a library in its place: the lines of Celery, uvicorn and the engines go the same way
(docs/adr/0021-logs-with-the-standard-library.md).
"""

from muai_producers.logs.context import about_batch, about_request, log_context

__all__ = ["about_batch", "about_request", "log_context"]
