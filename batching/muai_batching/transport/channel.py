"""The channel: stock kombu to producers and for pub/sub, claims in bulk for consumers."""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import redis

from muai_batching.transport import stock
from muai_batching.transport.book import Holder
from muai_batching.transport.keeper import ledger_for
from muai_batching.transport.keys import DEFAULT_STATE_PREFIX
from muai_batching.transport.ledger import CONNECTION_ERRORS, Ledger
from muai_batching.transport.message import ClaimedMessage, UndecodableError
from muai_batching.transport.poller import REST_OF_ANSWER_S, Peek
from muai_batching.transport.restraint import Restraint
from muai_batching.transport.store import Claimed, Command, ListOrder
from muai_producers.silence import heeding

logger = logging.getLogger(__name__)

#: A command that Redis has not answered after this long is taken for lost.
COMMAND_TIMEOUT_S = 3.0

Reply = list[Any]


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a method while its object lives: the ledger must not keep a forgotten connection alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if (alive := reference()) is not None:
            alive()

    return call


class QoS(stock.QoS):  # type: ignore[misc]
    """Prefetch limit and acknowledgements, kept by the ledger."""

    def __init__(self, channel: ReliableChannel, prefetch_count: int = 0) -> None:
        # Nothing of the base class's own bookkeeping is wanted, nor its finalizer.
        self.channel = channel
        self.prefetch_count = prefetch_count or 0

    def room(self, limit: int) -> int:
        """How many more messages may be held, at most `limit`."""
        if not self.prefetch_count:
            return limit
        return max(0, min(limit, self.prefetch_count - len(self.channel.holder.tags)))

    def can_consume(self) -> bool:
        return self.room(1) > 0

    def can_consume_max_estimate(self) -> int | None:
        return self.room(self.prefetch_count) if self.prefetch_count else None

    def append(self, message: Any, delivery_tag: Any) -> None:
        """A pub/sub message: nothing in Redis stands behind it."""

    def ack(self, delivery_tag: Any) -> None:
        self.channel.note_end(delivery_tag)
        self.channel.ledger.ack(self.channel.holder, delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        if requeue:
            self.channel.note_end(delivery_tag)
            self.channel.ledger.give_back(self.channel.holder, [delivery_tag])
        else:
            self.ack(delivery_tag)

    def restore_unacked(self) -> None:
        channel = self.channel
        channel.ledger.give_back(channel.holder, list(channel.holder.tags))

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Closing the channel returned everything already."""


class Broadcasts(stock.PubSub):  # type: ignore[misc]
    """What a consumer hears of broadcasts. Stock kombu asks when there is something to read, and then waits for all of
    it for ever: half a message of a connection that has gone silent would hold the consumer's loop."""

    def parse_response(self, block: bool = True, timeout: float = 0) -> Any:
        """Raises `redis.TimeoutError`, one of the connection's errors, when the rest of a message does not come."""
        return super().parse_response(block=False, timeout=REST_OF_ANSWER_S if block else timeout)


class ReliableChannel(stock.Channel):  # type: ignore[misc]
    """What the plain and the Sentinel channel share."""

    QoS = QoS

    #: Most messages fetched by one claim.
    claim_batch = 256
    #: A consumer whose heart has not beaten for this long is dead.
    lease_ttl_s = 8.0
    #: Where the transport's own keys live, below `global_keyprefix`.
    state_prefix = DEFAULT_STATE_PREFIX

    #: Messages that the consumer works on at once, where it shares its queues with others: see `Restraint`.
    at_work = 0

    from_transport_options = (
        *stock.Channel.from_transport_options,
        *("claim_batch", "lease_ttl_s", "state_prefix", "at_work"),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._ledger: Ledger | None = None
        self._holder: Holder | None = None
        self._sentinel_manager: Any = None
        self._peeks: dict[str, Peek] = {}
        self._backlog: deque[tuple[int, str, bytes, int]] = deque()
        self._on_message: dict[str, tuple[Callable[[Any], Any], bool]] = {}
        self._eager = False
        self._making_ledger = False
        self._claimed_s: dict[int, float] = {}
        """When each message came that is at work or held ready; kept where `at_work` is set."""
        self._last_end_s = 0.0
        self._wakes_later = False
        super().__init__(*args, **kwargs)
        self._restraint = Restraint(self.at_work)
        self.__dict__.pop("QoS", None)  # ack_emulation=False would put the base class's there

    # The ledger and what this channel holds in it

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            prefix = self.global_keyprefix + self.state_prefix
            self._ledger = ledger_for(self._ledger_identity(prefix), self._ledger_client, prefix, self.lease_ttl_s)
        return self._ledger

    @property
    def holder(self) -> Holder:
        if self._holder is None:
            self.connection.cycle.enable_wake()
            self._holder = holder = self.ledger.open(_weakly(self.connection.cycle.wake))
            weakref.finalize(self, self.ledger.abandon, holder).atexit = False
        return self._holder

    def _ledger_identity(self, prefix: str) -> tuple[str, ...]:
        info = self.connection.client
        return (type(self).__name__, info.as_uri(include_password=True), str(info.alt), prefix)

    def _ledger_client(self) -> redis.Redis:
        """A client of the ledger's own, on a pool that outlives this channel."""
        manager, self._making_ledger = self._sentinel_manager, True
        try:
            pool = self._get_pool(asynchronous=False)
        finally:
            self._sentinel_manager, self._making_ledger = manager, False
        return redis.Redis(connection_pool=pool)

    @cached_property
    def subclient(self) -> Broadcasts:
        """Used by kombu for what comes by fanout exchanges."""
        pool = self._create_client(asynchronous=True).connection_pool
        return Broadcasts(pool, global_keyprefix=self.global_keyprefix)

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        params: dict[str, Any] = super()._connparams(asynchronous)
        params["connection_class"] = heeding(params["connection_class"])
        if self._making_ledger:
            params["max_connections"] = 2**31
            params["retry_on_timeout"] = False
            for name in ("socket_timeout", "socket_connect_timeout"):
                if name in params:
                    params[name] = params[name] or COMMAND_TIMEOUT_S
        return params

    # Consuming

    def basic_consume(self, queue: str, no_ack: bool, callback: Callable[[Any], Any], **kwargs: Any) -> Any:
        reply = super().basic_consume(queue, no_ack, callback, **kwargs)
        if queue not in self.active_fanout_queues:
            self._on_message[queue] = (callback, no_ack)
            self.connection.cycle.enable_wake()
            self._eager = True
            self.connection.cycle.wake()
        return reply

    def _basic_cancel(self, consumer_tag: str) -> Any:
        reply = super()._basic_cancel(consumer_tag)
        for queue in self._on_message.keys() - set(self.active_queues):
            del self._on_message[queue]
            self._drop_peeks(queue)
        return reply

    def before_poll(self) -> None:
        """Tell Redis what is done, and see to it that the next poll returns when there is something to claim."""
        if self._holder is None and not self._on_message:
            return
        self.ledger.flush()
        if self.has_more:
            self.connection.cycle.wake()
        elif self._on_message and not self._eager:
            self._arm_peeks()
        elif (
            self._on_message and not self._wakes_later and self._restraint.is_waiting(self._num_held, time.monotonic())
        ):
            self._wakes_later = True
            self.connection.cycle.call_later(self._restraint.rest_s(time.monotonic()), self._wake_after_waiting)

    def _wake_after_waiting(self) -> None:
        self._wakes_later = False
        self.connection.cycle.wake()

    @property
    def _num_held(self) -> int:
        return len(self.holder.tags)

    @property
    def has_more(self) -> bool:
        """Whether there is something to deliver, or to claim, without waiting."""
        return bool(self._backlog) or (self._eager and bool(self._on_message) and self._has_room())

    def _has_room(self) -> bool:
        if self._takes_more():
            return True
        # Say so before looking again, or a claim that ends in between would wake nobody.
        self.holder.starved = True
        return self._takes_more()

    def _takes_more(self) -> bool:
        return bool(self.qos.can_consume()) and not self._restraint.is_waiting(self._num_held, time.monotonic())

    def pump(self) -> bool:
        """Claim once, without waiting, and deliver; True when anything was delivered."""
        if self._backlog:
            return self._deliver()
        self._eager = bool(self._on_message)
        if not self._eager or not self._has_room():
            return False
        room = self._restraint.may_take(self._num_held, self.qos.room(self.claim_batch), time.monotonic())
        if not room:
            return False  # others come first; this is asked again soon
        queues = self._queue_cycle.consume(len(self._on_message))
        claimed = self.ledger.claim(self.holder, self._list_order(queues), room)
        self._eager = claimed.count >= room
        self._queue_cycle.rotate(queues[0])
        self._store_backlog(queues, claimed)
        return self._deliver()

    def note_end(self, tag: Any) -> None:
        """A message is done with: how long it took says how long others may be let first. Any thread may call this."""
        claimed_s = self._claimed_s.pop(tag, None)
        if claimed_s is None:
            return
        now_s = time.monotonic()
        self._restraint.took(now_s - max(claimed_s, self._last_end_s))
        self._last_end_s = now_s

    def _list_order(self, queues: Sequence[str]) -> ListOrder:
        keys = [self.list_key(queue, step) for step in self.priority_steps for queue in queues]
        return ListOrder(keys, len(queues), shared=self.queue_order_strategy == "round_robin")

    def list_key(self, queue: str, priority: int = 0) -> str:
        """The full Redis key of the list that holds a queue's messages of a priority; LPUSH puts one last."""
        return f"{self.global_keyprefix}{self._q_for_pri(queue, priority)}"

    def _store_backlog(self, queues: Sequence[str], claimed: Claimed) -> None:
        deaths = {tag: count for tag, _, count in claimed.suspects}
        tag = claimed.first
        if self._restraint.at_work:
            if len(self._claimed_s) > self.claim_batch:  # what was given up in between never ends here
                held = self.holder.tags
                self._claimed_s = {tag: claimed_s for tag, claimed_s in list(self._claimed_s.items()) if tag in held}
            self._claimed_s.update(dict.fromkeys(range(tag, tag + claimed.count), time.monotonic()))
        for index, payloads in claimed.groups:
            queue = queues[index % len(queues)]
            for payload in payloads:
                self._backlog.append((tag, queue, payload, deaths.get(tag, 0) if deaths else 0))
                tag += 1

    def _deliver(self) -> bool:
        """Hand out the backlog. What a raising callback leaves is handed out at the next poll."""
        backlog, held, on_message = self._backlog, self.holder.tags, self._on_message
        unwanted: list[int] = []
        delivered = False
        try:
            while backlog:
                tag, queue, payload, deaths = backlog.popleft()
                if tag not in held:
                    continue  # given up in the meantime
                consumer = on_message.get(queue)
                if consumer is None:
                    unwanted.append(tag)
                    continue
                message = self._message(payload, tag, deaths)
                if message is not None:
                    callback, no_ack = consumer
                    if no_ack:
                        self.ledger.ack(self.holder, tag)
                    delivered = True
                    callback(message)
        finally:
            if unwanted:
                self.ledger.give_back(self.holder, unwanted)
        return delivered

    def _message(self, payload: bytes, tag: int, deaths: int) -> ClaimedMessage | None:
        try:
            return ClaimedMessage(payload, self, tag, deaths)
        except UndecodableError as exc:
            shelf = self.ledger.store.keys.undecodable
            logger.error("put aside in %s: %s", shelf, exc)
            self.settle([tag], [("LPUSH", shelf, payload)])
            return None

    def basic_qos(self, *args: Any, **kwargs: Any) -> None:
        super().basic_qos(*args, **kwargs)
        self.connection.cycle.wake()

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> ClaimedMessage | None:
        claimed = self.ledger.claim(self.holder, self._list_order([queue]), 1)
        with self.conn_or_acquire() as client:
            self._maybe_update_queues_expire(client, queue)
        for _, payloads in claimed.groups:
            deaths = claimed.suspects[0][2] if claimed.suspects else 0
            message = self._message(payloads[0], claimed.first, deaths)
            if no_ack and message is not None:
                self.ledger.ack(self.holder, claimed.first)
            return message
        return None

    def _size(self, queue: str) -> int:
        """Unclaimed messages of all priorities. Without a transaction, which a full Redis would refuse."""
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipe:
            for step in self.priority_steps:
                pipe.llen(self._q_for_pri(queue, step))
            return sum(pipe.execute())

    # Waiting

    def _arm_peeks(self) -> None:
        for queue in self._on_message:
            for step in self.priority_steps:
                key = self.list_key(queue, step)
                if key not in self._peeks:
                    pool = self.ledger.store.client.connection_pool
                    self._peeks[key] = self.connection.cycle.open_peek(pool, key, self)
                self._arm(self._peeks[key])

    def _arm(self, peek: Peek) -> None:
        try:
            peek.arm()
        except CONNECTION_ERRORS:
            # The next tick connects anew, and fails loudly if Redis is gone.
            self.connection.cycle.drop_peek(peek)
            self.connection.cycle.wake()
            self.ledger.expect_loss()

    def _drop_peeks(self, queue: str) -> None:
        for step in self.priority_steps:
            peek = self._peeks.get(self.list_key(queue, step))
            if peek is not None:
                self.connection.cycle.drop_peek(peek)

    def peek_dropped(self, peek: Peek) -> None:
        self._peeks.pop(peek.key, None)

    # Ending claims

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        if multiple:
            self.ack_many([tag for tag in list(self.holder.tags) if tag <= delivery_tag])
        else:
            self.ledger.ack(self.holder, delivery_tag)

    def ack_many(self, tags: Iterable[int]) -> None:
        """Acknowledge many messages in one round trip."""
        self.ledger.ack_many(self.holder, list(tags))

    def settle(self, tags: Sequence[int], commands: Sequence[Command]) -> Reply:
        """`Ledger.settle` for messages of this channel; works on a closed channel too."""
        return self.ledger.settle(self.holder, tags, commands)

    def settle_many(self, items: Sequence[tuple[Sequence[int], Sequence[Command]]]) -> list[Reply | Exception]:
        """`Ledger.settle_many` for messages of this channel; works on a closed channel too."""
        return self.ledger.settle_many(self.holder, items)

    def message_to_python(self, raw_message: Any) -> Any:
        if isinstance(raw_message, ClaimedMessage):
            return raw_message
        return super().message_to_python(raw_message)

    def close(self) -> None:
        if not self.closed:
            for peek in list(self._peeks.values()):
                self.connection.cycle.drop_peek(peek)
            self._backlog.clear()
            if self._holder is not None:
                self.ledger.close(self._holder)
        super().close()


class Channel(ReliableChannel):
    """A channel to one Redis."""


class SentinelChannel(ReliableChannel, stock.SentinelChannel):  # type: ignore[misc]
    """A channel to the master that Sentinel names."""

    from_transport_options = tuple(
        dict.fromkeys((*stock.SentinelChannel.from_transport_options, *ReliableChannel.from_transport_options))
    )
