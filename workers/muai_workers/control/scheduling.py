"""Scheduled tasks as they all are: once per interval in the whole fleet, within a time limit, a missed run noticed.

Beat sends a message at each interval; a control worker takes it. Where several beats run, or messages have piled up,
the first to come takes the interval and the others find it taken.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from muai_config.queues import CONTROL
from muai_producers.monitoring.guard import Part, guarded
from muai_producers.scheduled import MISSED_RUNS, TaskRuns, run_record
from muai_producers.store import Store
from muai_workers.control.singleton import singleton

log = logging.getLogger(__name__)
INTERVAL_SHARE = 0.9
"""An interval counts as taken for this share of it: beat's messages come a little early or late."""


class Deadline:
    """The time limit of a run: long ones look at it between their steps.

    Nothing can stop a thread from outside. What a run waits for has time limits of its own (connections, receivers of
    alerts), and a run that goes on beyond its limit loses its lock: then another may begin, and what either writes is
    checked where it is written.
    """

    def __init__(self, limit_s: float) -> None:
        self._ends_s = time.monotonic() + limit_s

    @property
    def is_past(self) -> bool:
        """Whether the run should end."""
        return time.monotonic() >= self._ends_s


@dataclass(frozen=True)
class Scheduled:
    """A task of the schedule."""

    name: str
    """Of the Celery task."""
    every_s: float
    limit_s: float
    run: Callable[[Deadline], Any]
    part: Part
    """Of monitoring: under which its failures are counted."""

    @property
    def entry(self) -> dict[str, Any]:
        """In beat's schedule. A run that nobody took before the next is due is not worth making up for."""
        return {"task": self.name, "schedule": self.every_s, "options": {"queue": CONTROL, "expires": self.every_s}}


class Scheduler:
    """Runs scheduled tasks, each once per interval."""

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        self._prefix = store.keys.prefix
        self._runs = TaskRuns(store)
        self._worker = socket.gethostname()

    def register(self, app: Celery, task: Scheduled) -> None:
        """Give `app` the task. The schedule is told separately."""

        def run() -> Any:
            return self.run(task)

        run.__doc__ = task.run.__doc__
        app.task(name=task.name, ignore_result=True)(run)

    def run(self, task: Scheduled) -> Any:
        """Run the task, unless this interval has been taken; returns what it returned, else None."""
        lock = f"{self._prefix}:lock:{task.name}"
        try:
            with singleton(self._client, lock, task.limit_s) as is_ours:
                if not is_ours or not self._take_interval(task):
                    return None
                return self._run(task)
        except (redis.RedisError, OperationalError) as error:
            log.warning("%s could not run: %s; the next run will", task.name, error)
            return None

    def _take_interval(self, task: Scheduled) -> bool:
        taken_ms = int(task.every_s * INTERVAL_SHARE * 1000)
        return bool(self._client.set(f"{self._prefix}:interval:{task.name}", self._worker, nx=True, px=taken_ms))

    def _run(self, task: Scheduled) -> Any:
        started_s = time.monotonic()
        last = self._runs.get(task.name)
        if last is not None and time.time() - last.ended_at > MISSED_RUNS * task.every_s + task.limit_s:
            log.warning("%s had not run well for %.0f s", task.name, time.time() - last.ended_at)
        result, failed = None, True
        with guarded(task.part):
            result = task.run(Deadline(task.limit_s))
            failed = False
        if failed:
            self._runs.note_failure(task.name, "it failed; the log of its control worker says how")
            return None
        record = run_record(task.name, task.every_s, task.limit_s, started_s, self._worker)
        if record.took_s > task.limit_s:
            log.warning("%s took %.1f s, longer than the %.0f s that it has", task.name, record.took_s, task.limit_s)
        self._runs.note(record)
        return result
