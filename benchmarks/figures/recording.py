"""What monitoring costs: recording a request, and throughput with it, without it, and with its sinks broken."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

import redis

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import control, exporter, served
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Metric, Row
from benchmarks.session import Session, metric
from benchmarks.turns import HOW, SHARE, goal, shares, taken_in_turns
from muai_producers.performance.recorder import StoreRecorder
from muai_producers.performance.series import STAGES, Series
from muai_producers.performance.store import PerformanceStore
from muai_producers.store import Store

RECORDED = 100_000
BATCH = 32
RECORD_GOAL_US = 20.0
KEPT = 0.95
"""Least throughput, of that without monitoring."""
PASSWORD = "of-a-benchmark"
OFF, ALL_ON, REFUSED, HANGING, TAKEN = (
    "monitoring off",
    "all on",
    "statistics refused",
    "webhook hangs",
    "metrics' port taken",
)


def measure(session: Session) -> Measured:
    """Recording alone, then every way to run, in turns."""
    recording = _recording(session)
    cost = recording.metrics["per request"].median
    goals = [
        Goal(text="recording a request, microseconds of CPU", value=cost, goal=RECORD_GOAL_US, at_most=True),
    ]
    with ExitStack() as exits:
        drivers = _side_by_side(session, exits)
        metrics = shares(taken_in_turns(session, drivers), OFF)
    settings = "one collector, one worker, one control worker, and, but for off, one exporter; batches of 32"
    rows = [Row(name=name, settings=settings, metrics=measured) for name, measured in metrics.items()]
    goals += [
        goal(f"{name}: throughput over {OFF}", metrics[name][SHARE], KEPT) for name in (ALL_ON, REFUSED, HANGING, TAKEN)
    ]
    return Measured([recording, *rows], goals)


def _recording(session: Session) -> Row:
    """CPU time of a process that records and writes, for each request."""
    chance, costs = random.Random(9), []
    samples = [
        [[chance.lognormvariate(1.0, 1.0) for _ in range(BATCH)] for _ in STAGES] for _ in range(RECORDED // BATCH)
    ]
    series = Series("minilm", "pytorch", "embedding")
    with redis.Redis.from_url(session.fresh()) as client:
        for repeat in range(session.plan.repeats):
            session.on_step(f"recording {RECORDED} requests, {repeat + 1} of {session.plan.repeats}")
            recorder = StoreRecorder(PerformanceStore(Store(client), 604_800))
            started_s = time.process_time()
            for stages_ms in samples:
                recorder.served(series, stages_ms, 12 * BATCH)
            recorder.flush()
            costs.append(1e6 * (time.process_time() - started_s) / RECORDED)
            recorder.close()
    return Row(
        name="recording",
        settings=f"five stages, tokens, in batches of {BATCH}; written once a second",
        metrics=_us(costs),
    )


def _us(costs: list[float]) -> dict[str, Metric]:
    return {"per request": metric("us of CPU", costs)}


def _side_by_side(session: Session, exits: ExitStack) -> dict[str, Driver]:
    """Every way, in processes and a database of its own; who is refused has the prefix that it is denied."""
    # All of them as the one user: what Redis takes to look at a user's rights is no cost of monitoring.
    base = exits.enter_context(_refusing_user(session.fresh())).rpartition("/")[0]
    hanging = {
        "latency_threshold_ms": 0.001,  # so that there is always something to tell
        "check_every_s": 1.0,
        "alert_rate_limit_seconds": 0,
        "alert_destinations": ["webhook"],
        "webhook_url": exits.enter_context(_hanging_receiver()),
    }
    taken = exits.enter_context(socket.create_server(("127.0.0.1", 0)))
    ways: dict[str, tuple[str, str, Mapping[str, Any]]] = {
        OFF: (f"{base}/1", "muai1", {"enabled": False}),
        ALL_ON: (f"{base}/2", "muai2", {}),
        REFUSED: (f"{base}/0", "muai", {}),
        HANGING: (f"{base}/3", "muai3", {"anomaly": hanging}),
        TAKEN: (f"{base}/4", "muai4", {"prometheus": {"host": "127.0.0.1", "port": taken.getsockname()[1]}}),
    }
    return {
        name: exits.enter_context(_served(session, name, url, prefix, keys))
        for name, (url, prefix, keys) in ways.items()
    }


@contextmanager
def _served(session: Session, name: str, url: str, prefix: str, keys: Mapping[str, Any]) -> Iterator[Driver]:
    with (
        session.logs(f"recording {name}") as folder,
        served(folder, url, "noop", monitoring_keys=keys, prefix=prefix) as driver,
        control(folder / "muai.yaml", folder),
        nullcontext() if name == OFF else exporter(folder / "muai.yaml", folder),
    ):
        yield driver


@contextmanager
def _refusing_user(url: str) -> Iterator[str]:
    """The address for a user that may do everything but touch performance data under the prefix `muai`."""
    with redis.Redis.from_url(url) as client:
        patterns = ("~[^m]*", "~m[^u]*", "~muai:[^p]*", "~muai[^:]*")
        client.execute_command("ACL", "SETUSER", "limited", "on", f">{PASSWORD}", "+@all", "&*", *patterns)
        parts = urlsplit(url)
        try:
            yield parts._replace(netloc=f"limited:{PASSWORD}@{parts.hostname}:{parts.port}").geturl()
        finally:
            client.execute_command("ACL", "DELUSER", "limited")


@contextmanager
def _hanging_receiver() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


def _steps(plan: Plan) -> int:
    return plan.repeats + plan.turns


MEASUREMENT = Measurement(
    title="What recording costs, and broken sinks",
    how="Recording: CPU time of a process that records requests and writes them to Redis, for each request. "
    f"Throughput: a model that does nothing, in bulk, with a control worker beside it. {HOW} Statistics refused: the "
    "state store's user, whom all ways have, may not touch their keys. Webhook hangs: an alert is always open, and its "
    "receiver takes connections and never answers. Port taken: the exporter cannot serve its page, and tries again "
    "and again.",
    steps=_steps,
    measure=measure,
)
