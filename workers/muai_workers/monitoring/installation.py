"""What is true of an installation as a whole and no process of it counts: read from broker and state store."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import redis
from amqp.exceptions import AMQPError
from kombu.exceptions import OperationalError

from muai_batching.transport.monitor import lease_table
from muai_config.engines import ALL_ENGINES
from muai_producers.connections import state_client
from muai_producers.dead_letters import DeadLetters
from muai_producers.fleet import Fleet, FleetView, GpuRecord
from muai_producers.monitoring import instruments
from muai_producers.monitoring.instruments import OTHER
from muai_producers.monitoring.recorder import Gathered, Reading, Series
from muai_producers.monitoring.shared import SharedMetrics, Totals, degraded_parts
from muai_producers.queue_depths import priority_of, queue_reader
from muai_producers.runtime_config.live import LiveSettings
from muai_producers.runtime_config.looking import Looker
from muai_producers.runtime_config.versions import ConfigVersions
from muai_producers.store import Store
from muai_workers.monitoring.machine import GpuReading, gpu_readings

if TYPE_CHECKING:
    from muai_config import Settings

MAX_TENANTS = 100
"""With requests in flight; those with fewest are told as one."""
BROKER_ERRORS = (redis.RedisError, OperationalError, AMQPError, OSError)


@dataclass(frozen=True)
class Picture:
    """An installation's metrics at one moment."""

    taken_s: float
    """Wall-clock seconds since the epoch."""
    sums: Gathered = field(default_factory=Gathered)
    gauges: dict[Series, float] = field(default_factory=dict)


class Installation:
    """Looks at an installation. What does not answer is told as such, and the rest of the picture is there."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._live = LiveSettings(settings)
        self._client: Any = state_client(settings.queue.state_url, timeout_s=2.0)
        self._store = Store(self._client, prefix=settings.queue.key_prefix)
        self._fleet = Fleet(self._store)
        self._shared = SharedMetrics(self._store)
        self._looker = Looker(self._live, ConfigVersions(self._store))
        self._dead_letters = DeadLetters(self._store)
        self._queues: Any = None

    def look(self) -> Picture:
        """The installation now."""
        now_s = time.time()
        gauges: dict[Series, float] = {}
        try:
            totals = self._shared.read()
            self._add(gauges, self._from_store(totals.sums))
            is_up = True
        except redis.RedisError:
            totals, gauges, is_up = Totals(), {}, False
        merged = totals.gauges() | gauges
        self._add(merged, self._from_processes(totals))
        self._add(merged, [(instruments.STORE_UP, (), float(is_up)), *self._from_broker(now_s)])
        return Picture(now_s, totals.sums, merged)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        if self._queues is not None:
            self._queues.close()

    @staticmethod
    def _add(gauges: dict[Series, float], readings: list[Reading] | Iterator[Reading]) -> None:
        for instrument, labels, value in readings:
            gauges[instrument.name, labels] = value

    def _from_processes(self, totals: Totals) -> Iterator[Reading]:
        for role, count in Counter(process.role for process in totals.processes).items():
            yield instruments.PROCESSES, (role,), float(count)
        for part in degraded_parts(totals.processes):
            yield instruments.DEGRADED, (part,), 1.0

    def _from_store(self, sums: Gathered) -> list[Reading]:
        self._looker.look_now_and_then()
        keys, settings = self._store.keys, self._live.current
        pipe = self._client.pipeline(transaction=False)
        pipe.hlen(keys.inflight).hgetall(keys.stats).hgetall(keys.load)
        in_flight, stats, load = pipe.execute()
        for instrument, name in ((instruments.ANSWERED, b"answered"), (instruments.DUPLICATES, b"duplicates_refused")):
            sums.counters[instrument.name, ()] = float(stats.get(name, 0))
        readings: list[Reading] = [
            (instruments.IN_FLIGHT, (), float(in_flight)),
            (instruments.CAPACITY, (), float(settings.monitoring.server.queue_capacity)),
            (instruments.DEAD_LETTERS, (), float(len(self._dead_letters))),
            *fleet_readings(self._fleet.view(ALL_ENGINES), settings),
        ]
        by_tenant = {name[2:].decode(): float(count) for name, count in load.items() if name.startswith(b"t:")}
        return readings + [
            (instruments.TENANT_IN_FLIGHT, (tenant,), count) for tenant, count in most(by_tenant, MAX_TENANTS).items()
        ]

    def _from_broker(self, now_s: float) -> list[Reading]:
        readings: list[Reading] = []
        try:
            # Connected when it is looked at: a broker that is away must not keep the page from being served.
            self._queues = self._queues or queue_reader(self._settings)
            for queue, depth in self._queues.depths().items():
                readings.append((instruments.QUEUE_DEPTH, (queue, priority_of(queue)), float(depth)))
            for queue, submitted_s in self._queues.oldest_submitted_s().items():
                readings.append((instruments.OLDEST_AGE, (queue,), max(0.0, now_s - submitted_s)))
            readings += self._leases()
        except BROKER_ERRORS:
            if self._queues is not None:
                self._queues.close()
            self._queues = None
            return [(instruments.BROKER_UP, (), 0.0)]
        return [*readings, (instruments.BROKER_UP, (), 1.0)]

    def _leases(self) -> list[Reading]:
        if not self._settings.queue.broker_is_redis:
            return []
        client = state_client(self._settings.queue.broker_url, timeout_s=2.0)
        try:
            leases = [lease for lease in lease_table(client, self._settings.queue.key_prefix) if lease.beats >= 0]
        finally:
            client.close()
        return [
            (instruments.LEASES, (), float(len(leases))),
            (instruments.LEASED, (), float(sum(lease.num_claims for lease in leases))),
        ]


def fleet_readings(view: FleetView, settings: Settings) -> Iterator[Reading]:
    """The fleet as gauges: also what it has none of, so that a panel shows nought rather than nothing."""
    engines: set[str] = {engine for spec in settings.models.values() for engine in settings.chain(spec)}
    engines |= {worker.engine for worker in view.workers}
    for engine in sorted(engines):
        yield instruments.WORKERS, (engine,), float(sum(worker.engine == engine for worker in view.workers))
        yield instruments.SLOTS, (engine,), float(view.slots(engine))
        yield instruments.OUTSTANDING, (engine,), float(view.outstanding.get(engine, 0))
    yield instruments.COLLECTORS, (), float(len(view.collectors))
    for name, spec in settings.models.items():
        for engine in settings.chain(spec):
            yield instruments.CIRCUIT_OPEN, (engine, name), float((engine, name) in view.cooling)
    loaded = Counter((model, worker.engine) for worker in view.workers for model in worker.models_loaded)
    for labels, count in loaded.items():
        yield instruments.MODELS_LOADED, labels, float(count)
        model, engine = labels
        taken = sum(worker.model_bytes.get(model, 0) for worker in view.workers if worker.engine == engine)
        yield instruments.MODEL_MEMORY, labels, float(taken)
    for gpu in view.gpus:
        yield from _watched_gpu(gpu)


def _watched_gpu(gpu: GpuRecord) -> Iterator[Reading]:
    share = None if gpu.utilization_percent is None else gpu.utilization_percent / 100
    reading = GpuReading(
        gpu_id=gpu.index,
        memory_used_bytes=gpu.memory_used_bytes,
        memory_total_bytes=gpu.memory_total_bytes,
        utilization=share,
        temperature_c=gpu.temperature_c,
        power_w=gpu.power_w,
    )
    yield from gpu_readings(reading, gpu.host)
    yield instruments.GPU_STATE, (gpu.index, gpu.host, gpu.state), 1.0


def most(counts: dict[str, float], limit: int) -> dict[str, float]:
    """The `limit` highest counts, and the others as one."""
    if len(counts) <= limit:
        return counts
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return dict(ranked[:limit]) | {OTHER: sum(count for _, count in ranked[limit:])}
