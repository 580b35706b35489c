"""The OpenAPI document: performance and alerts."""

from __future__ import annotations

from typing import Any

import msgspec

from muai_producers.gateway.openapi import operation, response
from muai_producers.performance.report import PerformanceReport


class ShownDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """How far one notice of an alert has come to one destination."""

    destination: str
    kind: str
    """firing or resolved."""
    status: str
    """waiting, sent or failed."""
    attempts: int
    error: str
    """Of the last attempt that failed; '' where none has."""


class ShownAlert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert."""

    id: str
    alert_type: str
    subject: str
    """The model, host, queue or GPU that it is about; `fleet` for all of it."""
    severity: str
    """warning, error or critical."""
    message: str
    timestamp: str
    """When it began."""
    resolved_at: str | None
    is_open: bool
    metadata: dict[str, Any]
    deliveries: list[ShownDelivery]


class AlertList(msgspec.Struct, frozen=True, kw_only=True):
    """Alerts, newest first."""

    data: list[ShownAlert]


TYPES = (PerformanceReport, AlertList)
_LATENCY = {"count": 1200, "mean_ms": 21.4, "p50_ms": 18.2, "p95_ms": 44.9, "p99_ms": 61.0, "max_ms": 88.3}
_SERIES: dict[str, Any] = {
    "model": "all-minilm-l6-v2",
    "engine": "onnx",
    "task": "embedding",
    "requests": 1201,
    "successes": 1200,
    "errors": {"out_of_memory": 1},
    "faults": 1,
    "error_rate": 0.000833,
    "failed_attempts": {},
    "throughput_rps": 19.4,
    "arrival_rps": 19.5,
    "latency": {"queue": {**_LATENCY, "p50_ms": 0.6}, "total": _LATENCY},
    "operations": {},
    "batching": {
        "batches": 80,
        "mean_size": 15.0,
        "p50_size": 16,
        "p95_size": 32,
        "max_size": 32,
        "padding_waste": 0.07,
        "per_request_ms": 0.9,
        "per_batch_ms": 2.1,
        "per_batch_error_ms": 0.1,
    },
    "cache_hit_rate": 0.0,
    "input_tokens_per_s": 412.0,
    "output_tokens_per_s": 0.0,
}
_TREND = {
    "host": "gpu-1",
    "resource": "memory",
    "latest_percent": 41.0,
    "mean_percent": 40.6,
    "max_percent": 42,
    "change_percent": 0.8,
    "points": [{"start_s": 1_790_000_000, "mean_percent": 40.0, "max_percent": 41}],
}
_REPORT = {
    "from_s": 1_790_000_000.0,
    "to_s": 1_790_000_062.0,
    "relative_error": 0.01,
    "total": {**_SERIES, "model": "*", "engine": "*", "task": "*"},
    "models": [{**_SERIES, "engine": "*", "task": "*"}],
    "series": [_SERIES],
    "resources": {"window_s": 60.0, "step_s": 10, "trends": [_TREND]},
}
_ALERTS = {
    "data": [
        {
            "id": "7d1f0c2ab94e55d1a3c0",
            "alert_type": "latency",
            "subject": "all-minilm-l6-v2",
            "severity": "error",
            "message": "all-minilm-l6-v2: 95 % of requests take up to 1420 ms, allowed are 1000 ms",
            "timestamp": "2026-11-25T03:12:40.120Z",
            "resolved_at": None,
            "is_open": True,
            "metadata": {"latency_ms": 1420.3, "threshold_ms": 1000.0, "requests": 310, "p50_ms": 812.0},
            "deliveries": [
                {"destination": "log", "kind": "firing", "status": "sent", "attempts": 1, "error": ""},
                {
                    "destination": "webhook",
                    "kind": "firing",
                    "status": "waiting",
                    "attempts": 2,
                    "error": "answered 502",
                },
            ],
        }
    ]
}


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": schema}


PERFORMANCE = operation(
    "performance",
    "The fleet's latencies, throughput, errors, batches and resources over a window",
    {200: response("All processes and hosts together.", PerformanceReport, _REPORT)},
    (403,),
    _query(
        "window_s",
        "Seconds back from now; at most monitoring.performance.retention_s.",
        type="number",
        exclusiveMinimum=0,
        default=60,
    ),
    _query("model", "This model alone.", type="string"),
    _query("engine", "This engine alone.", type="string"),
)
ALERTS = operation(
    "listAlerts",
    "Alerts, newest first, and what became of their notices",
    {200: response("The last of them.", AlertList, _ALERTS)},
    (403,),
    _query("open", "Only those that last.", type="boolean", default=False),
    _query("limit", "At most so many.", type="integer", minimum=1, maximum=1000, default=50),
)
