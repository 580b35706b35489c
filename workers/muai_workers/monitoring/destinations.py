"""Where alerts go: the log, a webhook, Prometheus Alertmanager."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from muai_producers.alerts.records import Alert, Delivery, iso

if TYPE_CHECKING:
    from muai_config.monitoring import AnomalySettings

log = logging.getLogger("muai.alerts")
TIMEOUT_S = 5.0
LASTS_S = 300.0
"""Alertmanager takes an alert for over so long after it last heard of it: what a dead fleet has said ends too."""
_LEVELS = {"warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL}


class DeliveryError(Exception):
    """A destination did not take a notice; it may later."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A receiver that has moved is told of in the configuration, not followed anywhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


def send(delivery: Delivery, settings: AnomalySettings, now_s: float) -> None:
    """Send a notice to its destination.

    Raises:
        DeliveryError: it did not take it; the message says why.
    """
    alert, destination = delivery.alert, delivery.state.destination
    if destination == "log":
        write_log(alert)
    elif destination == "webhook":
        if settings.webhook_url is None:
            raise DeliveryError("monitoring.anomaly.webhook_url is not set any more")
        post(settings.webhook_url, webhook_body(alert), {"X-Muai-Delivery": delivery.id})
    else:
        post_alertmanager([alert], settings, now_s)


def write_log(alert: Alert) -> None:
    """One line; its fields go along for those who log in JSON."""
    fields = {"alert": msgspec.to_builtins(alert)}
    if alert.resolved_at is None:
        log.log(_LEVELS[alert.severity], "alert %s: %s", alert.alert_type, alert.message, extra=fields)
    else:
        lasted_s = alert.resolved_at - alert.timestamp
        log.warning("resolved after %.0f s: alert %s: %s", lasted_s, alert.alert_type, alert.message, extra=fields)


def webhook_body(alert: Alert) -> dict[str, Any]:
    """What a webhook is sent. `id` and `status` together are the same when a notice is sent a second time."""
    return {
        "id": alert.id,
        "status": alert.kind,
        "alert_type": alert.alert_type,
        "subject": alert.subject,
        "severity": alert.severity,
        "message": alert.message,
        "timestamp": iso(alert.timestamp),
        "resolved_at": None if alert.resolved_at is None else iso(alert.resolved_at),
        "metadata": alert.metadata,
    }


def alertmanager_body(alerts: Sequence[Alert], now_s: float) -> list[dict[str, Any]]:
    """Alerts as Alertmanager's API v2 takes them. The labels are the alert's identity there, so they do not change
    while it lasts."""
    return [
        {
            "labels": {
                "alertname": "Muai" + alert.alert_type.title().replace("_", ""),
                "alert_type": alert.alert_type,
                "subject": alert.subject,
                "severity": alert.severity,
                "service": "muai",
            },
            "annotations": {"summary": alert.message, "alert_id": alert.id},
            "startsAt": iso(alert.timestamp),
            "endsAt": iso(now_s + LASTS_S if alert.resolved_at is None else alert.resolved_at),
        }
        for alert in alerts
    ]


def post_alertmanager(alerts: Sequence[Alert], settings: AnomalySettings, now_s: float) -> None:
    """Tell Alertmanager of alerts.

    Raises:
        DeliveryError: it did not take them.
    """
    if settings.alertmanager_url is None:
        raise DeliveryError("monitoring.anomaly.alertmanager_url is not set any more")
    post(f"{settings.alertmanager_url.rstrip('/')}/api/v2/alerts", alertmanager_body(alerts, now_s))


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> None:
    """POST JSON.

    Raises:
        DeliveryError: nobody answered within `TIMEOUT_S`, or the answer was none of 2xx.
    """
    request = urllib.request.Request(
        url,
        data=msgspec.json.encode(body),
        headers={"Content-Type": "application/json", "User-Agent": "muai", **(headers or {})},
        method="POST",
    )
    try:
        with _opener.open(request, timeout=TIMEOUT_S) as response:
            if not 200 <= response.status < 300:
                raise DeliveryError(f"answered {response.status}")
    except urllib.error.HTTPError as error:
        with error:
            raise DeliveryError(f"answered {error.code}") from error
    except (OSError, ValueError) as error:
        raise DeliveryError(f"{type(error).__name__}: {getattr(error, 'reason', None) or error}") from error
