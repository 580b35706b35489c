"""Open loop: goodput at 80 % of saturation, adaptive batching against the best fixed setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import ENGINE_OF, collector, engine_worker, script_driver, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Row, percentile, ratios
from benchmarks.session import Session, metric

LOAD = 0.8
MAX_BATCH = 32
OBJECTIVE_BATCHES = 2.5
"""The objective, in times that a full batch takes: time to run in one, behind most of another, and some to spare."""
CURVE = {"latency_per_request_ms": 1.0, "latency_per_batch_ms": 10.0}
ADAPTIVE = "adaptive"
SATURATING = {"noop": 3000, "minilm": 1500}
WORDS = {"noop": "an engine that takes n + 10 ms for a batch of n", "minilm": "MiniLM"}


@dataclass(frozen=True)
class Load:
    """What a model is put under."""

    model: str
    rate: float
    """Arrivals per second."""
    objective_ms: float


@dataclass(frozen=True)
class Outcome:
    goodput: float
    """Requests per second that were answered within the objective."""
    p95_ms: float


def measure(session: Session) -> Measured:
    """For each model: saturation, every fixed setting, then the best of them and adaptive batching in turn."""
    rows: list[Row] = []
    goals: list[Goal] = []
    for model in session.plan.open_models:
        with session.logs(f"open-loop {model}") as folder:
            config = write_configuration(folder, session.fresh())
            with engine_worker(config, folder, ENGINE_OF[model], CURVE):
                _measure_model(session, model, folder, rows, goals)
    return Measured(rows, goals)


def _measure_model(session: Session, model: str, folder: Path, rows: list[Row], goals: list[Goal]) -> None:
    plan = session.plan
    load = _load(session, model, folder)
    trials = {setting: _trial(session, load, folder, setting) for setting in _fixed_settings(plan)}
    best = max(trials, key=lambda setting: trials[setting])
    for kind in plan.arrivals:
        outcomes = _pairs(session, load, folder, kind, best)
        for setting, measured in outcomes.items():
            rows.append(_row(load, kind, setting, measured, "best of the fixed settings" if setting == best else ""))
        adaptive, fixed = ([one.goodput for one in outcomes[setting]] for setting in (ADAPTIVE, best))
        value = percentile(ratios(adaptive, fixed), 50)
        goals.append(Goal(text=f"goodput, adaptive over best fixed: {WORDS[model]}, {kind}", value=value, goal=1.0))
    for setting, goodput in trials.items():
        if setting != best:
            rows.append(
                Row(
                    name=f"{model}, {setting}",
                    settings=f"trial, mean over {' and '.join(plan.arrivals)}",
                    metrics={"goodput": metric("requests/s", [goodput])},
                )
            )


def _row(load: Load, kind: str, setting: str, measured: list[Outcome], remark: str) -> Row:
    settings = f"{kind}, {load.rate:.0f} arrivals/s, objective {load.objective_ms:.0f} ms"
    return Row(
        name=f"{load.model}, {setting}",
        settings=f"{settings}; {remark}" if remark else settings,
        metrics={
            "goodput": metric("requests/s", [one.goodput for one in measured]),
            "p95": metric("ms", [one.p95_ms for one in measured]),
        },
    )


def _fixed_settings(plan: Plan) -> list[str]:
    return [f"fixed {size} x {timeout} ms" for size in plan.fixed_sizes for timeout in plan.fixed_timeouts_ms]


def _batcher(setting: str) -> dict[str, Any]:
    """The batcher's configuration for the name of a setting."""
    if setting == ADAPTIVE:
        return {"max_batch_size": MAX_BATCH}
    _, size, _, timeout, _ = setting.split()
    return {"max_batch_size": int(size), "batch_timeout_ms": int(timeout), "adaptive_batching": False}


@contextmanager
def _collecting(session: Session, load_model: str, folder: Path, setting: str) -> Iterator[Driver]:
    """A collector with that setting, and a client, ready."""
    config = write_configuration(folder, session.redis_url, _batcher(setting))
    with ExitStack() as stack:
        stack.enter_context(collector(config, folder))
        env = {"BENCH_CONFIG": str(config), "BENCH_MODEL": load_model}
        driver = stack.enter_context(script_driver("muai_open_loop.py", folder, **env))
        driver.ask(limit_s=120.0, saturate=2 * MAX_BATCH)
        yield driver


def _load(session: Session, model: str, folder: Path) -> Load:
    """80 % of what adaptive batching reaches with everything waiting from the start."""
    session.on_step(f"{model}: saturation")
    with _collecting(session, model, folder, ADAPTIVE) as driver:
        rate: float = max(driver.ask(saturate=SATURATING[model])["rate"] for _ in range(2))
    return Load(model, LOAD * rate, OBJECTIVE_BATCHES * 1000 * MAX_BATCH / rate)


def _trial(session: Session, load: Load, folder: Path, setting: str) -> float:
    """Mean goodput over the kinds of arrivals."""
    session.on_step(f"{load.model}: trying {setting}")
    with _collecting(session, load.model, folder, setting) as driver:
        return mean(_outcome(session, driver, load, kind, 0).goodput for kind in session.plan.arrivals)


def _pairs(session: Session, load: Load, folder: Path, kind: str, best: str) -> dict[str, list[Outcome]]:
    """Adaptive and fixed in turn, both under the same arrivals."""
    outcomes: dict[str, list[Outcome]] = {ADAPTIVE: [], best: []}
    for pair in range(session.plan.open_pairs):
        for setting, measured in outcomes.items():
            session.on_step(f"{load.model}, {kind}: {setting}, {pair + 1} of {session.plan.open_pairs}")
            with _collecting(session, load.model, folder, setting) as driver:
                measured.append(_outcome(session, driver, load, kind, pair + 1))
    return outcomes


def _outcome(session: Session, driver: Driver, load: Load, kind: str, seed: int) -> Outcome:
    seconds = session.plan.open_s
    latencies: list[float] = driver.ask(kind=kind, rate=load.rate, seconds=seconds, seed=seed)["latencies_ms"]
    in_time = sum(latency <= load.objective_ms for latency in latencies)
    return Outcome(in_time / seconds, percentile(latencies, 95))


def _steps(plan: Plan) -> int:
    fixed = len(plan.fixed_sizes) * len(plan.fixed_timeouts_ms)
    return len(plan.open_models) * (1 + fixed + 2 * plan.open_pairs * len(plan.arrivals))


MEASUREMENT = Measurement(
    title="Open loop at 80 % of saturation: goodput",
    how="Requests arrive at random, whether or not earlier ones are answered: Poisson arrivals, and bursty ones whose "
    f"gaps follow a gamma distribution (shape 0.25). The objective is {OBJECTIVE_BATCHES} times what a full batch "
    f"takes; goodput counts the requests answered within it. No setting makes batches larger than {MAX_BATCH}. Every "
    "fixed setting is tried; the best of them and adaptive batching at its defaults are then measured in turn, in "
    "pairs with the same arrivals. Here noop is "
    f"{WORDS['noop']}.",
    steps=_steps,
    measure=measure,
)
