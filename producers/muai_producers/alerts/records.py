"""What an alert is, and what is remembered of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from muai_config.monitoring import AlertType

Severity = Literal["warning", "error", "critical"]
Destination = Literal["log", "webhook", "alertmanager"]
Kind = Literal["firing", "resolved"]
Phase = Literal["pending", "firing", "quiet"]


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something is wrong now, as one look at the fleet shows it."""

    type: AlertType
    subject: str
    """What it is about: a model, a host, a queue, a GPU; 'fleet' for all of it."""
    severity: Severity
    message: str
    metadata: dict[str, Any] = {}
    for_s: float = 0.0
    """It must be found for so long before it is an alert."""

    @property
    def key(self) -> str:
        """What makes two findings one."""
        return f"{self.type}\t{self.subject}"


class Alert(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An alert as it is told to people and programs; the specification's field names, and ours."""

    id: str
    alert_type: AlertType
    subject: str
    severity: Severity
    message: str
    timestamp: float
    """When it began, in wall-clock seconds since the epoch."""
    metadata: dict[str, Any] = {}
    resolved_at: float | None = None
    """None while it lasts."""

    @property
    def kind(self) -> Kind:
        """Whether this tells of the beginning or of the end."""
        return "firing" if self.resolved_at is None else "resolved"


class AlertState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the fleet remembers of one type and subject between two checks."""

    phase: Phase
    since_s: float
    """When the phase began."""
    seen_s: float
    """When it was found last."""
    alert: Alert | None = None
    """While it fires."""
    is_told: bool = False
    """Whether its beginning was sent: a second alert within the rate limit is not, until the limit is over."""
    told_s: float | None = None
    """When a beginning was last sent of this type and subject."""
    refreshed_s: float = 0.0
    """When Alertmanager was last told that it lasts."""


class DeliveryState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far one notice has come to one destination."""

    destination: Destination
    kind: Kind
    status: Literal["waiting", "sent", "failed"] = "waiting"
    attempts: int = 0
    error: str = ""
    """Of the last attempt that failed."""
    at: float = 0.0
    """Wall-clock seconds of the last attempt."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One notice on its way to one destination."""

    alert: Alert
    state: DeliveryState

    @property
    def id(self) -> str:
        """Unique: a notice goes to a destination once."""
        return f"{self.alert.id}/{self.state.kind}/{self.state.destination}"


class AlertEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An alert in the history."""

    alert: Alert
    is_open: bool
    deliveries: list[DeliveryState]


def iso(moment_s: float) -> str:
    """A moment as RFC 3339 writes it."""
    return datetime.fromtimestamp(moment_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
