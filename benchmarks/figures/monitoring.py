"""What counting costs: the queue with metrics on and off, in turn."""

from __future__ import annotations

from statistics import median

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import served
from benchmarks.plan import Plan
from benchmarks.results import Goal, Row
from benchmarks.session import Session, bulk_rate, fitted_count, idle_latency, metric

ON, OFF = "metrics on", "metrics off"
ROUNDS = (OFF, ON, ON, OFF)
"""Each has its own processes; a machine that grows slower or faster in between favours neither."""
LOST = 0.05


def measure(session: Session) -> Measured:
    """Every round with all of its repeats."""
    plan = session.plan
    rates: dict[str, list[float]] = {ON: [], OFF: []}
    idle: dict[str, list[float]] = {ON: [], OFF: []}
    count = 0
    for number, name in enumerate(ROUNDS):
        with (
            session.logs(f"monitoring {number} {name}") as folder,
            served(folder, session.fresh(), "noop", monitoring=name == ON) as driver,
        ):
            count = count or fitted_count(driver, "noop", plan.bulk_s, plan.max_bulk)
            bulk_rate(driver, "noop", count, 0)  # warms up
            for repeat in range(plan.repeats):
                session.on_step(f"{name}: {count} in bulk, {repeat + 1} of {plan.repeats}")
                rates[name].append(bulk_rate(driver, "noop", count, repeat))
                idle[name].append(idle_latency(driver, "noop", plan.idle_count, repeat)[0])
    rows = [
        Row(
            name=name,
            settings="defaults; one collector, one worker",
            metrics={"in bulk": metric("requests/s", rates[name]), "idle p50": metric("ms", idle[name])},
        )
        for name in (ON, OFF)
    ]
    kept = median(rates[ON]) / median(rates[OFF])
    return Measured(rows, [Goal(text="in bulk with metrics on, of that with them off", value=kept, goal=1 - LOST)])


def _steps(plan: Plan) -> int:
    return len(ROUNDS) * plan.repeats


MEASUREMENT = Measurement(
    title="What metrics cost",
    how="The queue alone, with a model that does nothing: everything that metrics cost shows. Every process counts and "
    "sends on what it counted, or nothing does.",
    steps=_steps,
    measure=measure,
)
