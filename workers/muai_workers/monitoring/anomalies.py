"""`AnomalyDetector`: looks at the fleet, decides, and sees to it that each alert is told once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from muai_producers.alerts.records import Alert, Finding
from muai_producers.alerts.store import AlertStore
from muai_producers.monitoring.events import alert_raised
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.queue_depths import QueueReader, queue_reader
from muai_producers.store import Store
from muai_workers.control.scheduling import Deadline
from muai_workers.monitoring.alert_states import AlertRules, Step, advance, alert_id
from muai_workers.monitoring.delivering import Deliverer, deliveries_of
from muai_workers.monitoring.detector import (
    FLEET,
    error_rate_finding,
    findings,
    memory_finding,
    over_latency,
)
from muai_workers.monitoring.observing import FleetLook

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """What one check came to."""

    num_found: int
    began: tuple[Alert, ...] = ()
    ended: tuple[Alert, ...] = ()


class AnomalyDetector:
    """The anomaly check of the whole fleet. Any number of them may run; what each decides is written once.

    `check` is what the schedule runs. The methods `check_latency`, `check_error_rate`, `check_resources` and
    `send_alert` are for callers with figures of their own.

    Args:
        wall_s: wall-clock seconds.
    Raises:
        redis.exceptions.RedisError: from every method that looks or sends, when the state store does not answer.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        monitor: PerformanceMonitor,
        queues: QueueReader | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings.monitoring.anomaly
        self._is_on = settings.monitoring.enabled and self._settings.enabled
        self._monitor = monitor
        self._wall_s = wall_s
        self.alerts = AlertStore(store)
        self.deliverer = Deliverer(self.alerts, self._settings, wall_s)
        self._look = FleetLook(settings, store, monitor, queues or queue_reader(settings), wall_s)

    def on_settings(self, settings: Settings) -> None:
        """Work by these settings from the next check on."""
        self._settings = settings.monitoring.anomaly
        self._is_on = settings.monitoring.enabled and self._settings.enabled
        self.deliverer.on_settings(self._settings)
        self._look.on_settings(settings)

    def check(self, deadline: Deadline) -> Checked:
        """Look at the fleet, and tell what has begun and what has ended.

        Switched off, it lets the alerts that last come to their end: nobody would ever end them else.
        """
        now_s = self._wall_s()
        if not self._is_on:
            if self.alerts.open():
                self._commit([], now_s)
            return Checked(0)
        found = [*findings(self._look.take(), self._settings), *self.alerts.reports(now_s)]
        step = self._commit(found, now_s)
        if step is None:
            return Checked(len(found))
        self.deliverer.refresh(step.refreshed)
        self.deliverer.run(deadline)
        began = tuple(alert for alert in step.changed if alert.resolved_at is None)
        return Checked(len(found), began, tuple(alert for alert in step.changed if alert.resolved_at is not None))

    def _commit(self, found: list[Finding], now_s: float) -> Step | None:
        states, seen = self.alerts.states()
        rules = AlertRules(float(self._settings.alert_rate_limit_seconds), self._settings.resolve_after_s)
        step = advance(states, found, now_s, rules)
        deliveries = deliveries_of(step.notices, self._settings.alert_destinations)
        if not self.alerts.commit(seen, step.states, step.changed, deliveries, now_s):
            log.info("another control worker has checked meanwhile")
            return None
        _count(step)
        return step

    # -- the specification's -------------------------------------------------------------------------------------

    def check_latency(self, operation: str, latency_ms: float) -> Alert | None:
        """An alert when an operation took longer than the threshold. Nothing is sent."""
        return self._alert(over_latency(operation, latency_ms, self._settings))

    def check_error_rate(self, window_seconds: float = 60) -> Alert | None:
        """An alert when more of the fleet's requests failed within the window than the threshold allows. Nothing is
        sent."""
        total = self._monitor.report(window_seconds).total
        return self._alert(error_rate_finding(total, self._settings))

    def check_resources(self, gpu_memory_percent: float, cpu_percent: float) -> Alert | None:
        """An alert when a GPU uses more of its memory than the threshold allows. Nothing is sent.

        Args:
            cpu_percent: goes into the alert; a busy CPU is no reason for one.
        """
        return self._alert(memory_finding("gpu", gpu_memory_percent, self._settings), cpu_percent=cpu_percent)

    def send_alert(self, alert: Alert) -> bool:
        """Send an alert to every destination, unless one of its type and subject was sent within the rate limit.

        Returns:
            whether it is on its way.
        """
        finding = Finding(
            type=alert.alert_type,
            subject=alert.subject,
            severity=alert.severity,
            message=alert.message,
            metadata=alert.metadata,
        )
        now_s = self._wall_s()
        states, seen = self.alerts.states()
        rules = AlertRules(float(self._settings.alert_rate_limit_seconds), self._settings.resolve_after_s)
        own = {finding.key: states[finding.key]} if finding.key in states else {}
        step = advance(own, [finding], now_s, rules)
        deliveries = deliveries_of(step.notices, self._settings.alert_destinations)
        is_ours = self.alerts.commit(seen, {**states, **step.states}, step.changed, deliveries, now_s)
        if is_ours and step.notices:
            _count(step)
            self.deliverer.run(Deadline(30.0))
        return is_ours and bool(step.notices)

    def _alert(self, finding: Finding | None, **about: Any) -> Alert | None:
        if finding is None:
            return None
        now_s = self._wall_s()
        return Alert(
            id=alert_id(finding.key, now_s),
            alert_type=finding.type,
            subject=finding.subject or FLEET,
            severity=finding.severity,
            message=finding.message,
            timestamp=now_s,
            metadata={**finding.metadata, **about},
        )


def _count(step: Step) -> None:
    """Tell the metrics of alerts that go out."""
    for alert in step.notices:
        if alert.resolved_at is None:
            alert_raised(alert.alert_type, alert.severity)
