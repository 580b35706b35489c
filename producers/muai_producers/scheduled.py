"""When each scheduled task ran last, and which are overdue: kept in the state store by control workers, read by all."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from muai_producers.store import Store

MISSED_RUNS = 3
"""A task counts as overdue when so many runs in a row did not end well."""


class TaskRun(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The last run of a scheduled task that ended well."""

    task: str
    every_s: float
    limit_s: float
    ended_at: float
    """Wall-clock seconds since the epoch."""
    took_s: float
    worker: str = ""
    error: str = ""
    """Of a run after this one; '' while none has failed."""


def overdue(runs: Iterable[TaskRun], now_s: float) -> list[str]:
    """A sentence for each task that has not run for `MISSED_RUNS` of its intervals and its time limit. Pure."""
    told = []
    for run in sorted(runs, key=lambda run: run.task):
        late_s = now_s - run.ended_at
        if late_s > MISSED_RUNS * run.every_s + run.limit_s:
            why = f": {run.error}" if run.error else ""
            told.append(f"the scheduled task {run.task} has not run well for {late_s:.0f} s{why}")
    return told


class TaskRuns:
    """The records.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        self._key = f"{store.keys.prefix}:scheduled"

    def note(self, run: TaskRun) -> None:
        """A run has ended well."""
        self._client.hset(self._key, run.task, msgspec.json.encode(run))

    def note_failure(self, task: str, error: str) -> None:
        """A run has failed; the last that ended well stays known."""
        last = self.get(task)
        if last is not None:
            self.note(msgspec.structs.replace(last, error=error[:300]))

    def get(self, task: str) -> TaskRun | None:
        """A task's last run that ended well."""
        raw = self._client.hget(self._key, task)
        return None if raw is None else _decode(raw)

    def all(self) -> list[TaskRun]:
        """Every task that has ever run well."""
        return [_decode(raw) for raw in self._client.hgetall(self._key).values()]

    def forget(self, tasks: Iterable[str]) -> None:
        """Drop tasks that are not scheduled any more."""
        names = list(tasks)
        if names:
            self._client.hdel(self._key, *names)


_decode = msgspec.json.Decoder(TaskRun).decode


def run_record(task: str, every_s: float, limit_s: float, started_s: float, worker: str) -> TaskRun:
    """A run that ends now.

    Args:
        started_s: monotonic seconds.
    """
    return TaskRun(
        task=task,
        every_s=every_s,
        limit_s=limit_s,
        ended_at=time.time(),
        took_s=round(time.monotonic() - started_s, 4),
        worker=worker,
    )
