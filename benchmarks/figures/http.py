"""Submit and wait over HTTP: a model that does nothing, 64 connections."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from benchmarks.contestants import RAY_SERVE, READY_S, SERVERS, HttpPeer, answers, http_driver
from benchmarks.environments import PEERS, pinned
from benchmarks.figures.base import Measured, Measurement
from benchmarks.machine import package_versions
from benchmarks.muai_side import collector, engine_worker, gateway, gateway_is_here, write_configuration
from benchmarks.plan import Plan
from benchmarks.processes import BenchmarkError, wait_for
from benchmarks.results import Goal, Metric, Row, ratio_goal
from benchmarks.session import Session, bulk_rate, fitted_count, metric

OURS = "MuAI"
PEER_SERVERS = (*SERVERS, RAY_SERVE)
CONNECTIONS = 64
BATCH = 64
GATEWAY_PATH = "/v1/inference?wait=60"
GATEWAY_BODY = '{"model": "noop", "inputs": %s}'
GATEWAY_PACKAGES = ("fastapi", "uvicorn", "celery", "redis")
Start = Callable[[Path], AbstractContextManager[str]]


def measure(session: Session) -> Measured:
    """The gateway, then each model server."""
    if gateway_is_here():
        row = Row(name=OURS, settings="one gateway, defaults", versions=package_versions(*GATEWAY_PACKAGES))
        row = _contest(session, row, lambda folder: _gateway(session, folder), GATEWAY_BODY)
    else:
        row = Row(name=OURS, skipped="the gateway, or what it needs, is not installed")
    rows = [row]
    for server in PEER_SERVERS:
        versions = pinned(server.environment, server.packages)
        row = Row(name=server.name, settings=server.settings(BATCH), versions=versions)

        def contest(row: Row = row, server: HttpPeer = server) -> Row:
            return _contest(session, row, lambda folder: server.served(folder, "noop", BATCH), server.body)

        rows.append(session.attempt(row.name, row.settings, contest))
    ours = rows[0].metrics
    goals = [Goal(text="requests/s over HTTP", value=ours["throughput"].median, goal=2500.0)] if ours else []
    by_name = {row.name: row for row in rows}
    goals += ratio_goal(by_name, "throughput", OURS, SERVERS[0].name, 1.0)
    return Measured(rows, goals)


@contextmanager
def _gateway(session: Session, folder: Path) -> Iterator[str]:
    config = write_configuration(folder, session.fresh())
    with ExitStack() as stack:
        stack.enter_context(collector(config, folder))
        stack.enter_context(engine_worker(config, folder, "fake"))
        url, process = stack.enter_context(gateway(config, folder))
        body, port = GATEWAY_BODY % '"ready?"', urlsplit(url).port or 80
        wait_for(lambda: answers(port, GATEWAY_PATH, body), process, folder / "gateway.log", READY_S)
        yield url + GATEWAY_PATH


def _contest(session: Session, row: Row, start: Start, body: str) -> Row:
    """`row` with its metrics."""
    load = _with_wrk if shutil.which("wrk") else _with_own_client
    with session.logs(f"http {row.name}") as folder, start(folder) as url:
        return msgspec.structs.replace(row, metrics=load(session, row.name, folder, url, body))


def _with_wrk(session: Session, name: str, folder: Path, url: str, body: str) -> dict[str, Metric]:
    """Throughput and latencies, by wrk: one thread of it takes some 5 % of what it loads."""
    _run_wrk(url, body, 1.0)
    runs = []
    for repeat in range(session.plan.repeats):
        session.on_step(f"{name}: {CONNECTIONS} connections, {repeat + 1} of {session.plan.repeats}")
        runs.append(_run_wrk(url, body, session.plan.http_s))
    return {
        "throughput": metric("requests/s", [run["requests"] / run["seconds"] for run in runs]),
        "p50": metric("ms", [run["p50_ms"] for run in runs]),
        "p99": metric("ms", [run["p99_ms"] for run in runs]),
    }


def _run_wrk(url: str, body: str, seconds: float) -> dict[str, float]:
    argv = ["wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--timeout", "30s"]
    argv += ["--duration", f"{max(1, round(seconds))}s", "--script", str(PEERS / "post.lua"), url]
    env = {**os.environ, "BENCH_BODY": body % '"hello there"'}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=seconds + 60, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise BenchmarkError(f"wrk: {done.stderr or done.stdout}")
    run: dict[str, float] = json.loads(lines[-1])
    if run["failed"]:
        raise BenchmarkError(f"{run['failed']} of {run['requests']} requests to {url} failed")
    return run


def _with_own_client(session: Session, name: str, folder: Path, url: str, body: str) -> dict[str, Metric]:
    """Throughput alone, by a client in Python, which beyond some 8,000 requests/s is the bottleneck itself."""
    rates = []
    with http_driver(folder, url, body, CONNECTIONS) as driver:
        count = fitted_count(driver, "noop", session.plan.http_s, session.plan.max_bulk)
        for repeat in range(session.plan.repeats):
            session.on_step(f"{name}: {count} requests, {repeat + 1} of {session.plan.repeats}")
            rates.append(bulk_rate(driver, "noop", count, repeat))
    return {"throughput": metric("requests/s", rates)}


def _steps(plan: Plan) -> int:
    return (int(gateway_is_here()) + len(PEER_SERVERS)) * plan.repeats


MEASUREMENT = Measurement(
    title="Submit and wait over HTTP: a model that does nothing",
    how=f"{CONNECTIONS} keep-alive connections, each sending its next request when the last one is answered; the load "
    "generator is wrk where it is installed, else a client in Python. The model servers keep requests in memory; "
    "MuAI's pass through Redis and survive any process.",
    steps=_steps,
    measure=measure,
)
