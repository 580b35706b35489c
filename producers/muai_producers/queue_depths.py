"""How much waits in which queue, and since when."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from amqp.exceptions import AMQPError
from kombu.exceptions import OperationalError

from muai_config import celery_settings
from muai_config.queues import ALL_QUEUES, ENGINE_QUEUES, INFERENCE_HIGH, INFERENCE_LOW, REQUEST_QUEUES
from muai_producers.connections import state_client
from muai_producers.errors import BrokerError

if TYPE_CHECKING:
    from muai_config import Settings

SHOWN_QUEUES = (*REQUEST_QUEUES, *ENGINE_QUEUES)
"""Those that people are shown."""
PRIORITY_STEPS = (0, 3, 6, 9)
"""kombu keeps a Redis queue's messages in one list for each of these; what our own producers send is in the first."""
STEP_SEPARATOR = "\x06\x16"
MAX_READ_BYTES = 262_144
"""A longer message is not looked into for its age."""
# ARGV: most bytes of a message that is looked into. The body is JSON inside the message's JSON: the request's own field
# is told from its text by how its quotes are escaped. No decoding, for a message may have megabytes. A body in base64
# tells nothing.
OLDEST = """
local found = {}
for i, key in ipairs(KEYS) do
  local message = redis.call('LINDEX', key, -1)
  if message and #message > tonumber(ARGV[1]) then message = false end
  found[i] = message and string.match(message, '[^\\\\]\\\\?"submitted_at\\\\?":%s*([%d.]+)') or ''
end
return found
"""


@dataclass(frozen=True)
class QueueDepth:
    """What waits in one queue."""

    messages: int
    oldest_at: float | None = None
    """When the oldest request was submitted, in wall-clock seconds; None where the broker cannot tell."""


def priority_of(queue: str) -> str:
    """The class of requests that a queue is for; '' for those that carry no requests."""
    if queue not in REQUEST_QUEUES:
        return ""
    return {INFERENCE_HIGH: "high", INFERENCE_LOW: "low"}.get(queue, "normal")


def redis_lists(queue: str) -> list[str]:
    """Every list in which a queue's messages lie."""
    return [queue if step == 0 else f"{queue}{STEP_SEPARATOR}{step}" for step in PRIORITY_STEPS]


class RedisQueues:
    """The queues of a Redis broker.

    Raises:
        redis.exceptions.RedisError: from every method, when the broker does not answer.
    """

    def __init__(self, url: str, queues: Sequence[str] = ALL_QUEUES) -> None:
        self._client: Any = state_client(url, timeout_s=2.0)
        self._queues = queues
        self._oldest = self._client.register_script(OLDEST)

    def depths(self) -> Mapping[str, int]:
        """Messages by queue, of whatever priority."""
        pipe = self._client.pipeline(transaction=False)
        for queue in self._queues:
            for name in redis_lists(queue):
                pipe.llen(name)
        lengths = pipe.execute()
        steps = len(PRIORITY_STEPS)
        return {queue: sum(lengths[steps * at : steps * (at + 1)]) for at, queue in enumerate(self._queues)}

    def oldest_submitted_s(self) -> Mapping[str, float]:
        """When the request was submitted that is next in each request queue; those without any are left out."""
        lists = [(queue, name) for queue in REQUEST_QUEUES for name in redis_lists(queue)]
        found: dict[str, float] = {}
        told = self._oldest(keys=[name for _, name in lists], args=[MAX_READ_BYTES])
        for (queue, _), submitted_s in zip(lists, told, strict=True):
            if submitted_s:
                found[queue] = min(found.get(queue, float("inf")), float(submitted_s))
        return found

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class AmqpQueues:
    """The queues of RabbitMQ, which tells how many wait and not since when.

    Raises:
        kombu.exceptions.OperationalError, amqp.exceptions.AMQPError, OSError: the broker does not answer.
    """

    def __init__(self, settings: Settings, queues: Sequence[str] = ALL_QUEUES) -> None:
        from kombu import Connection

        conf = celery_settings(settings, "producer")
        self._connection = Connection(conf["broker_url"], ssl=conf.get("broker_use_ssl") or False, connect_timeout=2)
        self._queues = queues

    def depths(self) -> Mapping[str, int]:
        """Messages by queue."""
        try:
            return {queue: self._depth(queue) for queue in self._queues}
        except (OSError, OperationalError, AMQPError):
            self._connection.close()  # else the next look meets the same broken connection
            raise

    def _depth(self, queue: str) -> int:
        channel: Any = self._connection.default_channel
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except self._connection.channel_errors:
            return 0  # nobody has declared it yet

    def oldest_submitted_s(self) -> Mapping[str, float]:
        """Nothing: a queue of RabbitMQ cannot be looked into without taking from it."""
        return {}

    def close(self) -> None:
        """Close the connection."""
        self._connection.release()


QueueReader = RedisQueues | AmqpQueues


def queue_reader(settings: Settings, queues: Sequence[str] = ALL_QUEUES) -> QueueReader:
    """Reads the broker's queues; connects when first asked."""
    if settings.queue.broker_is_redis:
        return RedisQueues(settings.queue.broker_url, queues)
    return AmqpQueues(settings, queues)


def read_depths(reader: QueueReader) -> Mapping[str, QueueDepth]:
    """What waits in each queue, and since when.

    Raises:
        BrokerError: the broker does not answer.
    """
    try:
        messages, oldest = reader.depths(), reader.oldest_submitted_s()
    except (redis.RedisError, OSError, OperationalError, AMQPError) as error:
        raise BrokerError(f"the broker does not answer: {error}") from error
    now_s = time.time()
    return {
        queue: QueueDepth(count, min(oldest[queue], now_s) if count and queue in oldest else None)
        for queue, count in messages.items()
    }
