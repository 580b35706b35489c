"""Keeping house: what a crash at the wrong instant, or an engine without workers, leaves behind.

Nothing here is needed for a request to be answered while its processes live; it repairs what is left when they die.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from celery import Celery

from muai_batching.routing import attempt, route
from muai_batching.transport.keys import StateKeys
from muai_config.engines import ALL_ENGINES
from muai_config.queues import REQUEST_QUEUES, engine_queue
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import EngineUnavailableError, MalformedMessageError
from muai_producers.fleet import BatchDone, Fleet, FleetView
from muai_producers.messages import RUN_BATCH_TASK
from muai_producers.store import META_PREFIX, Store, read_entry
from muai_producers.wire import Batch

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
GHOST_AFTER_S = 60.0
ORPHAN_AFTER_S = 300.0
MAX_MOVED_PER_RUN = 100
MAX_SHELVED_PER_RUN = 1000


@dataclass
class Reaped:
    """What one run found."""

    rerouted: int = 0
    """Batches taken from an engine without workers to the next of their chain."""
    ghosts: int = 0
    """Batches counted as outstanding that no queue and no worker has."""
    orphans: int = 0
    """Requests admitted by a producer that died before it published them."""
    undecodable: int = 0
    """Garbage found on a queue and kept as a dead letter."""


class Reaper:
    """Finds and repairs leftovers. Safe to run at any time and anywhere; `singleton` saves the work of running twice.

    Raises:
        redis.exceptions.RedisError, kombu.exceptions.OperationalError: state store or broker do not answer.
    """

    def __init__(self, app: Celery, settings: Settings, store: Store) -> None:
        self._app = app
        self._store = store
        self._client: Any = store.client
        self._fleet = Fleet(store)
        self._undecodable = StateKeys(settings.queue.key_prefix).undecodable
        self._deserted_since: dict[str, float] = {}
        self._desert_s = settings.queue.lease_ttl_s

    def run(self) -> Reaped:
        """Look once."""
        view = self._fleet.view(ALL_ENGINES)
        reaped = Reaped()
        with self._app.connection_for_write() as connection:
            channel = connection.default_channel
            depths = {queue: self._depth(connection, queue) for queue in map(engine_queue, ALL_ENGINES)}
            waiting = {engine for queue, engine in view.own_queues.items() if self._depth(connection, queue)}
            for engine in self._deserted(view, depths):
                reaped.rerouted += self._reroute(channel, engine, view)
            reaped.ghosts = sum(
                self._forget_ghosts(engine)
                for engine in ALL_ENGINES
                if not depths[engine_queue(engine)] and engine not in waiting
            )
            if not any(self._depth(connection, queue) for queue in REQUEST_QUEUES):
                reaped.orphans = self._release_orphans()
        reaped.undecodable = self._keep_undecodable()
        return reaped

    def _depth(self, connection: Any, queue: str) -> int:
        # A channel of its own: AMQP closes the channel on which a queue is missing.
        channel = connection.channel()
        try:
            return int(channel.queue_declare(queue=queue, passive=True).message_count)
        except connection.channel_errors:
            return 0
        finally:
            channel.close()

    def _deserted(self, view: FleetView, depths: dict[str, int]) -> list[str]:
        """Engines whose queue has held batches for a while, and no worker to take them."""
        now_s = time.monotonic()
        for engine in ALL_ENGINES:
            if depths[engine_queue(engine)] and not view.slots(engine):
                self._deserted_since.setdefault(engine, now_s)
            else:
                self._deserted_since.pop(engine, None)
        return [engine for engine, since_s in self._deserted_since.items() if now_s - since_s >= self._desert_s]

    def _reroute(self, channel: Any, engine: str, view: FleetView) -> int:
        moved = 0
        for _ in range(MAX_MOVED_PER_RUN):
            message = channel.basic_get(engine_queue(engine))
            if message is None:
                break
            batch = msgspec.json.decode(msgspec.json.decode(message.body)[1]["batch"], type=Batch)
            way = route(batch.chain, batch.model, view)
            if way.engine is None:
                message.requeue()  # its own engine may come back before another does
                break
            absent = self._absence(batch)
            onward = msgspec.structs.replace(
                batch,
                engine=way.engine,
                queue="",
                chain=way.rest,
                attempts=(*batch.attempts, attempt(engine, absent), *way.skipped),
            )
            self._client.zadd(self._store.keys.outstanding(onward.engine), {onward.id: time.time()})
            self._app.send_task(
                RUN_BATCH_TASK,
                kwargs={"batch": msgspec.json.encode(onward).decode()},
                task_id=onward.id,
                queue=engine_queue(onward.engine),
            )
            self._client.zrem(self._store.keys.outstanding(engine), batch.id)
            message.ack()
            moved += 1
        return moved

    def _absence(self, batch: Batch) -> EngineUnavailableError:
        begun = self._client.hexists(self._store.keys.runs, batch.id)
        because = f"its {batch.engine} worker died while it ran, and" if begun else ""
        message = f"{because} no {batch.engine} worker is running".lstrip()
        return EngineUnavailableError(message, {"engine": batch.engine})

    def _forget_ghosts(self, engine: str) -> int:
        key = self._store.keys.outstanding(engine)
        old = self._client.zrangebyscore(key, "-inf", time.time() - GHOST_AFTER_S)
        if not old:
            return 0
        running = self._client.hmget(self._store.keys.runs, old)
        ghosts = [batch_id for batch_id, runs in zip(old, running, strict=True) if runs is None]
        if ghosts:
            self._client.zrem(key, *ghosts)
            notice = BatchDone(engine, self._client.zcard(key)).to_notice()
            self._client.publish(self._store.keys.fleet_channel, notice)
        return len(ghosts)

    def _release_orphans(self) -> int:
        """Give back the capacity of requests that no queue, no collector and no worker has ever seen."""
        before_s, orphans = time.time() - ORPHAN_AFTER_S, []
        for request_id, entry in self._client.hscan_iter(self._store.keys.inflight, count=500):
            _, admitted_s = read_entry(entry)
            if admitted_s < before_s and not self._client.exists(META_PREFIX + request_id.decode()):
                orphans.append(request_id.decode())
        if orphans:
            self._store.release(orphans)
        return len(orphans)

    def _keep_undecodable(self) -> int:
        letters, kept = DeadLetters(self._store), 0
        while kept < MAX_SHELVED_PER_RUN:
            payload = self._client.lindex(self._undecodable, -1)
            if payload is None:
                break
            error = MalformedMessageError("the message on the queue is no Celery message at all")
            letters.add_message("", payload, error)
            self._client.rpop(self._undecodable)
            kept += 1
        return kept
