"""A million requests queued: whether the collector's memory stays flat."""

from __future__ import annotations

import time

import psutil
import redis

from benchmarks.figures.base import Measured, Measurement
from benchmarks.muai_side import collector, write_configuration
from benchmarks.plan import Plan
from benchmarks.results import Goal, Row
from benchmarks.session import Session, metric
from muai_config import load_settings
from muai_producers import InferenceClient

CHUNKS = 50
FLAT = 1.15
"""Most by which the memory may exceed that when the buffer has just been filled."""
SETTLE_S = 5.0


def measure(session: Session) -> Measured:
    """Submit in chunks while the collector runs and no engine serves; look at its memory after each chunk."""
    plan = session.plan
    with session.logs("memory") as folder:
        config = write_configuration(folder, session.fresh())
        settings = load_settings(config)
        queued: list[float] = []
        resident_mb: list[float] = []
        redis_mb: list[float] = []
        with (
            InferenceClient(settings) as client,
            redis.Redis.from_url(session.redis_url) as state,
            collector(config, folder) as pid,
        ):
            process = psutil.Process(pid)

            def look(count: int) -> None:
                queued.append(float(count))
                resident_mb.append(round(process.memory_info().rss / 2**20, 1))
                redis_mb.append(round(state.info("memory")["used_memory"] / 2**20, 1))

            time.sleep(SETTLE_S)
            look(0)
            started_s = time.perf_counter()
            size = plan.queued // CHUNKS
            for chunk in range(CHUNKS):
                session.on_step(f"{chunk * size} of {plan.queued} queued, collector {resident_mb[-1]:.0f} MiB")
                client.submit_many({"model": "noop", "inputs": f"hello there {number}"} for number in range(size))
                look((chunk + 1) * size)
            submit_s = time.perf_counter() - started_s
            time.sleep(SETTLE_S)
            look(plan.queued)
        session.fresh()
    buffer = settings.optimization.batcher.buffer_requests
    full = next(at for at, count in enumerate(queued) if count >= 2 * buffer)
    growth = max(resident_mb[full:]) / resident_mb[full]
    row = Row(
        name="MuAI collector",
        settings=f"defaults: buffer of {buffer} requests; no engine worker",
        metrics={
            "queued": metric("requests", [float(plan.queued)]),
            "memory at the start": metric("MiB", resident_mb[:1]),
            "most memory": metric("MiB", [max(resident_mb)]),
            "growth once the buffer is full": metric("", [growth]),
            "Redis memory": metric("MiB", [max(redis_mb)]),
            "submitted": metric("requests/s", [plan.queued / submit_s]),
        },
    )
    goal = Goal(text="most memory, over that when twice the buffer was queued", value=growth, goal=FLAT, at_most=True)
    series = {"queued": tuple(queued), "collector MiB": tuple(resident_mb), "Redis MiB": tuple(redis_mb)}
    return Measured([row], [goal], series)


def _steps(plan: Plan) -> int:
    return CHUNKS


MEASUREMENT = Measurement(
    title="A million requests queued: the collector's memory",
    how="Requests are submitted while a collector runs and no engine worker does, so all of them stay queued; the "
    "collector holds what its buffer takes, the rest stays in Redis.",
    steps=_steps,
    measure=measure,
)
