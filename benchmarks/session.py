"""What every figure is given: the plan, a Redis of its own, a folder for logs, and a way to say how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plan import Plan
from benchmarks.processes import BenchmarkError, Driver, flush
from benchmarks.results import Metric, Row, percentile

WARM_UP = 500


@dataclass
class Session:
    """One run of the suite.

    Args:
        on_step: told what is being measured now.
        on_skip: told whom a failure left out, and why.
    """

    plan: Plan
    redis_url: str
    folder: Path
    on_step: Callable[[str], None]
    on_skip: Callable[[str, str], None]

    def fresh(self) -> str:
        """The Redis, emptied."""
        flush(self.redis_url)
        return self.redis_url

    def attempt(self, name: str, settings: str, measure: Callable[[], Row]) -> Row:
        """Measure a peer; one that cannot be measured becomes a row that says why."""
        try:
            return measure()
        except BenchmarkError as error:
            self.on_skip(name, str(error))
            return Row(name=name, settings=settings, skipped=error.reason)

    @contextmanager
    def logs(self, name: str) -> Iterator[Path]:
        """A folder for one contestant's logs."""
        folder = self.folder / name.replace(" ", "-").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def fitted_count(driver: Driver, model: str, seconds: float, most: int, least: int = WARM_UP) -> int:
    """How many requests take the driver about `seconds` in one bulk; the trial, of `least`, also warms it up."""
    trial: float = driver.ask(do="bulk", model=model, count=least, seed=0)["seconds"]
    return max(least, min(most, 100 * round(least / trial * seconds / 100)))


def bulk_rate(driver: Driver, model: str, count: int, seed: int) -> float:
    """Requests per second, from the first submission to the last result."""
    seconds: float = driver.ask(do="bulk", model=model, count=count, seed=seed)["seconds"]
    return count / seconds


def idle_latency(driver: Driver, model: str, count: int, seed: int) -> tuple[float, float]:
    """p50 and p99, in milliseconds, of requests sent one at a time."""
    latencies: list[float] = driver.ask(do="idle", model=model, count=count, seed=seed)["latencies_ms"]
    return percentile(latencies, 50), percentile(latencies, 99)


def metric(unit: str, values: list[float]) -> Metric:
    return Metric(unit, tuple(round(value, 4) for value in values))
