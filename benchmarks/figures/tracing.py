"""What traces cost: the queue alone, with tracing off, on, and on without a collector that takes the traces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import served
from benchmarks.plan import Plan
from benchmarks.processes import Driver, free_port
from benchmarks.results import Row
from benchmarks.session import Session
from benchmarks.turns import HOW, SHARE, goal, shares, taken_in_turns

KEPT = 0.95
"""Least throughput, of that without traces."""
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
    base = session.fresh().rpartition("/")[0]
    with ExitStack() as kept:
        drivers: dict[str, Driver] = {}
        for number, (name, tracing) in enumerate(_settings(kept.enter_context(_collector())).items()):
            folder = kept.enter_context(session.logs(f"tracing {number}"))
            stack = served(folder, f"{base}/{number}", "noop", tracing=tracing, prefix=f"muai{number}")
            drivers[name] = kept.enter_context(stack)
        metrics = shares(taken_in_turns(session, drivers), OFF)
        versions = dict(drivers[OFF].versions)
    rows = [
        Row(name=f"MuAI, tracing {name}", settings=name, versions=versions, metrics=measured)
        for name, measured in metrics.items()
    ]
    goals = [
        goal(f"throughput with tracing {name}, over tracing off", metrics[name][SHARE], KEPT) for name in (ON, DOWN)
    ]
    return Measured(rows, goals)


def _steps(plan: Plan) -> int:
    return plan.turns


MEASUREMENT = Measurement(
    title="What traces cost",
    how="The queue alone, a model that does nothing, in bulk: the hardest case, for nothing else takes any time. "
    f"{HOW} By default a process begins at most 20 traces a second.",
    steps=_steps,
    measure=measure,
)
