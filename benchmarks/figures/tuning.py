"""The automatic tuner: a load that steps up and down, from a bad start, against every setting tried by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis
import yaml

from benchmarks.figures.base import Measured, Measurement
from benchmarks.figures.open_loop import CURVE, MAX_BATCH, OBJECTIVE_BATCHES, SATURATING, WORDS
from benchmarks.muai_side import ENGINE_OF, collector, control, engine_worker, script_driver, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Metric, Row
from benchmarks.session import Session, metric
from muai_producers.store import Store
from muai_workers.tuning.records import TuningEvent
from muai_workers.tuning.store import TuningStore

INTERVAL_S = 15
START = 2
LOW_LOAD, HIGH_LOAD = 0.06, 0.6
HIGH_PHASE = 1
"""Of three."""
SETTLED = 5
"""Intervals in which at most one change is to come."""
CHANGES = ("raised", "lowered", "recalled", "rolled_back")
KEPT = 0.95
MAY_TAKE = 10
"""Intervals of the high load after which the tuner is judged."""


@dataclass(frozen=True)
class Trial:
    """A model under a load."""

    model: str
    folder: Path
    redis_url: str
    rate: float = 0.0
    """Saturation, in requests per second."""
    target_ms: float = 1000.0

    def configuration(self, size: int, largest: int, *, tuned: bool) -> Path:
        """The file, written."""
        path = write_configuration(self.folder, self.redis_url, {"max_batch_size": size})
        document: dict[str, Any] = yaml.safe_load(path.read_text())
        document["optimization"]["tuner"] = {
            "enabled": tuned,
            "tuning_interval_seconds": INTERVAL_S,
            "observation_window_seconds": 4 * INTERVAL_S,
            "target_latency_ms": self.target_ms,
            "max_batch_size": largest,
        }
        # The alert on latency is what too high a load for a bad start raises; the tuner is to help under it.
        document["monitoring"]["anomaly"] = {"enabled": False}
        path.write_text(yaml.safe_dump(document))
        return path


def measure(session: Session) -> Measured:
    """For each model: saturation, every batch size by hand, then the tuner from a bad start."""
    rows: list[Row] = []
    goals: list[Goal] = []
    series: dict[str, tuple[float, ...]] = {}
    for model in session.plan.tuning_models:
        with session.logs(f"tuning {model}") as folder:
            trial = Trial(model, folder, session.fresh())
            config = trial.configuration(MAX_BATCH, MAX_BATCH, tuned=False)
            with engine_worker(config, folder, ENGINE_OF[model], CURVE):
                _measure_model(session, trial, rows, goals, series)
    return Measured(rows, goals, series)


def _measure_model(
    session: Session, trial: Trial, rows: list[Row], goals: list[Goal], series: dict[str, tuple[float, ...]]
) -> None:
    sizes, model = session.plan.tuning_sizes, trial.model
    session.on_step(f"{model}: saturation")
    with _driven(trial, trial.configuration(MAX_BATCH, MAX_BATCH, tuned=False)) as driver:
        rate: float = max(driver.ask(saturate=SATURATING[model])["rate"] for _ in range(2))
    trial = replace(trial, rate=rate, target_ms=OBJECTIVE_BATCHES * 1000 * MAX_BATCH / rate)
    by_hand = {size: _by_hand(session, trial, size) for size in sizes}
    shares, events, late = _tuned(session, trial)
    best = max(by_hand, key=lambda size: by_hand[size])
    with _set_by_hand(trial, best) as driver:
        session.on_step(f"{model}: batches of {best} under the arrivals that the tuner had")
        beside = _shares(trial, driver, HIGH_LOAD, len(shares[1]), HIGH_PHASE)
    last, wanted = _settled(shares[1]), _settled(beside)
    settings = f"adaptive batching, objective {trial.target_ms:.0f} ms, {HIGH_LOAD * rate:.0f} arrivals/s"
    for size, share in by_hand.items():
        rows.append(Row(name=f"{model}, batches of {size}", settings=settings, metrics=_share([share])))
    told = f"{settings}, {len(shares[1])} intervals"
    rows.append(Row(name=f"{model}, batches of {best}, the best, once more", settings=told, metrics=_share([wanted])))
    told += f"; {len(events)} changes in all, {len(late)} in the last {SETTLED} intervals"
    rows.append(Row(name=f"{model}, tuned, from batches of {START}", settings=told, metrics=_share([last])))
    goals.append(
        Goal(
            text=f"answered in time, tuned over the best by hand: {WORDS[model]}",
            value=last / max(wanted, 1e-9),
            goal=KEPT,
        )
    )
    text = f"changes in the last {SETTLED} intervals: {WORDS[model]}"
    goals.append(Goal(text=text, value=len(late), goal=1.0, at_most=True))
    series[f"{model}, share in time by interval"] = tuple(round(share, 4) for phase in shares for share in phase)
    series[f"{model}, batches of {best}, by interval"] = tuple(round(share, 4) for share in beside)


def _settled(shares: list[float]) -> float:
    judged = shares[MAY_TAKE:] or shares[-1:]
    return sum(judged) / len(judged)


def _share(shares: list[float]) -> dict[str, Metric]:
    return {"in time": metric("of arrivals", shares)}


@contextmanager
def _driven(trial: Trial, config: Path) -> Iterator[Driver]:
    """A collector, and a client, ready."""
    with ExitStack() as stack:
        stack.enter_context(collector(config, trial.folder))
        env = {"BENCH_CONFIG": str(config), "BENCH_MODEL": trial.model}
        driver = stack.enter_context(script_driver("muai_open_loop.py", trial.folder, **env))
        driver.ask(limit_s=120.0, saturate=2 * MAX_BATCH)
        yield driver


def _in_time(trial: Trial, driver: Driver, load: float, seconds: float, seed: int) -> list[bool]:
    """Of each request, in order of arrival, whether it was answered in time."""
    answer = driver.ask(limit_s=seconds + 240.0, kind="poisson", rate=load * trial.rate, seconds=seconds, seed=seed)
    return [latency_ms <= trial.target_ms for latency_ms in answer["latencies_ms"]]


@contextmanager
def _set_by_hand(trial: Trial, size: int) -> Iterator[Driver]:
    config = trial.configuration(size, size, tuned=False)
    with control(config, trial.folder), _driven(trial, config) as driver:
        yield driver


def _by_hand(session: Session, trial: Trial, size: int) -> float:
    session.on_step(f"{trial.model}: batches of {size}")
    with _set_by_hand(trial, size) as driver:
        in_time = _in_time(trial, driver, HIGH_LOAD, session.plan.open_s, 5)
    return sum(in_time) / len(in_time)


def _shares(trial: Trial, driver: Driver, load: float, intervals: int, phase: int) -> list[float]:
    """In time, of what arrived in each interval."""
    in_time = _in_time(trial, driver, load, intervals * INTERVAL_S, 6 + phase)
    each = len(in_time) // intervals
    return [sum(in_time[at * each : (at + 1) * each]) / each for at in range(intervals)]


def _tuned(session: Session, trial: Trial) -> tuple[list[list[float]], list[TuningEvent], list[TuningEvent]]:
    """Shares in time by phase and interval, the changes that the tuner made, and those at the end of the high load."""
    config = trial.configuration(START, max(session.plan.tuning_sizes), tuned=True)
    shares: list[list[float]] = []
    ends_s: list[float] = []
    with control(config, trial.folder), _driven(trial, config) as driver:
        for phase, intervals in enumerate(session.plan.tuning_intervals):
            load = HIGH_LOAD if phase == HIGH_PHASE else LOW_LOAD
            session.on_step(f"{trial.model}: tuned, {load * trial.rate:.0f} arrivals/s, {intervals * INTERVAL_S} s")
            shares.append(_shares(trial, driver, load, intervals, phase))
            ends_s.append(time.time())
        with redis.Redis.from_url(trial.redis_url) as client:
            changes = [event for event in TuningStore(Store(client)).history() if event.outcome in CHANGES]
    until_s = ends_s[HIGH_PHASE]
    return shares, changes, [one for one in changes if until_s - SETTLED * INTERVAL_S < one.at <= until_s]


def _steps(plan: Plan) -> int:
    return len(plan.tuning_models) * (2 + len(plan.tuning_sizes) + len(plan.tuning_intervals))


MEASUREMENT = Measurement(
    title="The automatic tuner",
    how=f"Poisson arrivals at {LOW_LOAD:.0%} of saturation, then at {HIGH_LOAD:.0%}, then as before. The tuner starts "
    f"with batches of {START}, too small for the second load, decides every {INTERVAL_S} s, and is judged by what is "
    f"in time after {MAY_TAKE} intervals of it. Every batch size is tried by hand under the second load, and the best "
    f"then meets the same arrivals for as long, and is judged alike; a control worker runs beside them too. In time is "
    f"what is answered within {OBJECTIVE_BATCHES} times what a full batch takes at saturation. Here noop is "
    f"{WORDS['noop']}.",
    steps=_steps,
    measure=measure,
)
