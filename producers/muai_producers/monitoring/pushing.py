"""Sends on what a process has counted, every few seconds, from a thread of its own."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

from muai_producers.connections import state_client
from muai_producers.monitoring import instruments
from muai_producers.monitoring.guard import Standings, guarded, standings
from muai_producers.monitoring.recorder import Gathered, Recorder, recorder
from muai_producers.monitoring.shared import ProcessReport, SharedMetrics, as_wire
from muai_producers.store import Store

if TYPE_CHECKING:
    from muai_config import Settings

PUSH_EVERY_S = 2.0
LAST_PUSH_S = 3.0


class MetricsPusher:
    """Adds a process's counts to the installation's.

    A state store that is away costs nothing but a failure that is counted: what was counted stays here, as many series
    as there are, and is sent when the store is back.

    Args:
        role: what the process is for, such as `engine`; `name` tells it from others of its role.
    """

    def __init__(
        self,
        shared: SharedMetrics,
        role: str,
        name: str,
        source: Recorder = recorder,
        own_standings: Standings = standings,
        every_s: float = PUSH_EVERY_S,
    ) -> None:
        self._shared = shared
        self._role = role
        self._host = socket.gethostname()
        self.process_id = f"{role}/{name}@{self._host}:{os.getpid()}"
        self._source = source
        self._standings = own_standings
        self._every_s = every_s
        self._number = 0
        self._unsent = Gathered()
        self._failures_told: dict[str, int] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="muai-metrics", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def close(self) -> None:
        """Send what is left, withdraw what holds only while this process lives, and end."""
        self._closed.set()
        self._thread.join(LAST_PUSH_S)
        if self._thread.is_alive():
            return
        with guarded("metrics", self._standings):
            self._send()
            self._shared.withdraw(self.process_id)

    def push(self) -> None:
        """Send now. Not beside the thread: for tests and for processes that have none.

        Raises:
            redis.exceptions.RedisError: the store does not answer; nothing is lost.
        """
        self._count_failures()
        self._send()
        readings = as_wire(self._source.readings())
        report = ProcessReport(
            id=self.process_id,
            role=self._role,
            host=self._host,
            at=time.time(),
            readings=readings,
            degraded=dict(self._standings.degraded()),
        )
        self._shared.report(report)

    def _run(self) -> None:
        while True:
            with guarded("metrics", self._standings):
                self.push()
            if self._closed.wait(self._every_s):
                return

    def _send(self) -> None:
        # What was sent without an answer goes again as it was, under its number: it may have arrived.
        if self._unsent:
            self._shared.add(self.process_id, self._number, self._unsent)
            self._unsent = Gathered()
        gathered = self._source.take()
        if gathered:
            self._number += 1
            self._unsent = gathered
            self._shared.add(self.process_id, self._number, gathered)
            self._unsent = Gathered()

    def _count_failures(self) -> None:
        for part, failures in self._standings.failures().items():
            told = self._failures_told.get(part, 0)
            self._source.count(instruments.FAILURES, part, by=failures - told)
            self._failures_told[part] = failures


def start_pushing(settings: Settings, role: str, name: str) -> MetricsPusher | None:
    """Send what this process counts from now on; None where metrics are switched off, and nothing is counted then."""
    monitoring = settings.monitoring
    recorder.enabled = monitoring.enabled and monitoring.prometheus.enabled
    if not recorder.enabled:
        return None
    store = Store(state_client(settings.queue.state_url, timeout_s=2.0), prefix=settings.queue.key_prefix)
    pusher = MetricsPusher(SharedMetrics(store), role, name)
    pusher.start()
    return pusher
