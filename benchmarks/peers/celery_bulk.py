"""Celery in bulk, faster than its own `ResultSet`: results are fetched by the hundred, not subscribed to one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery import Celery, Task

CHUNK = 500
POLL_S = 0.005


def run(app: Celery, task: Task, texts: Sequence[str]) -> None:
    """Submit every text, return when every result is here."""
    subscribe = app.backend.on_task_call
    app.backend.on_task_call = _subscribe_to_nothing
    try:
        with app.producer_pool.acquire(block=True) as producer:
            ids = [task.apply_async((text,), producer=producer).id for text in texts]
    finally:
        app.backend.on_task_call = subscribe
    for start in range(0, len(ids), CHUNK):
        for _, meta in app.backend.get_many(ids[start : start + CHUNK], timeout=300, interval=POLL_S):
            assert meta["status"] == "SUCCESS", meta


def _subscribe_to_nothing(*_: Any) -> None:
    pass
