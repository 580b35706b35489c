"""How much waits in which queue, and since when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from muai_config import celery_settings
from muai_config.queues import ALL_QUEUES, INFERENCE_HIGH, INFERENCE_LOW, REQUEST_QUEUES
from muai_producers.connections import state_client

if TYPE_CHECKING:
    from muai_config import Settings

PRIORITY_STEPS = (0, 3, 6, 9)
"""kombu keeps a Redis queue's messages in one list for each of these; what our own producers send is in the first."""
STEP_SEPARATOR = "\x06\x16"
# The body is JSON inside the message's JSON: the request's own field is told from its text by how its quotes are
# escaped. No decoding, for a message may have megabytes. A body in base64 tells nothing.
OLDEST = """
local found = {}
for i, key in ipairs(KEYS) do
  local message = redis.call('LINDEX', key, -1)
  found[i] = message and string.match(message, '[^\\\\]\\\\?"submitted_at\\\\?":%s*([%d.]+)') or ''
end
return found
"""


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

    def __init__(self, url: str) -> None:
        self._client: Any = state_client(url, timeout_s=2.0)
        self._oldest = self._client.register_script(OLDEST)

    def depths(self) -> Mapping[str, int]:
        """Messages by queue, of whatever priority."""
        pipe = self._client.pipeline(transaction=False)
        for queue in ALL_QUEUES:
            for name in redis_lists(queue):
                pipe.llen(name)
        lengths = pipe.execute()
        steps = len(PRIORITY_STEPS)
        return {queue: sum(lengths[steps * at : steps * (at + 1)]) for at, queue in enumerate(ALL_QUEUES)}

    def oldest_submitted_s(self) -> Mapping[str, float]:
        """When the request was submitted that is next in each request queue; those without any are left out."""
        lists = [(queue, name) for queue in REQUEST_QUEUES for name in redis_lists(queue)]
        found: dict[str, float] = {}
        for (queue, _), told in zip(lists, self._oldest(keys=[name for _, name in lists]), strict=True):
            if told:
                found[queue] = min(found.get(queue, float("inf")), float(told))
        return found

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class AmqpQueues:
    """The queues of RabbitMQ, which tells how many wait and not since when.

    Raises:
        kombu.exceptions.OperationalError, OSError: the broker does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        from kombu import Connection

        conf = celery_settings(settings, "producer")
        self._connection = Connection(conf["broker_url"], ssl=conf.get("broker_use_ssl") or False, connect_timeout=2)

    def depths(self) -> Mapping[str, int]:
        """Messages by queue."""
        found = {}
        for queue in ALL_QUEUES:
            channel: Any = self._connection.default_channel
            try:
                found[queue] = channel.queue_declare(queue, passive=True).message_count
            except self._connection.channel_errors:
                found[queue] = 0  # nobody has declared it yet
        return found

    def oldest_submitted_s(self) -> Mapping[str, float]:
        """Nothing: a queue of RabbitMQ cannot be looked into without taking from it."""
        return {}

    def close(self) -> None:
        """Close the connection."""
        self._connection.release()


def queue_reader(settings: Settings) -> RedisQueues | AmqpQueues:
    """Reads the broker's queues; connects when first asked."""
    return RedisQueues(settings.queue.broker_url) if settings.queue.broker_is_redis else AmqpQueues(settings)
