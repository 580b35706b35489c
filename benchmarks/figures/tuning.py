"""The automatic tuner: a load that steps up and down, from a bad start, against every setting tried by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis
import yaml

from benchmarks.figures.base import Measured, Measurement
from benchmarks.figures.open_loop import MAX_BATCH, OBJECTIVE_BATCHES, SATURATING
from benchmarks.muai_side import ENGINE_OF, collector, control, engine_worker, script_driver, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import Driver
from benchmarks.results import Goal, Metric, Row
from benchmarks.session import Session, metric
from muai_producers.store import Store
from muai_workers.tuning.records import TuningEvent
from muai_workers.tuning.store import TuningStore

MODEL = "minilm"
INTERVAL_S = 30
START = 2
SIZES = (2, 4, 8, 16, 32, 64)
LOW_LOAD, HIGH_LOAD = 0.08, 0.8
CHANGES = ("raised", "lowered", "recalled", "rolled_back")
KEPT = 0.95


def measure(session: Session) -> Measured:
    """Saturation, every batch size by hand, then the tuner from the worst of them."""
    with session.logs("tuning") as folder:
        config = _configuration(folder, session.fresh(), MAX_BATCH, tuned=False, target_ms=1000.0)
        with engine_worker(config, folder, ENGINE_OF[MODEL]):
            session.on_step("saturation")
            with _driven(config, folder) as driver:
                rate: float = max(driver.ask(saturate=SATURATING[MODEL])["rate"] for _ in range(2))
            target_ms = OBJECTIVE_BATCHES * 1000 * MAX_BATCH / rate
            by_hand = {size: _by_hand(session, folder, size, rate, target_ms) for size in SIZES}
            shares, events = _tuned(session, folder, rate, target_ms)
    best = max(by_hand, key=lambda size: by_hand[size])
    high = shares[1]
    settings = f"adaptive batching, objective {target_ms:.0f} ms, {HIGH_LOAD * rate:.0f} arrivals/s"
    rows = [
        Row(name=f"batches of {size}", settings=settings, metrics=_share([share])) for size, share in by_hand.items()
    ]
    count = sum(event.outcome in CHANGES for event in events)
    rows.append(
        Row(
            name=f"tuned, from batches of {START}",
            settings=f"{settings}; the last interval at ten times the load; {count} changes in all",
            metrics=_share([high[-1]]),
        )
    )
    ratio = high[-1] / max(by_hand[best], 1e-9)
    goals = [Goal(text=f"tuned over the best by hand (batches of {best}), answered in time", value=ratio, goal=KEPT)]
    series = {"tuned, share in time by interval": tuple(round(share, 4) for phase in shares for share in phase)}
    return Measured(rows, goals, series)


def _share(shares: list[float]) -> dict[str, Metric]:
    return {"in time": metric("of arrivals", shares)}


def _configuration(folder: Path, redis_url: str, size: int, *, tuned: bool, target_ms: float) -> Path:
    path = write_configuration(folder, redis_url, {"max_batch_size": size})
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    document["optimization"]["tuner"] = {
        "enabled": tuned,
        "tuning_interval_seconds": INTERVAL_S,
        "observation_window_seconds": 4 * INTERVAL_S,
        "target_latency_ms": target_ms,
        "max_batch_size": max(SIZES),
    }
    # The alert on latency is what a load that is too high for a bad start raises; the tuner is to help under it.
    document["monitoring"]["anomaly"] = {"enabled": False}
    path.write_text(yaml.safe_dump(document))
    return path


@contextmanager
def _driven(config: Path, folder: Path) -> Iterator[Driver]:
    """A collector, and a client, ready."""
    with ExitStack() as stack:
        stack.enter_context(collector(config, folder))
        env = {"BENCH_CONFIG": str(config), "BENCH_MODEL": MODEL}
        driver = stack.enter_context(script_driver("muai_open_loop.py", folder, **env))
        driver.ask(limit_s=120.0, saturate=2 * MAX_BATCH)
        yield driver


def _in_time(driver: Driver, rate: float, seconds: float, seed: int, target_ms: float) -> list[bool]:
    """Of each request, in order of arrival, whether it was answered in time."""
    answer = driver.ask(limit_s=seconds + 240.0, kind="poisson", rate=rate, seconds=seconds, seed=seed)
    return [latency_ms <= target_ms for latency_ms in answer["latencies_ms"]]


def _by_hand(session: Session, folder: Path, size: int, rate: float, target_ms: float) -> float:
    session.on_step(f"batches of {size}")
    config = _configuration(folder, session.redis_url, size, tuned=False, target_ms=target_ms)
    with _driven(config, folder) as driver:
        in_time = _in_time(driver, HIGH_LOAD * rate, session.plan.open_s, 5, target_ms)
    return sum(in_time) / len(in_time)


def _tuned(
    session: Session, folder: Path, rate: float, target_ms: float
) -> tuple[list[list[float]], list[TuningEvent]]:
    """Shares in time by phase and interval, and what the tuner decided."""
    config = _configuration(folder, session.redis_url, START, tuned=True, target_ms=target_ms)
    shares = []
    with control(config, folder), _driven(config, folder) as driver:
        for phase, intervals in enumerate(session.plan.tuning_intervals):
            load = rate * (HIGH_LOAD if phase == 1 else LOW_LOAD)
            session.on_step(f"tuned, {load:.0f} arrivals/s for {intervals * INTERVAL_S} s")
            in_time = _in_time(driver, load, intervals * INTERVAL_S, 6 + phase, target_ms)
            each = len(in_time) // intervals
            shares.append([sum(in_time[at * each : (at + 1) * each]) / each for at in range(intervals)])
        with redis.Redis.from_url(session.redis_url) as client:
            events = TuningStore(Store(client)).history()
    return shares, events


def _steps(plan: Plan) -> int:
    return 1 + len(SIZES) + len(plan.tuning_intervals)


MEASUREMENT = Measurement(
    title="The automatic tuner",
    how=f"MiniLM, Poisson arrivals at {LOW_LOAD:.0%} of saturation, then at {HIGH_LOAD:.0%}, then as before. The tuner "
    f"starts with batches of {START}, which is too little for the second load, and decides every {INTERVAL_S} s. Every "
    f"batch size is tried by hand under the second load. In time is what is answered within {OBJECTIVE_BATCHES} times "
    "what a full batch takes.",
    steps=_steps,
    measure=measure,
)
