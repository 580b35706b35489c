"""Requests for tests."""

from __future__ import annotations

from typing import Any

from muai_batching.fair_queue import Waiting
from muai_producers.wire import InferenceRequest


def a_request(request_id: str = "r", *, model: str = "m", text: str = "hello", **fields: Any) -> InferenceRequest:
    return InferenceRequest(id=request_id, model=model, inputs={"text": text}, submitted_at=1.0, **fields)


def waiting(request_id: str, *, tokens: int = 10, arrived_s: float = 0.0, **fields: Any) -> Waiting:
    return Waiting(a_request(request_id, **fields), tokens, arrived_s)
