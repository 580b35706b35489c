"""The OpenAPI document: the console's data, and the index at `/`."""

from __future__ import annotations

from typing import Any

import msgspec

from muai_producers.gateway.console.records import DeadLetterList, Overview, RecentList, RequestWay
from muai_producers.gateway.openapi import EXAMPLE_ID, ID, operation, response
from muai_producers.recent import MAX_RECENT


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What there is, for programs that ask at `/`."""

    name: str
    version: str
    console: bool
    """Whether a browser finds a page for people here."""
    links: dict[str, str]
    """Paths, by what they are for."""


_OVERVIEW = {
    "taken_at": 1_790_000_000.5,
    "status": "degraded",
    "reasons": ["onnx failed with all-minilm-l6-v2 a short while ago and is passed over"],
    "tenant": None,
    "state_store": True,
    "in_flight": 40,
    "capacity": 10_000,
    "answered": 125_000,
    "fleet": {
        "queues": [
            {"name": "inference", "holds": "requests", "priority": "normal", "messages": 3, "oldest_age_s": 0.2},
            {"name": "engine.onnx", "holds": "batches", "priority": None, "messages": 1, "oldest_age_s": None},
        ],
        "engines": [
            {
                "name": "onnx",
                "state": "cooling",
                "workers": 1,
                "slots": 1,
                "outstanding": 2,
                "models": ["all-minilm-l6-v2"],
                "cooling": [{"model": "all-minilm-l6-v2", "reason": "out of memory", "seconds_left": 21.5}],
            }
        ],
        "workers": [
            {
                "name": "onnx-1@host-a",
                "engine": "onnx",
                "host": "host-a",
                "pid": 4211,
                "gpu": "0",
                "device": "CUDAExecutionProvider",
                "slots": 1,
                "models_loaded": ["all-minilm-l6-v2"],
                "uptime_s": 3600.0,
                "readings": {},
            }
        ],
        "gpus": [
            {
                "host": "host-a",
                "index": "0",
                "name": "NVIDIA H100 80GB HBM3",
                "worker": "onnx-1@host-a",
                "state": "ok",
                "reason": "",
                "utilization_percent": 87.0,
                "memory_used_bytes": 21_474_836_480,
                "memory_total_bytes": 85_520_809_984,
                "temperature_c": 61.0,
                "power_w": 412.0,
                "power_limit_w": 700.0,
                "read_age_s": 1.2,
            }
        ],
        "collectors": [
            {"name": "c1@host-a", "host": "host-a", "pid": 4210, "uptime_s": 3600.0, "waiting": 12, "num_keys": 1}
        ],
        "forming": [
            {
                "collector": "c1@host-a",
                "model": "all-minilm-l6-v2",
                "task": "embedding",
                "engine": "onnx",
                "waiting": 12,
                "waiting_high": 2,
                "waiting_low": 0,
                "max_size": 32,
                "oldest_age_s": 0.04,
            }
        ],
        "dead_letters": 2,
        "duplicates_refused": 0,
    },
}
_RECENT = {
    "object": "list",
    "data": [
        {
            "id": EXAMPLE_ID,
            "state": "SUCCESS",
            "tenant": "default",
            "model": "all-minilm-l6-v2",
            "engine": "onnx",
            "latency_ms": 18.4,
            "batch_size": 16,
            "error_code": None,
            "finished_at": 1_790_000_000.25,
        }
    ],
}
_ATTEMPT = {"engine": "onnx", "code": "model_load_failed", "message": "there is no file model.onnx"}
_WAY = {
    "id": EXAMPLE_ID,
    "state": "SUCCESS",
    "status_url": f"/v1/inference/{EXAMPLE_ID}",
    "tenant": "default",
    "model": "all-minilm-l6-v2",
    "task": "embedding",
    "submitted_at": 1_790_000_000.1,
    "finished_at": 1_790_000_000.25,
    "latency_ms": 150.0,
    "engine": "pytorch",
    "worker": "pytorch-1@host-a",
    "gpu": "0",
    "batch_id": "0b6f2f1e-58a0-4f5e-9a3c-6a4a8f4c2c11",
    "batch_size": 16,
    "cache_hit": False,
    "input_tokens": 9,
    "output_tokens": 0,
    "steps": [
        {"name": "queue", "started_ms": 0.0, "took_ms": 1.5},
        {"name": "batching", "started_ms": 1.5, "took_ms": 40.0},
        {"name": "dispatch", "started_ms": 41.5, "took_ms": 2.5},
        {"name": "inference", "started_ms": 44.0, "took_ms": 105.0},
        {"name": "answer", "started_ms": 149.0, "took_ms": 1.0},
    ],
    "attempts": [_ATTEMPT],
    "error_code": None,
    "error_message": None,
    "preview": "384 numbers: 0.0123, -0.0300, …",
}
_DEAD = {
    "object": "list",
    "total": 1,
    "data": [
        {
            "entry_id": "1790000000000-0",
            "request_id": EXAMPLE_ID,
            "model": "all-minilm-l6-v2",
            "code": "engines_exhausted",
            "message": "no engine of the chain served the request",
            "attempts": [_ATTEMPT],
            "died_at": 1_790_000_000.25,
            "can_be_replayed": True,
        }
    ],
}
_INDEX = {
    "name": "MuAI",
    "version": "0.1.0",
    "console": True,
    "links": {"document": "/openapi.json", "health": "/health", "models": "/v1/models"},
}


def _limit(most: int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "maximum": most}
    return {"name": "limit", "in": "query", "description": "Most entries to list.", "schema": schema}


OVERVIEW = operation(
    "consoleOverview",
    "How things stand: queues, engines, workers, batches that form",
    {200: response("What is known. With keys, only an operator's shows the fleet.", Overview, _OVERVIEW)},
    (),
)
REQUESTS = operation(
    "consoleRequests",
    "The requests that were answered last",
    {200: response("The caller's; an operator's, everybody's.", RecentList, _RECENT)},
    (),
    _limit(MAX_RECENT),
)
REQUEST = operation(
    "consoleRequest",
    "A request's way from submission to result, with its timings",
    {200: response("As far as it has gone.", RequestWay, _WAY)},
    (404,),
    ID,
)
DEAD_LETTERS = operation(
    "consoleDeadLetters",
    "The newest dead letters; for operators",
    {200: response("Without the requests themselves.", DeadLetterList, _DEAD)},
    (403,),
    _limit(500),
)
_PAGE = {"schema": {"type": "string"}}
INDEX = operation(
    "index",
    "What there is; for browsers (Accept: text/html), the console",
    {200: response("The index, or the page.", Index, _INDEX)},
    (),
)
INDEX["responses"][200]["content"]["text/html"] = _PAGE
TYPES = (Index, Overview, RecentList, RequestWay, DeadLetterList)
