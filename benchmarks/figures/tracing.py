"""What traces cost: the queue alone, with tracing off, on, and on without a collector that takes the traces."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import served
from benchmarks.plan import Plan
from benchmarks.processes import Driver, free_port
from benchmarks.results import Goal, Row
from benchmarks.session import Session, bulk_rate, fitted_count, metric

OFF, ON, DOWN, ALL = "off", "on, as by default", "on, the collector is down", "on, every request traced"


class _Taking(TraceServiceServicer):
    """Takes every export and keeps nothing."""

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        return ExportTraceServiceResponse()


@contextmanager
def _collector() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(_Taking(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def _settings(endpoint: str) -> dict[str, Mapping[str, Any] | None]:
    return {
        OFF: None,
        ON: {"endpoint": endpoint},
        DOWN: {"endpoint": f"http://127.0.0.1:{free_port()}"},
        ALL: {"endpoint": endpoint, "max_traces_per_s": 0},
    }


def measure(session: Session) -> Measured:
    """All of them stand side by side, each on a database of its own, and take turns: a pair is taken within seconds."""
    plan = session.plan
    base = session.fresh().rpartition("/")[0]
    with ExitStack() as kept:
        drivers: dict[str, Driver] = {}
        for number, (name, tracing) in enumerate(_settings(kept.enter_context(_collector())).items()):
            folder = kept.enter_context(session.logs(f"tracing {number}"))
            stack = served(folder, f"{base}/{number}", "noop", tracing=tracing, prefix=f"muai{number}")
            drivers[name] = kept.enter_context(stack)
        counts = {name: fitted_count(driver, "noop", plan.bulk_s, plan.max_bulk) for name, driver in drivers.items()}
        count = min(counts.values())
        rates: dict[str, list[float]] = {name: [] for name in drivers}
        for repeat in range(plan.repeats):
            for name, driver in drivers.items():
                session.on_step(f"tracing {name}: {count} in bulk, {repeat + 1} of {plan.repeats}")
                rates[name].append(bulk_rate(driver, "noop", count, repeat))
        versions = drivers[OFF].versions
    rows = [_row(name, rates, versions) for name in rates]
    return Measured(rows, [_goal(name, rates) for name in (ON, DOWN)])


def _row(name: str, rates: Mapping[str, list[float]], versions: Mapping[str, str]) -> Row:
    row = Row(name=f"MuAI, tracing {name}", settings=name)
    shares = [one / off for one, off in zip(rates[name], rates[OFF], strict=True)]
    metrics = {"in bulk": metric("requests/s", rates[name]), "of tracing off": metric("ratio", shares)}
    return msgspec.structs.replace(row, versions=dict(versions), metrics=metrics)


def _goal(name: str, rates: Mapping[str, list[float]]) -> Goal:
    shares = [one / off for one, off in zip(rates[name], rates[OFF], strict=True)]
    return Goal(text=f"throughput with tracing {name}, over tracing off", value=statistics.median(shares), goal=0.95)


def _steps(plan: Plan) -> int:
    return 4 * plan.repeats


MEASUREMENT = Measurement(
    title="What traces cost",
    how="The queue alone, a model that does nothing, in bulk: the hardest case, for nothing else takes any time. Four "
    "installations side by side take turns. By default a process begins at most 100 traces a second.",
    steps=_steps,
    measure=measure,
)
