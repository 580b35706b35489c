"""The queue alone: a model that does nothing, in bulk and one at a time."""

from __future__ import annotations

from functools import partial

import msgspec

from benchmarks.contestants import NOOP_QUEUES, QueuePeer
from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import served
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Row, ratio_goal
from benchmarks.session import Session, bulk_rate, fitted_count, idle_latency, metric

OURS = "MuAI"
OUR_SETTINGS = "defaults: batches of 32, 50 ms, adaptive; one collector, one worker"
OURS_LARGE = "MuAI, batches of 256"
LARGE = {"max_batch_size": 256}
LARGE_SETTINGS = "max_batch_size 256, else defaults; one collector, one worker"


def measure(session: Session) -> Measured:
    """Each contestant in turn, with all of its repeats."""
    with session.logs("queue MuAI") as folder, served(folder, session.fresh(), "noop") as driver:
        rows = [_contest(session, driver, Row(name=OURS, settings=OUR_SETTINGS))]
    with session.logs("queue MuAI 256") as folder, served(folder, session.fresh(), "noop", LARGE) as driver:
        rows.append(_contest(session, driver, Row(name=OURS_LARGE, settings=LARGE_SETTINGS)))
    rows += [session.attempt(peer.name, peer.settings, partial(_peer, session, peer)) for peer in NOOP_QUEUES]
    return Measured(rows, _goals({row.name: row for row in rows}))


def _peer(session: Session, peer: QueuePeer) -> Row:
    with session.logs(f"queue {peer.name}") as folder, peer.served(folder, session.fresh(), "noop") as driver:
        return _contest(session, driver, Row(name=peer.name, settings=peer.settings))


def _contest(session: Session, driver: Driver, row: Row) -> Row:
    """`row` with versions and metrics."""
    plan = session.plan
    rates, medians, tails = [], [], []
    count = fitted_count(driver, "noop", plan.bulk_s, plan.max_bulk)
    for repeat in range(plan.repeats):
        session.on_step(f"{row.name}: {count} in bulk, {repeat + 1} of {plan.repeats}")
        rates.append(bulk_rate(driver, "noop", count, repeat))
        p50_ms, p99_ms = idle_latency(driver, "noop", plan.idle_count, repeat)
        medians.append(p50_ms)
        tails.append(p99_ms)
    metrics = {
        "in bulk": metric("requests/s", rates),
        "idle p50": metric("ms", medians),
        "idle p99": metric("ms", tails),
        "bulk size": metric("requests", [float(count)]),
    }
    return msgspec.structs.replace(row, versions=driver.versions, metrics=metrics)


def _goals(rows: dict[str, Row]) -> list[Goal]:
    ours = rows[OURS].metrics
    goals = ratio_goal(rows, "in bulk", OURS_LARGE, "celery-batches", 10.0)
    goals += ratio_goal(rows, "in bulk", OURS_LARGE, "dramatiq", 5.0)
    if ours:
        large = rows[OURS_LARGE].metrics["in bulk"].median
        goals += [
            Goal(text="in bulk, batches of 256, requests/s", value=large, goal=20_000.0),
            Goal(text="idle p50, ms", value=ours["idle p50"].median, goal=4.0, at_most=True),
            Goal(text="idle p99, ms", value=ours["idle p99"].median, goal=15.0, at_most=True),
        ]
    return goals


def _steps(plan: Plan) -> int:
    return (2 + len(NOOP_QUEUES)) * plan.repeats


MEASUREMENT = Measurement(
    title="The queue: a model that does nothing",
    how="Redis without persistence; one producer, one worker (and, for MuAI, one collector). In bulk: from the first "
    "submission until every result has been received. Idle: one request at a time, from submission to result; the "
    "model takes no time, so all of it is the queue's.",
    steps=_steps,
    measure=measure,
)
