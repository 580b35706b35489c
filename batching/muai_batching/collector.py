"""The batch collector: takes requests in, holds them until a batch is due, sends the batch to its engine's queue.

It owns no thread and no clock of its own: a Celery worker's event loop calls `on_message`, `tick` and `on_fleet`.
What it holds is unacknowledged at the broker, so a collector that dies loses nothing.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import redis
from kombu.exceptions import OperationalError

from muai_batching.assembler import (
    HELD,
    NO_ROOM,
    Assembler,
    BatchKey,
    BatchPolicy,
    Formed,
    KeyPicture,
    Room,
    worthwhile_lookahead,
)
from muai_batching.conversing import Conversing, TurnStore
from muai_batching.dispatch import Dispatcher, Handle, Passing
from muai_batching.fair_queue import Waiting
from muai_batching.intake import Resolver, read_request
from muai_batching.latency import LatencyFits
from muai_batching.observing import CollectorMetrics
from muai_batching.occupancy import Occupancy
from muai_batching.refusing import Refusals
from muai_batching.routing import NextAttempt, route
from muai_batching.shards import Sharding
from muai_batching.tracing import CollectorTracing
from muai_producers.conversations import Conversations
from muai_producers.errors import (
    DeadlineExceededError,
    MalformedMessageError,
    MuaiError,
    PayloadTooLargeError,
    RequestCancelledError,
)
from muai_producers.fleet import (
    MAX_FORMING,
    BatchDone,
    CollectorRecord,
    FleetView,
    Forming,
    Notice,
    OwnBatchDone,
)
from muai_producers.monitoring.recorder import Recorder
from muai_producers.monitoring.recorder import recorder as own_recorder
from muai_producers.performance.recorder import NullRecorder, StatisticsRecorder
from muai_producers.store import BATCHED, RECEIVED, Store
from muai_producers.tracing import NO_TRACER, Tracer
from muai_producers.wire import Batch, InferenceRequest

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
MAX_BATCHES_PER_TICK = 64
"""Bounds how long one turn of the event loop may take."""
PRIORITY_STEPS = 9
RETRY_S = 0.5
MARKS_PER_SWEEP = 2000
"""Bounds what showing RECEIVED costs while a large backlog is worked off."""
PASS_ON_CHUNK = 256
SHOWN_FROM_S = 0.1
"""A passing state that lasts less is not written: nobody would see it, and each costs as much as the result."""


def policy_from(settings: Settings) -> BatchPolicy:
    """The batching policy that the configuration asks for."""
    batcher = settings.optimization.batcher
    return BatchPolicy(
        max_batch_size=batcher.max_batch_size,
        max_batch_tokens=batcher.max_batch_tokens,
        batch_timeout_s=batcher.batch_timeout_ms / 1000,
        min_batch_size=batcher.min_batch_size,
        adaptive=batcher.adaptive_batching,
        enabled=batcher.enabled and settings.optimization.enabled,
        max_wait_s=batcher.max_wait_ms / 1000,
        ageing_s=batcher.max_wait_ms / 1000 / PRIORITY_STEPS,
        latency_target_s=None if batcher.latency_target_ms is None else batcher.latency_target_ms / 1000,
    )


class Collector:
    """Collects requests into batches.

    Args:
        is_revoked: whether Celery's own `revoke` named this id.
        statistics: takes in what arrived, and what ended here.
        monotonic_s: for waiting times.
        wall_s: for deadlines, which travel between machines.
        tracer: told how the requests that are traced fare here.
        recorder: what the metrics are told.
        turns: keeps the order of conversations; None: the state store does.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        dispatcher: Dispatcher,
        *,
        is_revoked: Callable[[str], bool] = lambda _: False,
        statistics: StatisticsRecorder | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        tracer: Tracer = NO_TRACER,
        recorder: Recorder = own_recorder,
        turns: TurnStore | None = None,
    ) -> None:
        self.statistics = statistics or NullRecorder()
        self._metrics = CollectorMetrics(recorder, settings.models)
        self.assembler = Assembler(policy_from(settings))
        self.conversing = Conversing(settings, turns or Conversations(store), self.assembler, self._metrics)
        self._occupancy = Occupancy()
        self._arrived: Counter[tuple[str, str]] = Counter()
        """Of each model and task, since the last tick."""
        self._store = store
        self._dispatcher = dispatcher
        self._resolver = Resolver(settings)
        self._is_revoked = is_revoked
        self._max_payload_bytes = settings.queue.max_payload_mb * 1_000_000
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s
        system = "redis" if settings.queue.broker_is_redis else "rabbitmq"
        self._tracing = CollectorTracing(tracer, system=system, wall_s=wall_s)
        self.latency = LatencyFits()
        self.sharding = Sharding(settings.queue.collector_shards)
        self._refusals = Refusals(store, dispatcher, self._metrics, self._tracing, self.statistics, wall_s)
        self._foreign: list[Passing] = []
        self._routes: dict[BatchKey, NextAttempt] = {}
        self._unmarked: list[Waiting] = []

    # -- what the event loop calls -------------------------------------------------------------------------------

    def on_message(self, message: Any) -> None:
        """Take in one message of a request queue. Never raises on account of the message."""
        handle = Handle(message.channel, message.delivery_tag)
        if getattr(message, "delivery_info", {}).get("redelivered"):
            self._metrics.redelivered()
        try:
            self._check_size(message)
            request = read_request(message.headers, message.content_type, message.body, self._wall_s())
        except MuaiError as error:
            self._refusals.refuse_message(message, handle, error)
            return
        request = self._tracing.entered(request, message.headers)
        try:
            if self._is_revoked(request.id):
                raise RequestCancelledError(f"request {request.id} was revoked", {"request_id": request.id})
            key, request, tokens = self._resolver.resolve(request)
        except MuaiError as error:
            self._refusals.refuse(request, handle, error)
            return
        queue = self.sharding.elsewhere(key)
        if queue is not None:
            self._foreign.append(Passing(queue, self._tracing.passed_on(request), handle))
            return
        self._tracing.routed(request)
        item = Waiting(request, tokens, self._monotonic_s(), handle, num_bytes=len(message.body))
        self.assembler.add(self.conversing.take_in(key, item), item)
        self._arrived[key.model, key.task] += 1
        self._unmarked.append(item)

    def _check_size(self, message: Any) -> None:
        """Our own clients check before they send; others cannot know the limit."""
        num_bytes = len(message.body)
        if num_bytes > self._max_payload_bytes:
            raise PayloadTooLargeError(
                f"the request has {num_bytes} bytes, allowed are {self._max_payload_bytes} (queue.max_payload_mb)",
                {"bytes": num_bytes, "max_bytes": self._max_payload_bytes},
            )

    def on_undecodable(self, message: Any, error: Exception) -> None:
        """A message that is no task of ours at all: to the dead letters, and its sender told where it has an id."""
        handle = Handle(message.channel, message.delivery_tag)
        self._refusals.refuse_message(message, handle, MalformedMessageError(f"the message cannot be read: {error}"))

    def on_settings(self, settings: Settings) -> None:
        """Work by these settings from now on. What waits keeps its batch key, and with it its engines; a request over a
        lower cap of tokens runs alone.
        """
        self.assembler.policy = policy_from(settings)
        self._resolver = Resolver(settings)
        self.conversing.reconfigure(settings)

    def on_fleet(self, view: FleetView) -> None:
        """A new picture of the fleet."""
        self._occupancy.on_fleet(view)
        self._routes.clear()
        self.conversing.on_fleet(view)

    def on_shards(self, held: frozenset[int]) -> None:
        """The shards that this collector holds from now on; what waits of others is passed on."""
        if held == self.sharding.held:
            return
        self.sharding.held = held
        for key in list(self.assembler.waiting_by_key()):
            queue = self.sharding.elsewhere(key)
            if queue is not None:
                items = self.assembler.take(key)
                passed_on = self._tracing.passed_on
                self._foreign += [Passing(queue, passed_on(item.request), item.handle) for item in items]

    def on_notice(self, notice: Notice) -> None:
        """What has changed in the fleet since its last picture."""
        if isinstance(notice, BatchDone):
            self.on_batch_done(notice)
        elif isinstance(notice, OwnBatchDone):
            self.conversing.on_own_batch_done(notice)
        else:
            self.conversing.on_turns_ended(notice)

    def on_batch_done(self, done: BatchDone) -> None:
        """A batch has finished."""
        self._occupancy.on_batch_done(done, self._monotonic_s())
        if done.size:
            self.latency.add(done.engine, done.model, done.size, done.took_s)

    def tick(self) -> float | None:
        """Send what is due.

        Returns:
            seconds after which to call again though nothing happens; None: not needed.
        """
        for (model, task), count in self._arrived.items():
            self.statistics.arrived(model, task, count)
        self._arrived.clear()
        try:
            self._refusals.settle()
            self._pass_on()
            more = self.conversing.let_go()
            more = self._send_due() or more
            self._refusals.settle()  # what was found to have ended when its batch was formed
        except (redis.RedisError, OperationalError, ConnectionError) as error:
            log.warning("cannot send: %s; holding %d requests, trying again", error, self.assembler.num_requests)
            return RETRY_S
        if more:
            return 0.0
        now_s = self._monotonic_s()
        timeouts = (self.assembler.next_timeout_s(), self._occupancy.next_room_s(now_s))
        timeout_s = min((one for one in timeouts if one is not None), default=None)
        return None if timeout_s is None else max(0.001, timeout_s - now_s)

    def sweep(self) -> None:
        """Answer what has expired or was revoked while it waited. Call about once a second."""
        now_s = self._wall_s()
        for item in self.assembler.discard(lambda item: self._ended(item.request, now_s) is not None):
            error = self._ended(item.request, now_s) or _expired(item.request)
            self._refusals.refuse(item.request, item.handle, error)
        self._metrics.waiting(self.assembler, now_s)
        self.conversing.ask_all()
        try:
            self._mark_received()
        except redis.RedisError as error:
            log.warning("could not show which requests wait: %s", error)

    def forget_all(self) -> None:
        """Drop everything held, unacknowledged: after a lost connection the broker delivers it again."""
        self.assembler.discard(lambda _: True)
        self._refusals.forget_all()
        self._foreign.clear()
        self._unmarked.clear()
        self.conversing.forget_all()
        self._tracing.forget_all()

    def announcement(self, record: CollectorRecord) -> CollectorRecord:
        """`record` with what is held now."""
        keys, offset_s = self.assembler.pictures(MAX_FORMING), self._wall_s() - self._monotonic_s()
        told: CollectorRecord = msgspec.structs.replace(
            record,
            waiting=self.assembler.num_requests,
            num_keys=len(self.assembler.waiting_by_key()),
            forming=tuple(self._forming(picture, offset_s) for picture in keys),
        )
        return told

    def _forming(self, picture: KeyPicture, offset_s: float) -> Forming:
        key, room = picture.key, self._room(picture.key)
        limit = self.assembler.policy.size_limit
        return Forming(
            model=key.model,
            task=key.task,
            engine=self._route(key).engine or "",
            waiting=picture.waiting,
            waiting_high=sum(picture.by_priority[7:]),
            waiting_low=sum(picture.by_priority[:3]),
            max_size=limit if room is None else min(limit, room.max_size),
            oldest_at=picture.oldest_s + offset_s,
        )

    # -- sending -------------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        left, self._foreign = self._foreign, []
        try:
            while left:
                self._foreign += self._dispatcher.pass_on(left[:PASS_ON_CHUNK])
                left = left[PASS_ON_CHUNK:]
        finally:
            # What the broker may have without our knowing goes twice, and its second result is refused.
            self._foreign += left

    def _send_due(self) -> bool:
        """Send what may be sent now; True when there may be more to send at once."""
        now_s = self._monotonic_s()
        due: list[tuple[Batch, Formed]] = []
        while len(due) < MAX_BATCHES_PER_TICK:
            formed = self.assembler.form(now_s, self._room)
            if formed is None:
                break
            formed = self._without_ended(formed)
            if formed.items:
                batch = self._batch(formed)
                due.append((batch, formed))
                self._sending(batch, now_s)
        # What was lost leaves its slots free: others take its place at once.
        has_lost = bool(due) and self._send(due)
        return len(due) >= MAX_BATCHES_PER_TICK or has_lost

    def _send(self, due: list[tuple[Batch, Formed]]) -> bool:
        """Send batches; True when some of their requests were no longer this collector's."""
        try:
            self._mark_batched([batch for batch, _ in due])
            sent = self._dispatcher.send([(batch, [item.handle for item in formed.items]) for batch, formed in due])
        except Exception:
            # Whether the broker has them is not known: keep them, and leave it to the fences and to the refusal of
            # second results should they go twice.
            for batch, formed in due:
                self._not_sent(batch)
                self._put_back(formed, frozenset())
            raise
        for (batch, formed), outcome in zip(due, sent, strict=True):
            if outcome.lost or outcome.error is not None:
                reason = outcome.error or f"{len(outcome.lost)} of its requests went to another collector"
                log.warning("a batch was not sent: %s", reason)
                self._not_sent(batch)
                self._put_back(formed, outcome.lost)
                if outcome.error is not None:
                    self.conversing.refused(batch.queue)
                continue
            self._tracing.sent(batch)
            self.conversing.sent(formed.key, batch.queue, len(formed.items))
            if outcome.outstanding is not None:
                self._occupancy.sent(batch.engine, outcome.outstanding)
            self._metrics.sent(formed, self.assembler.policy)
        has_lost = any(outcome.lost for outcome in sent)
        if has_lost:
            self._let_go_of_lost()
        return has_lost

    def _sending(self, batch: Batch, now_s: float) -> None:
        """A batch is on its way to its engine."""
        expected_s = self.latency.of(batch.engine, batch.model).predict_s(len(batch.requests))
        self._occupancy.sending(batch.engine, expected_s, now_s)
        self.conversing.sending(batch.queue, 1)

    def _not_sent(self, batch: Batch) -> None:
        """It is not after all."""
        self._occupancy.not_sent(batch.engine)
        self.conversing.sending(batch.queue, -1)

    def _let_go_of_lost(self) -> None:
        """Forget what others have now. A collector that was given up has lost all that it held, not one batch of it."""
        held = self._dispatcher.is_held
        gone = self.assembler.discard(lambda item: not held(item.handle))
        if gone:
            log.warning("%d more of the requests held here went to another collector", len(gone))

    def _put_back(self, formed: Formed, lost: frozenset[Any]) -> None:
        for item in formed.items:
            if item.handle.tag not in lost:
                self.assembler.add(formed.key, item)

    def _without_ended(self, formed: Formed) -> Formed:
        """What of a batch is still to run. The rest is answered first, and its messages let go of only then."""
        now_s, items = self._wall_s(), []
        for item in formed.items:
            error = self._ended(item.request, now_s)
            if error is None:
                items.append(item)
            else:
                self._refusals.refuse(item.request, item.handle, error)
        return Formed(formed.key, tuple(items))

    def _batch(self, formed: Formed) -> Batch:
        """The batch as it travels."""
        now_s, now_monotonic_s = self._wall_s(), self._monotonic_s()
        way, queue = self._way(formed.key)
        assert way.engine is not None  # without an engine there is no room, and no batch is formed
        return Batch(
            id=str(uuid.uuid4()),
            engine=way.engine,
            model=formed.key.model,
            task=formed.key.task,  # type: ignore[arg-type]
            requests=[item.request for item in formed.items],
            chain=way.rest,
            attempts=way.skipped,
            received_at=tuple(now_s - (now_monotonic_s - item.arrived_s) for item in formed.items),
            formed_at=now_s,
            queue=queue,
        )

    def _way(self, key: BatchKey) -> tuple[NextAttempt, str]:
        """The attempt that a batch leaves for now, and the own queue that it goes to; '' for its engine's."""
        way = self._route(key)
        if key.queue and self.conversing.way(key, self._occupancy.idle(way.engine), may_wait=False) == "pinned":
            return self.conversing.attempt(key), key.queue
        return way, ""

    def _route(self, key: BatchKey) -> NextAttempt:
        if key not in self._routes:
            self._routes[key] = route(key.chain, key.model, self._occupancy.fleet)
        return self._routes[key]

    def _room(self, key: BatchKey) -> Room | None:
        engine = self._route(key).engine
        if engine is None or key.queue == HELD:
            return None
        if key.queue and (room := self._room_of_pinned(key, engine)) is not None:
            return room
        room = self._occupancy.room(engine, self._monotonic_s())
        return room if room is NO_ROOM else self._sized(room, engine, key)

    def _room_of_pinned(self, key: BatchKey, engine: str) -> Room | None:
        """What the worker can take whose conversations these are; None where they may go to any of `engine`."""
        way = self.conversing.way(key, self._occupancy.idle(engine))
        if way == "pinned":
            pinned_engine = self.conversing.attempt(key).engine
            assert pinned_engine is not None
            return self._sized(self.conversing.room(key), pinned_engine, key)
        return NO_ROOM if way == "wait" else None

    def _sized(self, room: Room, engine: str, key: BatchKey) -> Room:
        """With how large a batch may be there, and how far to look for its members."""
        policy, fit = self.assembler.policy, self.latency.of(engine, key.model)
        max_size = policy.size_limit
        if policy.latency_target_s is not None and policy.adaptive:
            max_size = fit.largest_size(policy.latency_target_s, max_size)
        lookahead = None
        if fit.num_samples:
            batch_s = fit.predict_s(policy.size_limit) / self._occupancy.fleet.slots(engine)
            lookahead = worthwhile_lookahead(batch_s, policy)
        return Room(room.idle, room.ahead, max_size, lookahead)

    def _mark_batched(self, batches: Iterable[Batch]) -> None:
        """Show BATCHED for what will wait at a worker; what runs at once goes straight on to STARTED."""
        for batch in batches:
            waits = self._occupancy.idle(batch.engine) < 0
            fit = self.latency.of(batch.engine, batch.model)
            if waits and (not fit.num_samples or fit.predict_s(len(batch.requests)) >= SHOWN_FROM_S):
                info = {"batch_id": batch.id, "engine": batch.engine, "batch_size": len(batch.requests)}
                self._store.mark(BATCHED, [request.id for request in batch.requests], info)

    def _mark_received(self) -> None:
        """Show RECEIVED for what has waited since the last sweep: what leaves at once needs no such state."""
        waiting = [item for item in self._unmarked if item.queued]
        now, self._unmarked = waiting[:MARKS_PER_SWEEP], waiting[MARKS_PER_SWEEP:]
        self._store.mark(RECEIVED, [item.request.id for item in now])

    def _ended(self, request: InferenceRequest, now_s: float) -> MuaiError | None:
        if request.deadline is not None and request.deadline <= now_s:
            return _expired(request)
        if self._is_revoked(request.id):
            return RequestCancelledError(f"request {request.id} was revoked", {"request_id": request.id})
        return None


def _expired(request: InferenceRequest) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the deadline of request {request.id} passed before an engine could take it", {"deadline": request.deadline}
    )
