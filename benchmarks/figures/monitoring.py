"""What counting costs: the queue with metrics on and off, in turn."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import served
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Row
from benchmarks.session import Session, idle_latency, metric
from benchmarks.turns import HOW, SHARE, goal, shares, taken_in_turns

ON, OFF = "metrics on", "metrics off"
KEPT = 0.95
"""Least throughput, of that without metrics."""


def measure(session: Session) -> Measured:
    """Rounds in bulk, then requests one at a time."""
    plan = session.plan
    base = session.fresh().rpartition("/")[0]
    with ExitStack() as exits:
        drivers: dict[str, Driver] = {}
        for number, name in enumerate((OFF, ON)):
            folder = exits.enter_context(session.logs(f"monitoring {name}"))
            stack = served(folder, f"{base}/{number}", "noop", monitoring=name == ON, prefix=f"muai{number}")
            drivers[name] = exits.enter_context(stack)
        metrics = shares(taken_in_turns(session, drivers), OFF)
        idle: dict[str, list[float]] = {name: [] for name in drivers}
        for repeat in range(plan.repeats):
            for name, driver in drivers.items():
                session.on_step(f"{name}: {plan.idle_count} one at a time, {repeat + 1} of {plan.repeats}")
                idle[name].append(idle_latency(driver, "noop", plan.idle_count, repeat)[0])
    rows = [
        Row(
            name=name,
            settings="defaults; one collector, one worker",
            metrics={**metrics[name], "idle p50": metric("ms", idle[name])},
        )
        for name in (ON, OFF)
    ]
    return Measured(rows, [goal("in bulk with metrics on, of that with them off", metrics[ON][SHARE], KEPT)])


def _steps(plan: Plan) -> int:
    return plan.turns + 2 * plan.repeats


MEASUREMENT = Measurement(
    title="What metrics cost",
    how="The queue alone, with a model that does nothing: everything that metrics cost shows. Every process counts and "
    f"sends on what it counted, or nothing does. {HOW}",
    steps=_steps,
    measure=measure,
)
