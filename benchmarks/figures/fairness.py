"""Fairness: what one tenant's requests wait while another floods the queue."""

from __future__ import annotations

from typing import Any

from benchmarks.figures.base import Measured, Measurement
from benchmarks.figures.open_loop import CURVE, WORDS
from benchmarks.muai_side import collector, engine_worker, script_driver, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import BenchmarkError, Driver
from benchmarks.results import Goal, Row, percentile, ratios
from benchmarks.session import Session, metric

MODEL = "noop"
BURST = 500
"""Requests that the other tenant submits at once; a twentieth of the flood."""
STEADY_PER_S, STEADY_S = 20.0, 5.0
LOADS: dict[str, dict[str, Any]] = {
    f"{BURST} at once": {"burst": BURST},
    f"{STEADY_PER_S:.0f} a second": {"kind": "poisson", "rate": STEADY_PER_S, "seconds": STEADY_S},
}
LIMIT = 2.0


def measure(session: Session) -> Measured:
    """Each load of the one tenant alone and under the other's flood, in turn."""
    with session.logs("fairness") as folder:
        config = write_configuration(folder, session.fresh())
        with collector(config, folder), engine_worker(config, folder, "fake", CURVE):
            env = {"BENCH_CONFIG": str(config), "BENCH_MODEL": MODEL}
            with script_driver("muai_open_loop.py", folder, **env) as driver:
                driver.ask(limit_s=120.0, saturate=500)
                measured = {name: _pairs(session, driver, name, load) for name, load in LOADS.items()}
    rows = []
    for name, (alone, flooded) in measured.items():
        settings = f"the flood: {session.plan.flood} at once, by another tenant"
        rows.append(Row(name=f"{name}, alone", metrics={"p95": metric("ms", alone)}))
        metrics = {"p95": metric("ms", flooded), "over alone": metric("", list(ratios(flooded, alone)))}
        rows.append(Row(name=f"{name}, under the flood", settings=settings, metrics=metrics))
    burst = rows[1].metrics["over alone"].median
    goal = Goal(text=f"p95 of {BURST} at once, under the flood over alone", value=burst, goal=LIMIT, at_most=True)
    return Measured(rows, [goal])


def _pairs(session: Session, driver: Driver, name: str, load: dict[str, Any]) -> tuple[list[float], list[float]]:
    """p95 alone and under the flood, in milliseconds."""
    alone, flooded = [], []
    for pair in range(session.plan.repeats):
        session.on_step(f"{name}, alone and under the flood, {pair + 1} of {session.plan.repeats}")
        alone.append(_p95_ms(driver, load, pair))
        driver.ask(flood=session.plan.flood, tenant="flood")
        flooded.append(_p95_ms(driver, load, pair))
        left: int = driver.ask(limit_s=180.0, drain=True)["left"]
        if not left:
            raise BenchmarkError(f"the flood was over before {name} was: nothing was measured")
    return alone, flooded


def _p95_ms(driver: Driver, load: dict[str, Any], seed: int) -> float:
    return percentile(driver.ask(limit_s=180.0, seed=seed, tenant="other", **load)["latencies_ms"], 95)


def _steps(plan: Plan) -> int:
    return len(LOADS) * plan.repeats


MEASUREMENT = Measurement(
    title="Fairness between tenants",
    how=f"One tenant's requests, alone and while another's flood is waiting; from submission until the client hears of "
    f"the result. The engine: {WORDS['noop']}. Of two tenants that both ask for more than there is, each has half, so "
    f"what is submitted at once takes at most twice as long as alone. Single requests of an idle tenant wait for the "
    f"batches under way, which the flood fills: that is not a matter of shares.",
    steps=_steps,
    measure=measure,
)
