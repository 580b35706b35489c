"""Sending batches: each batch's message is with the broker before its requests' messages are gone from it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import redis
from kombu import Connection, Queue

from muai_batching.transport import LeaseLostError
from muai_config.queues import OWN_EXCHANGE, REQUEST_QUEUES, engine_queue
from muai_producers.messages import RUN_BATCH_TASK, redis_payload, request_message, task_body, task_headers
from muai_producers.store import Store
from muai_producers.submit import UnroutableError, publish_confirmed
from muai_producers.wire import Batch, InferenceRequest

CONFIRM_LIMIT_S = 5.0
"""After this long without a confirmation the connection is taken for lost: the collector waits meanwhile."""


@dataclass(slots=True)
class Handle:
    """Where a request's message is held: what settling it needs."""

    channel: Any
    tag: Any


@dataclass(frozen=True)
class Passing:
    """A request on its way to another queue."""

    queue: str
    request: InferenceRequest
    handle: Handle


@dataclass(frozen=True)
class Sent:
    """How sending one batch went.

    Exactly one holds: it was sent (`outstanding` batches are now with the engine), or messages in `lost` are no
    longer this collector's and nothing was sent, or the broker gave an `error` and nothing was sent.
    """

    outstanding: int | None = None
    """None: it was sent, but the broker's word on how many there are got lost."""
    lost: frozenset[Any] = frozenset()
    error: Exception | None = None


class Dispatcher(Protocol):
    """Hands batches to the engines' queues and acknowledges their requests."""

    def send(self, batches: Sequence[tuple[Batch, Sequence[Handle]]]) -> list[Sent]:
        """Send each batch, then let go of its requests' messages; one result per batch."""
        ...

    def drop(self, handles: Sequence[Handle]) -> None:
        """Acknowledge messages whose requests have been answered."""
        ...

    def is_held(self, handle: Handle) -> bool:
        """Whether the message is still this collector's, as far as this process knows. Asks nobody."""
        ...

    def pass_on(self, items: Sequence[Passing]) -> list[Passing]:
        """Move requests to other queues; returns those that could not be moved."""
        ...


def batch_message(batch: Batch) -> tuple[str, dict[str, Any], bytes]:
    """Queue, headers and body of a batch's message. The batch travels as one JSON text: one decoding at its worker."""
    summary = f"{batch.model} {batch.task} x{len(batch.requests)}"
    body = task_body({"batch": msgspec.json.encode(batch).decode()})
    return batch.queue or engine_queue(batch.engine), task_headers(RUN_BATCH_TASK, batch.id, summary), body


class RedisDispatcher:
    """Broker and state store are one Redis: a batch replaces its requests' messages in one atomic step."""

    def __init__(self, store: Store, key_prefix: str = "") -> None:
        self._keys = store.keys
        self._key_prefix = key_prefix

    def send(self, batches: Sequence[tuple[Batch, Sequence[Handle]]]) -> list[Sent]:
        """See `Dispatcher.send`."""
        if not batches:
            return []
        channel = batches[0][1][0].channel
        replies = channel.settle_many(
            [([handle.tag for handle in handles], self._commands(batch)) for batch, handles in batches]
        )
        return [_sent(reply) for reply in replies]

    def _commands(self, batch: Batch) -> list[tuple[str | bytes, ...]]:
        queue, headers, body = batch_message(batch)
        outstanding, now = self._keys.outstanding(batch.engine), repr(time.time())
        # The push first: a queue that was closed refuses it, and nothing has been changed then.
        commands: list[tuple[str | bytes, ...]] = [
            ("LPUSH", self._key_prefix + queue, redis_payload(headers, body, queue)),
            ("ZADD", outstanding, now, batch.id),
            ("ZCARD", outstanding),
        ]
        if batch.queue:
            commands.append(("ZADD", self._keys.outstanding(batch.queue), now, batch.id))
        return commands

    def drop(self, handles: Sequence[Handle]) -> None:
        """See `Dispatcher.drop`."""
        for handle in handles:
            handle.channel.basic_ack(handle.tag)

    def is_held(self, handle: Handle) -> bool:
        """See `Dispatcher.is_held`."""
        return handle.tag in handle.channel.holder.tags

    def pass_on(self, items: Sequence[Passing]) -> list[Passing]:
        """See `Dispatcher.pass_on`. What is no longer this collector's stays where it went."""
        moves = [
            (
                [item.handle.tag],
                [("LPUSH", self._key_prefix + item.queue, redis_payload(*_message_of(item), item.queue))],
            )
            for item in items
        ]
        replies = items[0].handle.channel.settle_many(moves)
        return [
            item
            for item, reply in zip(items, replies, strict=True)
            if isinstance(reply, Exception) and not isinstance(reply, LeaseLostError)
        ]


def _message_of(item: Passing) -> tuple[dict[str, Any], bytes]:
    _, headers, body = request_message(item.request)
    return headers, body


def _payload_of(item: Passing) -> bytes:
    return redis_payload(*_message_of(item), item.queue)


def _sent(reply: Any) -> Sent:
    if isinstance(reply, LeaseLostError):
        return Sent(lost=frozenset(reply.tags))
    return Sent(error=reply) if isinstance(reply, Exception) else Sent(outstanding=reply[2])


class ConfirmingDispatcher:
    """Any other broker: batches are published with confirmation, then their requests' messages acknowledged.

    Between the two lies a moment in which a kill leaves both; the request then runs twice and its second result is
    refused.
    """

    def __init__(self, store: Store, connection: Connection, queues: Sequence[Queue]) -> None:
        self._store = store
        self._connection = connection
        # A batch or a request must find its queue, also before its consumer's first start.
        self._queues = [queue for queue in queues if queue.name not in REQUEST_QUEUES]
        self._channel: Any = None

    def send(self, batches: Sequence[tuple[Batch, Sequence[Handle]]]) -> list[Sent]:
        """See `Dispatcher.send`.

        Raises:
            kombu.exceptions.OperationalError: the broker did not take them; whatever it has of them is a duplicate.
        """
        if not batches:
            return []
        counts = self._count_in([batch for batch, _ in batches])
        try:
            self._publish([batch_message(batch) for batch, _ in batches if not batch.queue])
            closed = self._publish_to_own([batch for batch, _ in batches if batch.queue])
        except Exception:
            self._count_out([batch for batch, _ in batches])
            raise
        self._count_out([batch for batch, _ in batches if batch.queue in closed])
        for batch, handles in batches:
            if batch.queue not in closed:
                self.drop(handles)
        return [
            Sent(error=closed[batch.queue]) if batch.queue in closed else Sent(outstanding=count)
            for (batch, _), count in zip(batches, counts, strict=True)
        ]

    def _publish_to_own(self, batches: Sequence[Batch]) -> dict[str, Exception]:
        """Send batches to workers' own queues; returns those queues that are closed, each with the error."""
        if not batches:
            return {}
        try:
            self._publish([batch_message(batch) for batch in batches], OWN_EXCHANGE)
        except UnroutableError as error:
            return dict.fromkeys(error.queues, error)
        return {}

    def _count_in(self, batches: Sequence[Batch]) -> list[int]:
        client: Any = self._store.client
        pipe = client.pipeline(transaction=False)
        for batch in batches:
            outstanding = self._store.keys.outstanding(batch.engine)
            pipe.zadd(outstanding, {batch.id: time.time()})
            pipe.zcard(outstanding)
        for batch in batches:
            if batch.queue:
                pipe.zadd(self._store.keys.outstanding(batch.queue), {batch.id: time.time()})
        return [int(count) for count in pipe.execute()[1 : 2 * len(batches) : 2]]

    def _count_out(self, batches: Sequence[Batch]) -> None:
        """They go again under other ids: counted on, these would keep slots from them until the reaper comes."""
        client: Any = self._store.client
        with contextlib.suppress(redis.RedisError), client.pipeline(transaction=False) as pipe:
            for batch in batches:
                pipe.zrem(self._store.keys.outstanding(batch.engine), batch.id)
                if batch.queue:
                    pipe.zrem(self._store.keys.outstanding(batch.queue), batch.id)
            pipe.execute()

    def _publish(self, messages: list[tuple[str, dict[str, Any], bytes]], exchange: str = "") -> None:
        if not messages:
            return

        unroutable: list[UnroutableError] = []

        def publish(channel: Any) -> None:
            if channel is not self._channel:
                for queue in self._queues:
                    queue.bind(channel).declare()
                self._channel = channel
            try:
                publish_confirmed(channel, messages, CONFIRM_LIMIT_S, exchange=exchange)
            except UnroutableError as error:
                unroutable.append(error)  # no fault of the connection: not to be tried again

        publish_with_retries: Any = self._connection.autoretry(publish, max_retries=3, interval_start=0.1)
        publish_with_retries()
        if unroutable:
            raise unroutable[0]

    def drop(self, handles: Sequence[Handle]) -> None:
        """See `Dispatcher.drop`."""
        for handle in handles:
            handle.channel.basic_ack(handle.tag)

    def is_held(self, handle: Handle) -> bool:
        """See `Dispatcher.is_held`. A broker takes messages back with their channel, and all of them."""
        return True

    def pass_on(self, items: Sequence[Passing]) -> list[Passing]:
        """See `Dispatcher.pass_on`.

        Raises:
            kombu.exceptions.OperationalError: as `send`.
        """
        self._publish([(item.queue, *_message_of(item)) for item in items])
        self.drop([item.handle for item in items])
        return []
