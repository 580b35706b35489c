"""What monitoring costs: recording a request, and throughput with it, without it, and with its sinks broken."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import control, served
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Metric, Row
from benchmarks.session import Session, bulk_rate, fitted_count, metric
from muai_producers.performance.recorder import StoreRecorder
from muai_producers.performance.series import STAGES, Series
from muai_producers.performance.store import PerformanceStore
from muai_producers.store import Store

RECORDED = 100_000
BATCH = 32
RECORD_GOAL_US = 20.0
KEPT = 0.95
"""Least throughput, of that without monitoring."""
OFF: Mapping[str, Any] = {"enabled": False}
PASSWORD = "of-a-benchmark"
REFUSED = "statistics refused"
HANGING = "webhook hangs"


def measure(session: Session) -> Measured:
    """Recording alone, then each way to run in pairs with monitoring switched off."""
    rows = [_recording(session)]
    goals = [
        Goal(
            text="recording a request, microseconds of CPU",
            value=rows[0].metrics["per request"].median,
            goal=RECORD_GOAL_US,
            at_most=True,
        )
    ]
    for name in ("all on", REFUSED, HANGING):
        row = _pairs(session, name)
        rows.append(row)
        goals.append(Goal(text=f"{name}: throughput over monitoring off", value=row.metrics["ratio"].median, goal=KEPT))
    return Measured(rows, goals)


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


def _pairs(session: Session, name: str) -> Row:
    """Throughput in this way and with monitoring off, in turns: a machine drifts, and a pair drifts together."""
    plan = session.plan
    with ExitStack() as exits:
        off = exits.enter_context(_served(session, f"monitoring off beside {name}", OFF))
        count = fitted_count(off, "noop", plan.bulk_s, plan.max_bulk)
        without = [bulk_rate(off, "noop", count, repeat) for repeat in range(plan.repeats)]
    with ExitStack() as exits:
        driver = exits.enter_context(_ways(session, name))
        fitted_count(driver, "noop", plan.bulk_s, plan.max_bulk)  # warms it up
        rates = []
        for repeat in range(plan.repeats):
            session.on_step(f"{name}: {count} in bulk, {repeat + 1} of {plan.repeats}")
            rates.append(bulk_rate(driver, "noop", count, repeat))
    with ExitStack() as exits:
        off = exits.enter_context(_served(session, f"monitoring off after {name}", OFF))
        fitted_count(off, "noop", plan.bulk_s, plan.max_bulk)
        without += [bulk_rate(off, "noop", count, repeat) for repeat in range(plan.repeats)]
    base = sorted(without)[len(without) // 2]
    return Row(
        name=name,
        settings="one collector, one worker, one control worker; batches of 32",
        metrics={
            "in bulk": metric("requests/s", rates),
            "off, before and after": metric("requests/s", without),
            "ratio": metric("of off", [rate / base for rate in rates]),
        },
    )


@contextmanager
def _ways(session: Session, name: str) -> Iterator[Driver]:
    if name == REFUSED:
        with _refusing_user(session) as url, _served(session, name, {}, url) as driver:
            yield driver
    elif name == HANGING:
        with _hanging_receiver() as url:
            anomaly = {
                "latency_threshold_ms": 0.001,  # so that there is always something to tell
                "check_every_s": 1.0,
                "alert_rate_limit_seconds": 0,
                "alert_destinations": ["webhook"],
                "webhook_url": url,
            }
            with _served(session, name, {"anomaly": anomaly}) as driver:
                yield driver
    else:
        with _served(session, name, {}) as driver:
            yield driver


@contextmanager
def _served(
    session: Session, name: str, monitoring: Mapping[str, Any], redis_url: str | None = None
) -> Iterator[Driver]:
    fresh = session.fresh()
    with (
        session.logs(f"recording {name}") as folder,
        served(folder, redis_url or fresh, "noop", monitoring_keys=monitoring) as driver,
        control(folder / "muai.yaml", folder),
    ):
        yield driver


@contextmanager
def _refusing_user(session: Session) -> Iterator[str]:
    """The address for a user that may do everything but touch performance data."""
    with redis.Redis.from_url(session.redis_url) as client:
        patterns = ("~[^m]*", "~m[^u]*", "~muai:[^p]*", "~muai[^:]*")
        client.execute_command("ACL", "SETUSER", "limited", "on", f">{PASSWORD}", "+@all", "&*", *patterns)
        parts = urlsplit(session.redis_url)
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
    return 4 * plan.repeats


MEASUREMENT = Measurement(
    title="What recording costs, and broken sinks",
    how="Recording: CPU time of a process that records requests and writes them to Redis, for each request. "
    "Throughput: a model that does nothing, in bulk, with a control worker beside it; each way between two rounds with "
    "monitoring switched off, whose median is what the ratio is taken to. Statistics refused: the state store's user "
    "may not touch their keys. Webhook hangs: an alert is always open, and its receiver takes connections and never "
    "answers.",
    steps=_steps,
    measure=measure,
)
