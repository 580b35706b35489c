"""The queues of single workers: opened by the worker, closed when it has stopped or died, with nothing lost.

Closing ends the sending first, on the broker itself, and gives back what waits only then: whoever still believes in the
worker is refused, and sends elsewhere. Where it is closed from, and how often, makes no difference.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, Protocol

import redis
from amqp.exceptions import AMQPError
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError

from muai_batching.affinity import Bereaved
from muai_batching.transport.scripts import CLOSE_QUEUE, OPEN_QUEUE
from muai_config import celery_settings
from muai_config.queues import OWN_EXCHANGE, engine_queue
from muai_producers.connections import state_client
from muai_producers.fleet import ANNOUNCE_EVERY_S, Fleet, FleetView
from muai_producers.submit import publish_confirmed

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
CLOSING_LIMIT_S = 5.0
GRACE_S = 2 * ANNOUNCE_EVERY_S
"""How long a worker is missed before its queue is closed, once its announcement has run out."""
BROKER_ERRORS = (redis.RedisError, OperationalError, AMQPError, OSError)
_BINDINGS = (f"_kombu.binding.{OWN_EXCHANGE}", f"_kombu.binding_permanent.{OWN_EXCHANGE}")
"""Where kombu notes on Redis what is bound to an exchange."""
_SEPARATOR = "\x06\x16"


class OwnQueues(Protocol):
    """Opens and closes workers' own queues at the broker."""

    def open(self, queue: str) -> None:
        """Let it be sent to; a queue that is open stays as it is.

        Raises:
            redis.exceptions.RedisError, kombu.exceptions.OperationalError, OSError: the broker does not answer.
        """
        ...

    def shut(self, queue: str, engine: str) -> int | None:
        """End the sending to it, move what waits to its engine's queue, and remove it.

        Returns:
            how many messages moved; None while a consumer has it still, to be tried again.
        Raises:
            As `open`.
        """
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


def own_queue_entity(name: str, *, is_redis: bool) -> Queue:
    """The queue as it is declared."""
    # Let no other argument be needed than other queues have: see `celery_settings`.
    arguments = {} if is_redis else {"x-queue-type": "quorum"}
    exchange = Exchange(OWN_EXCHANGE, type="direct")
    return Queue(name, exchange, routing_key=name, durable=True, queue_arguments=arguments)


def own_queues_of(settings: Settings) -> OwnQueues:
    """Those at the broker of the configuration."""
    if settings.queue.broker_is_redis:
        return RedisOwnQueues(settings)
    return AmqpOwnQueues(settings)


class RedisOwnQueues:
    """A closed list's key holds the name of the engine's list: a push to it is refused, and a claim that is given back
    later, by whoever finds its consumer dead, goes there.
    """

    def __init__(self, settings: Settings) -> None:
        self._client: Any = state_client(settings.queue.broker_url)

    def open(self, queue: str) -> None:
        """See `OwnQueues.open`."""
        self._client.eval(OPEN_QUEUE.source, 1, queue)

    def shut(self, queue: str, engine: str) -> int | None:
        """See `OwnQueues.shut`. Who consumes it finds it empty, so nobody is waited for."""
        moved = int(self._client.eval(CLOSE_QUEUE.source, 2, queue, engine_queue(engine)))
        for bindings in _BINDINGS:
            self._client.srem(bindings, _SEPARATOR.join((queue, "", queue)))
        return moved

    def close(self) -> None:
        """See `OwnQueues.close`."""
        self._client.close()


class AmqpOwnQueues:
    """Own queues are bound to an exchange of theirs: unbound, nothing reaches them, and mandatory messages return.

    A quorum queue cannot be removed on condition that it is empty. So it is unbound first and emptied then, and removed
    once it has no consumer, whose unacknowledged messages would go with it.
    """

    def __init__(self, settings: Settings) -> None:
        self._conf = celery_settings(settings, "producer")
        self._connection: Connection | None = None

    def open(self, queue: str) -> None:
        """See `OwnQueues.open`. The consumer declares and binds it, at each of its connections."""

    def shut(self, queue: str, engine: str) -> int | None:
        """See `OwnQueues.shut`."""
        try:
            return self._shut(self._connected(), queue, engine)
        except Exception:
            self.close()  # whatever went wrong, this connection is not to be used again
            raise

    def _connected(self) -> Connection:
        if self._connection is None:
            conf = self._conf
            self._connection = Connection(
                conf["broker_url"],
                transport=conf["broker_transport"],
                ssl=conf.get("broker_use_ssl") or False,
                connect_timeout=CLOSING_LIMIT_S,
            )
        return self._connection

    def _shut(self, connection: Connection, queue: str, engine: str) -> int | None:
        channel: Any = connection.channel()
        try:
            if channel.queue_declare(queue, passive=True).consumer_count:
                return None
            channel.queue_unbind(queue, OWN_EXCHANGE, queue)
            moved = self._empty(channel, queue, engine)
            if channel.queue_declare(queue, passive=True).consumer_count:
                # It has come back meanwhile, and bound the queue anew or will at its next connection.
                channel.queue_bind(queue, OWN_EXCHANGE, queue)
                return None
            channel.queue_delete(queue)
            return moved
        except connection.channel_errors as error:
            if getattr(error, "reply_code", None) == 404:
                return 0  # nobody has declared it, or it is removed already
            raise
        finally:
            with contextlib.suppress(*connection.connection_errors, *connection.channel_errors):
                channel.close()

    def _empty(self, channel: Any, queue: str, engine: str) -> int:
        moved = 0
        while (message := channel.basic_get(queue)) is not None:
            headers = dict(message.headers or {})
            headers.pop("x-delivery-count", None)  # the new queue counts for itself
            body = message.body if isinstance(message.body, bytes) else message.body.encode()
            publish_confirmed(channel, [(engine_queue(engine), headers, body)], CLOSING_LIMIT_S)
            channel.basic_ack(message.delivery_tag)
            moved += 1
        return moved

    def close(self) -> None:
        """See `OwnQueues.close`."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.release()


class Janitor:
    """Closes own queues whose workers have died, from the looks at the fleet that somebody takes all the time."""

    def __init__(self, own_queues: OwnQueues, fleet: Fleet, grace_s: float = GRACE_S) -> None:
        self._own_queues = own_queues
        self._fleet = fleet
        self._bereaved = Bereaved(grace_s)

    def look(self, view: FleetView, now_s: float) -> None:
        """Close what is to be closed. What cannot be closed now is tried again at the next look.

        Args:
            now_s: monotonic seconds.
        Raises:
            redis.exceptions.RedisError: the state store does not answer.
        """
        for queue in self._bereaved.observe(view.own_queues, view.workers, now_s):
            engine = view.own_queues[queue]
            try:
                moved = self._own_queues.shut(queue, engine)
            except BROKER_ERRORS as error:
                log.warning("could not close %s, whose worker is gone: %s; trying again", queue, error)
                continue
            if moved is not None:
                self._fleet.forget_own_queue(queue)
                log.warning("the worker of %s is gone; %d batch(es) go to any other worker", queue, moved)

    def close(self) -> None:
        """Let go of the connection."""
        self._own_queues.close()
