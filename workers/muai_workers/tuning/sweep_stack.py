"""What a sweep is measured on: an installation of its own on this machine, whose settings change between two runs."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import yaml

from muai_config import Settings
from muai_config.loading import Resolution
from muai_config.render import render_yaml
from muai_producers.client import InferenceClient
from muai_producers.errors import MuaiError
from muai_producers.fleet import Fleet
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import ConfigVersions
from muai_workers.tuning.sweep import SweepError, nested
from muai_workers.up.console import Row
from muai_workers.up.observing import Observation
from muai_workers.up.stack import Wanted, stack
from muai_workers.up.supervisor import Supervisor

READY_S = 300.0
"""For a worker to take batches."""
APPLIED_S = 10.0
STOP_S = 60.0
POLL_S = 0.05
SHOWN_LINES = 15
ELSEWHERE = ("queue", "gateway", "workflows")
"""Sections of the configuration that a sweep has no use for: its queue is its own."""


class LastLines:
    """Keeps the last lines of the processes, to be shown should something go wrong."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=200)

    def line(self, name: str, text: str) -> None:
        self.lines.append(f"{name:<10} | {text}")

    def table(self, rows: Sequence[Row], seen: Observation | None) -> None:
        """Not kept: the last lines say more."""

    def close(self) -> None:
        """Nothing to close."""


def swept_document(resolution: Resolution, model: str, engine: str) -> dict[str, Any]:
    """The configuration of the installation that is measured: the one in effect, with this model alone on this engine,
    and without what would get in the way of measuring."""
    document: dict[str, Any] = yaml.safe_load(render_yaml(resolution))
    for section in ELSEWHERE:
        document.pop(section, None)
    document["models"] = {model: document["models"][model] | {"engines": [engine]}}
    document["optimization"]["tuner"] = {"enabled": False}
    # What the largest batches are for must not be held down, and every refused request would count as late.
    document["optimization"]["batcher"] |= {"enabled": True, "latency_target_ms": None, "min_batch_size": 1}
    document["monitoring"] = {"enabled": False, "server": {"queue_capacity": 1_000_000}}
    return document


def digest(value: Any) -> str:
    """A short name for what must be equal in measurements that are compared."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class SweptStack:
    """The installation at work."""

    def __init__(self, settings: Settings, client: InferenceClient, supervisor: Supervisor, engine: str) -> None:
        self.client = client
        self._versions = ConfigVersions(client.store)
        self._editor = ConfigEditor(settings, self._versions)
        self._fleet = Fleet(client.store)
        self._supervisor = supervisor
        self._engine = engine
        self._status: int | None = None
        self._thread = threading.Thread(target=self._supervise, name="muai-supervise")

    def _supervise(self) -> None:
        self._status = self._supervisor.run()

    def start(self) -> None:
        """Start the processes, and return when the engine takes batches.

        Raises:
            SweepError: it does not, in time.
        """
        self._thread.start()
        self._await(self._is_ready, READY_S, f"no {self._engine} worker was ready")

    def _is_ready(self) -> bool:
        try:
            view = self._fleet.view(())
        except redis.RedisError:
            return False  # it is only just starting
        return bool(view.collectors) and any(worker.engine == self._engine for worker in view.workers)

    def set(self, settings: Mapping[str, Any]) -> None:
        """Change settings, and return when every process works by them.

        Raises:
            SweepError: one cannot.
        """
        try:
            number = self._editor.set(settings, by="muai tune").number
        except MuaiError as error:
            raise SweepError(f"the settings are not possible here: {error.message}") from None
        self._await(lambda: self._is_applied(number), APPLIED_S, "not every process has taken the settings up")

    def _is_applied(self, number: int) -> bool:
        applied = self._versions.applied()
        return len(applied) > 0 and all(one.version >= number for one in applied)

    def _await(self, done: Any, limit_s: float, what: str) -> None:
        until_s = time.monotonic() + limit_s
        while not done():
            if self._status is not None:
                raise SweepError(f"the installation ended with exit status {self._status}")
            if time.monotonic() > until_s:
                raise SweepError(f"{what} within {limit_s:.0f} s")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Stop the processes and wait for their end; what they still do is of no use."""
        if self._thread.ident is None:
            return
        self._supervisor.request_stop()
        self._supervisor.request_stop()
        self._thread.join(STOP_S)


@contextmanager
def swept_stack(
    folder: Path, document: Mapping[str, Any], static: Mapping[str, Any], engine: str
) -> Iterator[SweptStack]:
    """An installation in `folder`, ready; stopped on exit.

    Changes this process's environment while it lasts: what else is configured on the machine has no say in it.

    Args:
        static: settings by dotted key that are read at the start alone.
    Raises:
        SweepError: it does not start; with the last lines of its processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "swept.yaml"
    file.write_text(yaml.safe_dump(_merged(dict(document), nested(static))), encoding="utf-8")
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("MUAI_") and not name.startswith("MUAI_TEST_")]:
        del os.environ[name]
    os.environ |= {"MUAI_CONFIG": str(file), "MUAI_HOME": str(folder)}
    lines = LastLines()
    try:
        wanted = Wanted(engines=(engine,))
        with stack(wanted, folder, lines) as (supervisor, settings), InferenceClient(settings) as client:
            swept = SweptStack(settings, client, supervisor, engine)
            try:
                swept.start()
                yield swept
            except SweepError as error:
                told = "\n".join(["", "the last lines of its processes:", *list(lines.lines)[-SHOWN_LINES:]])
                raise SweepError(f"{error}{told}") from None
            finally:
                client.close()  # before its Redis goes
                swept.stop()
    finally:
        os.environ.clear()
        os.environ |= before


def _merged(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(document.get(name), dict):
            document[name] = _merged(dict(document[name]), value)
        else:
            document[name] = value
    return document
