"""Delivering what alerts tell: each notice to each destination, again after a while where that fails, and at last given
up, which the history says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from muai_config.monitoring import AnomalySettings
from muai_producers.alerts.records import Alert, Delivery, DeliveryState, Destination
from muai_producers.alerts.store import AlertStore
from muai_workers.control.scheduling import Deadline
from muai_workers.monitoring.destinations import DeliveryError, post_alertmanager, send

log = logging.getLogger(__name__)
MAX_ATTEMPTS = 8
FIRST_BACKOFF_S = 2.0
LONGEST_BACKOFF_S = 120.0


def deliveries_of(notices: Iterable[Alert], destinations: Sequence[Destination]) -> list[Delivery]:
    """One delivery of each notice to each destination. The log is always among them."""
    places: list[Destination] = list(dict.fromkeys(("log", *destinations)))
    return [
        Delivery(alert=alert, state=DeliveryState(destination=place, kind=alert.kind))
        for alert in notices
        for place in places
    ]


def backoff_s(attempts: int) -> float:
    """Seconds until the next attempt, after so many that failed: twice as long each time. Pure."""
    return min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (attempts - 1))


def after_attempt(state: DeliveryState, error: str | None, now_s: float) -> tuple[DeliveryState, float | None]:
    """The state after an attempt, and when the next is due; None when there is none. Pure.

    Args:
        error: None where it was taken.
    """
    attempts = state.attempts + 1
    if error is None:
        return msgspec.structs.replace(state, status="sent", attempts=attempts, error="", at=now_s), None
    is_last = attempts >= MAX_ATTEMPTS
    failed = msgspec.structs.replace(
        state, status="failed" if is_last else "waiting", attempts=attempts, error=error[:300], at=now_s
    )
    return failed, None if is_last else now_s + backoff_s(attempts)


class Deliverer:
    """Sends what is due.

    Args:
        wall_s: wall-clock seconds.
    Raises:
        redis.exceptions.RedisError: from every method, when the state store does not answer.
    """

    def __init__(self, store: AlertStore, settings: AnomalySettings, wall_s: Callable[[], float] = time.time) -> None:
        self._store = store
        self._settings = settings
        self._wall_s = wall_s

    def on_settings(self, settings: AnomalySettings) -> None:
        """Send where these say from now on."""
        self._settings = settings

    def run(self, deadline: Deadline) -> int:
        """Send what is due, until nothing is or the time is up; returns how many notices were taken.

        Any number of control workers may do this at once: each notice is with one of them.
        """
        num_sent = 0
        while not deadline.is_past and (due := self._store.claim(self._wall_s(), 1)) is not None:
            # One at a time: what waits behind a receiver that hangs must not be taken for abandoned.
            num_sent += sum(self._deliver(delivery) for delivery in due)
        return num_sent

    def _deliver(self, delivery: Delivery) -> bool:
        error = None
        try:
            send(delivery, self._settings, self._wall_s())
        except DeliveryError as failure:
            error = str(failure)
        state, next_s = after_attempt(delivery.state, error, self._wall_s())
        if error is not None:
            outlook = "given up" if next_s is None else f"again in {next_s - self._wall_s():.0f} s"
            told = (delivery.alert.id, state.destination, error, outlook)
            log.warning("alert %s could not be sent to %s: %s; %s", *told)
        self._store.settle(msgspec.structs.replace(delivery, state=state), next_s)
        return error is None

    def refresh(self, lasting: Sequence[Alert]) -> None:
        """Tell Alertmanager that these last. One that it does not hear of is told at the next refresh."""
        if not lasting or "alertmanager" not in self._settings.alert_destinations:
            return
        try:
            post_alertmanager(lasting, self._settings, self._wall_s())
        except DeliveryError as error:
            log.warning("Alertmanager was not told that %d alerts last: %s", len(lasting), error)
