"""Who works: engine workers and collectors announce themselves in the state store, others read it.

An announcement lasts `ALIVE_S` and is renewed three times in that time, so a dead worker is gone from the picture
within seconds. The picture only steers; a stale one costs time, never a request.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from muai_producers.store import Store

ALIVE_S = 6.0
ANNOUNCE_EVERY_S = 2.0
MAX_FORMING = 32
"""Bounds what a collector announces each second."""
COLLECTOR = "collector/"
"""Keeps a collector's sign of life apart from that of a worker of the same name."""
GPUS_KEPT_S = 3600.0
"""How long a GPU that nobody watches any more is told of as unseen."""
GpuState = Literal["ok", "degraded", "failed", "unseen"]


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine worker says of itself."""

    name: str
    engine: str
    slots: int
    """Batches that it runs at once."""
    ahead: int = 1
    """Batches that it holds ready for each slot."""
    pid: int = 0
    host: str = ""
    gpu: str = ""
    """The GPUs that it is pinned to, as in CUDA_VISIBLE_DEVICES; '' for none."""
    models_loaded: tuple[str, ...] = ()
    device: str = ""
    started_at: float = 0.0
    """Wall-clock seconds since the epoch."""
    in_flight: int = 0
    """Requests that are in its engine."""
    progress: int = 0
    """Answers and pieces of answers that its engine has given since it started."""
    models_loading: tuple[str, ...] = ()
    """What it is loading now."""
    model_bytes: dict[str, int] = {}
    """What each model takes of the worker's memory."""
    queue: str = ""
    """Its own queue, for the conversations that it keeps; '' where it keeps none."""


class Forming(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Requests of one batch key that wait at a collector for their batch."""

    model: str
    task: str
    engine: str = ""
    """The engine that their batch would go to now; '' while none can take it."""
    waiting: int
    waiting_high: int = 0
    """Of those, the ones of priority 7 to 9."""
    waiting_low: int = 0
    """Of those, the ones of priority 0 to 2."""
    max_size: int = 0
    """Requests that a batch of theirs holds at most."""
    oldest_at: float = 0.0
    """When the longest waiting one came to the collector; wall-clock seconds since the epoch."""


class GpuRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One GPU as whoever starts its worker last read it: what metrics, health and the console show.

    `muai worker --gpus …` watches the GPUs of the workers that it starts and writes a record of each, about once every
    two seconds, into the hash `{prefix}:gpus`, field `host/uuid/worker`. Read them with `Fleet.gpus()` or
    `FleetView.gpus`, which make one of those of a GPU that several workers have.
    A figure that the device does not give is None.
    """

    host: str
    index: str
    """As `--gpus` and CUDA_VISIBLE_DEVICES name it, in the order of PCI addresses."""
    uuid: str
    name: str = ""
    """The model, such as `NVIDIA H100 80GB HBM3`."""
    worker: str = ""
    """The engine worker that has it, by its name in the fleet."""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization_percent: float | None = None
    """Share of the last second or so in which it computed, 0 to 100."""
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    ecc_uncorrected: int | None = None
    """Memory errors that could not be corrected, since the driver was loaded."""
    last_xid: int | None = None
    """Number of the last error that the driver reported since the watch began, application errors included."""
    state: GpuState = "ok"
    """degraded: it works, and an operator should know; failed: its worker was stopped and its work is done elsewhere;
    unseen: nobody can say, for the driver does not answer or its watch is gone.
    """
    reason: str = ""
    """Why the state is not ok, for people."""
    read_at: float = 0.0
    """When the figures were read; wall-clock seconds since the epoch."""
    written_at: float = 0.0
    """When the watch last wrote the record; wall-clock seconds since the epoch."""


class CollectorRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a collector says of itself."""

    name: str
    pid: int = 0
    host: str = ""
    started_at: float = 0.0
    """Wall-clock seconds since the epoch."""
    waiting: int = 0
    """Requests that it holds."""
    num_keys: int = 0
    """Batch keys that they are of."""
    forming: tuple[Forming, ...] = ()
    """The batch keys with the longest waiting requests, `MAX_FORMING` at most."""

    @property
    def process(self) -> str:
        """Its name among the processes that the runtime configuration knows."""
        return collector_process(self.name)


def collector_process(name: str) -> str:
    """The name by which a collector says what configuration it applies."""
    return f"{name} (collector)"


_GRAVITY: Mapping[GpuState, int] = {"unseen": 0, "ok": 1, "degraded": 2, "failed": 3}
Record = TypeVar("Record", WorkerRecord, CollectorRecord)


@dataclass(frozen=True)
class FleetView:
    """The fleet as last seen."""

    workers: tuple[WorkerRecord, ...] = ()
    cooling: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Engine and model that failed lately, with the reason."""
    outstanding: Mapping[str, int] = field(default_factory=dict)
    """Batches sent to each engine and not finished."""
    collectors: tuple[CollectorRecord, ...] = ()
    cooling_until: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """When each of `cooling` is tried again; wall-clock seconds since the epoch."""
    gpus: tuple[GpuRecord, ...] = ()
    """Every GPU that is watched, or was lately; ordered by host and index."""

    own_queues: Mapping[str, str] = field(default_factory=dict)
    """Every worker's own queue that has not been closed, those of dead workers too, with its engine."""
    own_outstanding: Mapping[str, int] = field(default_factory=dict)
    """Batches sent to each own queue and not finished."""

    def slots(self, engine: str) -> int:
        """Batches that the engine's live workers run at once."""
        return sum(worker.slots for worker in self.workers if worker.engine == engine)

    def capacity(self, engine: str) -> int:
        """Batches that the engine's live workers run or hold ready."""
        return sum(worker.slots * (1 + worker.ahead) for worker in self.workers if worker.engine == engine)


@dataclass(frozen=True)
class BatchDone:
    """A batch has left an engine's slot."""

    engine: str
    outstanding: int
    """Batches that the engine still has, running or waiting."""
    took_s: float = 0.0
    size: int = 0
    """Requests that it ran; 0 when it did not run."""
    model: str = ""

    @classmethod
    def from_notice(cls, notice: str) -> BatchDone | None:
        """Read a notice of the fleet channel; None when it is of another kind."""
        kind, *fields = notice.split("\t")
        if kind != "done":
            return None
        engine, outstanding, took_s, size, model = fields
        return cls(engine, int(outstanding), float(took_s), int(size), model)

    def to_notice(self) -> str:
        """Inverse of `from_notice`. The store's script for the end of a batch writes the same."""
        return "\t".join(("done", self.engine, str(self.outstanding), str(self.took_s), str(self.size), self.model))


@dataclass(frozen=True)
class OwnBatchDone:
    """A batch that was sent to a worker's own queue has ended."""

    queue: str
    outstanding: int


@dataclass(frozen=True)
class TurnsEnded:
    """Conversations of which a turn has ended, and another waits."""

    conversations: tuple[str, ...]


Notice = BatchDone | OwnBatchDone | TurnsEnded


def read_notice(notice: str) -> Notice | None:
    """A notice of the fleet channel that says what has changed; None for one that calls for a look at the whole."""
    kind, *fields = notice.split("\t")
    if kind == "own":
        return OwnBatchDone(fields[0], int(fields[1]))
    return TurnsEnded(tuple(fields)) if kind == "turns" else BatchDone.from_notice(notice)


class Fleet:
    """Reads and writes the announcements.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._client: Any = store.client
        self._keys = store.keys

    def announce(self, record: WorkerRecord, *, is_news: bool = False) -> bool:
        """Say that a worker lives; `is_news` tells the collectors at once.

        Returns:
            whether its own queue, where it has one, was known: False for the first time, and after it was closed
            because the worker was taken for dead.
        """
        pipe = self._client.pipeline(transaction=False)
        if record.queue:
            pipe.hset(self._keys.own_queues, record.queue, record.engine)
        pipe.hset(self._keys.workers, record.name, msgspec.json.encode(record))
        pipe.set(self._alive(record.name), 1, px=int(ALIVE_S * 1000))
        if is_news:
            pipe.publish(self._keys.fleet_channel, "workers")
        replies = pipe.execute()
        return not (record.queue and replies[0])

    def forget_own_queue(self, queue: str) -> None:
        """It is closed: nothing is in it, and nothing is sent to it any more."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hdel(self._keys.own_queues, queue)
        pipe.delete(self._keys.outstanding(queue))
        pipe.execute()

    def withdraw(self, name: str) -> None:
        """Say that a worker is going: nothing new is sent on its account."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hdel(self._keys.workers, name)
        pipe.delete(self._alive(name))
        pipe.publish(self._keys.fleet_channel, "workers")
        pipe.execute()

    def announce_collector(self, record: CollectorRecord) -> None:
        """Say that a collector lives."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hset(self._keys.collectors, record.name, msgspec.json.encode(record))
        pipe.set(self._alive(COLLECTOR + record.name), 1, px=int(ALIVE_S * 1000))
        pipe.execute()

    def withdraw_collector(self, name: str) -> None:
        """Say that a collector is going."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hdel(self._keys.collectors, name)
        pipe.delete(self._alive(COLLECTOR + name))
        pipe.execute()

    def announce_gpus(self, records: Sequence[GpuRecord]) -> None:
        """Write how GPUs are doing."""
        fields = {_gpu_field(record): msgspec.json.encode(record) for record in records}
        if fields:
            self._client.hset(self._keys.gpus, mapping=fields)

    def withdraw_gpus(self, records: Sequence[GpuRecord]) -> None:
        """Say that nobody watches these any more, because their workers were ended on purpose."""
        if records:
            self._client.hdel(self._keys.gpus, *map(_gpu_field, records))

    def gpus(self) -> tuple[GpuRecord, ...]:
        """Every GPU that is watched; one whose watch died is `unseen`, and forgotten after `GPUS_KEPT_S`."""
        return self._gpus_of(self._client.hgetall(self._keys.gpus), time.time())

    def _gpus_of(self, written: dict[bytes, bytes], now_s: float) -> tuple[GpuRecord, ...]:
        records, old = [], []
        for field_name, raw in written.items():
            record = as_seen(msgspec.json.decode(raw, type=GpuRecord), now_s)
            if now_s - record.written_at > GPUS_KEPT_S:
                old.append(field_name)
            else:
                records.append(record)
        if old:
            self._client.hdel(self._keys.gpus, *old)
        by_gpu: dict[tuple[str, str], list[GpuRecord]] = {}
        for record in records:
            by_gpu.setdefault((record.host, record.uuid), []).append(record)
        one_each = [of_one_gpu(told) for told in by_gpu.values()]
        return tuple(sorted(one_each, key=lambda record: (record.host, record.index.zfill(4), record.uuid)))

    def cool_down(self, engine: str, model: str, reason: str, seconds: float) -> None:
        """Pass the engine over for the model for a while."""
        if seconds <= 0:
            return
        entry = msgspec.json.encode({"until": time.time() + seconds, "reason": reason[:300]})
        self._client.hset(self._keys.circuits, f"{engine}\t{model}", entry)
        self._client.publish(self._keys.fleet_channel, "workers")

    def recovered(self, engine: str, model: str) -> None:
        """The engine serves the model again."""
        self._client.hdel(self._keys.circuits, f"{engine}\t{model}")

    def view(self, engines: Sequence[str]) -> FleetView:
        """The fleet now, with the outstanding batches of `engines`. Forgets workers that are gone."""
        pipe = self._client.pipeline(transaction=False)
        pipe.hgetall(self._keys.workers)
        pipe.hgetall(self._keys.collectors)
        pipe.hgetall(self._keys.circuits)
        pipe.hgetall(self._keys.gpus)
        pipe.hgetall(self._keys.own_queues)
        for engine in engines:
            pipe.zcard(self._keys.outstanding(engine))
        workers, collectors, circuits, gpus, own, *outstanding = pipe.execute()
        cooling = self._cooling(circuits)
        own_queues = {queue.decode(): engine.decode() for queue, engine in own.items()}
        return FleetView(
            workers=self._alive_ones(self._keys.workers, "", _decoded(workers, WorkerRecord)),
            collectors=self._alive_ones(self._keys.collectors, COLLECTOR, _decoded(collectors, CollectorRecord)),
            cooling={key: reason for key, (_, reason) in cooling.items()},
            cooling_until={key: until for key, (until, _) in cooling.items()},
            outstanding=dict(zip(engines, outstanding, strict=True)),
            gpus=self._gpus_of(gpus, time.time()),
            own_queues=own_queues,
            own_outstanding=self._own_outstanding(own_queues),
        )

    def _own_outstanding(self, queues: Collection[str]) -> dict[str, int]:
        if not queues:
            return {}
        pipe = self._client.pipeline(transaction=False)
        for queue in queues:
            pipe.zcard(self._keys.outstanding(queue))
        return dict(zip(queues, pipe.execute(), strict=True))

    def _alive_ones(self, key: str, kind: str, records: list[Record]) -> tuple[Record, ...]:
        if not records:
            return ()
        flags = self._client.mget([self._alive(kind + record.name) for record in records])
        dead = [record.name for record, flag in zip(records, flags, strict=True) if flag is None]
        if dead:
            self._client.hdel(key, *dead)
        return tuple(record for record, flag in zip(records, flags, strict=True) if flag is not None)

    def _cooling(self, circuits: dict[bytes, bytes]) -> dict[tuple[str, str], tuple[float, str]]:
        """Until when each engine and model is passed over, and why."""
        cooling, over, now_s = {}, [], time.time()
        for name, raw in circuits.items():
            entry = msgspec.json.decode(raw)
            engine, model = name.decode().split("\t", 1)
            if entry["until"] > now_s:
                cooling[engine, model] = (float(entry["until"]), str(entry["reason"]))
            else:
                over.append(name)
        if over:
            self._client.hdel(self._keys.circuits, *over)
        return cooling

    def _alive(self, name: str) -> str:
        return f"{self._keys.prefix}:alive:{name}"


def _decoded(announced: dict[bytes, bytes], kind: type[Record]) -> list[Record]:
    return [msgspec.json.decode(raw, type=kind) for raw in announced.values()]


def _gpu_field(record: GpuRecord) -> str:
    return f"{record.host}/{record.uuid}/{record.worker}"


def of_one_gpu(told: Sequence[GpuRecord]) -> GpuRecord:
    """What several watches tell of one GPU, which their workers share, as one record: the worst that any of them sees.
    Where one sees it, it is seen.
    """
    latest = max(told, key=lambda record: record.read_at)
    worst = max(told, key=lambda record: (_GRAVITY[record.state], record.written_at))
    workers = sorted({record.worker for record in told if record.worker})
    return msgspec.structs.replace(latest, state=worst.state, reason=worst.reason, worker=", ".join(workers))


def as_seen(record: GpuRecord, now_s: float) -> GpuRecord:
    """The record as it is worth now: `unseen` once its watch has written nothing for `ALIVE_S` and more.

    A GPU that had failed stays failed: that nobody looks at it makes it no better.
    """
    silent_s = now_s - record.written_at
    if silent_s <= 2 * ALIVE_S or record.state == "failed":
        return record
    return msgspec.structs.replace(record, state="unseen", reason=f"its watch has been silent for {silent_s:.0f} s")
