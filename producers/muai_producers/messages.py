"""Requests as Celery messages: what a plain `send_task("muai.infer", …)` sends, built without its cost."""

from __future__ import annotations

from typing import Any

import msgspec

from muai_config.queues import INFERENCE, INFERENCE_HIGH, INFERENCE_LOW
from muai_producers.wire import InferenceRequest

INFER_TASK = "muai.infer"
RUN_BATCH_TASK = "muai.run_batch"


def queue_for(priority: int) -> str:
    """The request queue of a priority: 7 to 9 high, 3 to 6 normal, 0 to 2 low."""
    if priority >= 7:
        return INFERENCE_HIGH
    return INFERENCE if priority >= 3 else INFERENCE_LOW


def task_headers(task: str, task_id: str, summary: str = "") -> dict[str, Any]:
    """Headers of Celery's message protocol 2, no more than their reader needs.

    Args:
        summary: for tasks that a worker executes, what Flower shows as their arguments.
    """
    headers: dict[str, Any] = {"lang": "py", "task": task, "id": task_id}
    if summary:
        headers |= {"root_id": task_id, "argsrepr": "()", "kwargsrepr": summary, "ignore_result": True}
    return headers


def task_body(kwargs: Any) -> bytes:
    """Body of Celery's message protocol 2: positional arguments, keyword arguments, canvas."""
    return msgspec.json.encode(((), kwargs, {}))


def redis_payload(headers: dict[str, Any], body: bytes, queue: str) -> bytes:
    """A message as kombu's Redis transport keeps it in the queue's list. The body is left as text, not base64."""
    envelope = {
        "body": body.decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": headers["id"],
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "delivery_tag": headers["id"],
        },
    }
    return msgspec.json.encode(envelope)


def request_message(request: InferenceRequest) -> tuple[str, dict[str, Any], bytes]:
    """Queue, headers and body of a request's message."""
    headers = task_headers(INFER_TASK, request.id)
    if request.trace:  # where OpenTelemetry's Celery instrumentation looks for it
        headers |= {str(name): value for name, value in request.trace.items()}
    return queue_for(request.priority), headers, task_body(request)
