"""`/api/v1/performance` and `/api/v1/alerts`: how the installation does, for those who run it."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI, Request, Response

from muai_producers.alerts.records import Alert, AlertEntry, DeliveryState, iso
from muai_producers.alerts.store import MAX_HISTORY, AlertStore
from muai_producers.errors import InvalidRequestError
from muai_producers.gateway import openapi_watch as documented
from muai_producers.gateway.callers import caller_of
from muai_producers.gateway.failures import JSON_TYPE, ForbiddenError
from muai_producers.gateway.file_routes import asking
from muai_producers.gateway.openapi_watch import AlertList, ShownAlert, ShownDelivery
from muai_producers.gateway.reading import query_of
from muai_producers.gateway.submission import parse_number
from muai_producers.performance.monitor import ANYTHING, PerformanceMonitor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from muai_config import Settings
    from muai_producers.store import Store

DEFAULT_WINDOW_S = 60.0
DEFAULT_ALERTS = 50
_encode = msgspec.json.Encoder().encode


class WatchRoutes:
    """The endpoints."""

    def __init__(self, settings: Settings, store: Store, executor: Executor) -> None:
        self._monitor = PerformanceMonitor(store, settings.monitoring.performance.retention_s)
        self._alerts = AlertStore(store)
        self._executor = executor

    def register(self, app: FastAPI) -> None:
        """Give the application the paths with their documentation."""
        app.router.get("/api/v1/performance", **documented.PERFORMANCE)(self.performance)
        app.router.get("/api/v1/alerts", **documented.ALERTS)(self.alerts)

    async def performance(self, request: Request) -> Response:
        """The fleet's performance over a window."""
        check_operator(request)
        query = query_of(request)
        window_s = _number(query, "window_s", DEFAULT_WINDOW_S)
        model, engine = query.get("model") or ANYTHING, query.get("engine") or ANYTHING
        report = await asking(self._executor, lambda: self._monitor.report(window_s, model=model, engine=engine))
        return Response(_encode(report), media_type=JSON_TYPE)

    async def alerts(self, request: Request) -> Response:
        """The alerts, newest first."""
        check_operator(request)
        query = query_of(request)
        limit = int(_number(query, "limit", DEFAULT_ALERTS))
        told = query.get("open", "false")
        if told not in ("true", "false"):
            raise InvalidRequestError(f"open must be true or false, got {told[:40]!r}", {"field": "open"})
        if not 1 <= limit <= MAX_HISTORY:
            raise InvalidRequestError(f"limit must be from 1 to {MAX_HISTORY}", {"field": "limit"})
        found = await asking(self._executor, lambda: self._alerts.history(limit, only_open=told == "true"))
        return Response(_encode(AlertList(data=[_shown(entry) for entry in found])), media_type=JSON_TYPE)


def check_operator(request: Request) -> None:
    """Let only those pass who run the installation; without API keys that is everybody.

    Raises:
        ForbiddenError: the caller's key is not an operator's.
    """
    if not caller_of(request).is_operator:
        raise ForbiddenError("this is for operators: it needs a key made with `muai keys create --operator`")


def _number(query: Mapping[str, str], name: str, default: float) -> float:
    told = query.get(name)
    if told is None:
        return default
    value = parse_number(told)
    if value is None:
        raise InvalidRequestError(f"{name} must be a number above 0, got {told[:40]!r}", {"field": name})
    return value


def _shown(entry: AlertEntry) -> ShownAlert:
    alert: Alert = entry.alert
    plain: dict[str, Any] = alert.metadata
    return ShownAlert(
        id=alert.id,
        alert_type=alert.alert_type,
        subject=alert.subject,
        severity=alert.severity,
        message=alert.message,
        timestamp=iso(alert.timestamp),
        resolved_at=None if alert.resolved_at is None else iso(alert.resolved_at),
        is_open=entry.is_open,
        metadata=plain,
        deliveries=[_shown_delivery(one) for one in entry.deliveries],
    )


def _shown_delivery(state: DeliveryState) -> ShownDelivery:
    return ShownDelivery(
        destination=state.destination,
        kind=state.kind,
        status=state.status,
        attempts=state.attempts,
        error=state.error,
    )
