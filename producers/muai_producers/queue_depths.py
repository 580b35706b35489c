"""How many messages wait in the broker's queues, and since when, where the broker can tell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import redis
from amqp.exceptions import AMQPError
from kombu import Connection
from kombu.exceptions import OperationalError

from muai_config import celery_settings
from muai_config.queues import ENGINE_QUEUES, REQUEST_QUEUES
from muai_producers.connections import state_client
from muai_producers.errors import BrokerError

if TYPE_CHECKING:
    from muai_config import Settings

SHOWN_QUEUES = (*REQUEST_QUEUES, *ENGINE_QUEUES)
MAX_READ_BYTES = 262_144
"""A longer message is not looked into for its age."""
# KEYS: queues. ARGV: most bytes. Answers with the depth of each and when its oldest request was submitted, '' where
# that cannot be known. Inside the envelope the body is JSON in a string: its quotes are escaped once, and those of a
# text that a client sent at least twice, so no text of a client's is taken for the time.
_DEPTHS = """
local found = {}
for i, queue in ipairs(KEYS) do
  found[2 * i - 1] = redis.call('LLEN', queue)
  found[2 * i] = ''
  if found[2 * i - 1] > 0 then
    local oldest = redis.call('LINDEX', queue, -1)
    if oldest and #oldest <= tonumber(ARGV[1]) then
      found[2 * i] = string.match(oldest, '\\\\"submitted_at\\\\":([%d.]+)') or ''
    end
  end
end
return found
"""


@dataclass(frozen=True)
class QueueDepth:
    """What waits in one queue."""

    messages: int
    oldest_at: float | None = None
    """When the oldest request was submitted, in wall-clock seconds; None where the broker cannot tell."""


class QueueReader(Protocol):
    """Reads queues. One caller at a time.

    Raises:
        BrokerError: from `depths`, when the broker does not answer.
    """

    def depths(self) -> Mapping[str, QueueDepth]:
        """What waits in each of the queues."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def queue_reader(settings: Settings, queues: Sequence[str] = SHOWN_QUEUES) -> QueueReader:
    """A reader of the configured broker's queues. Connects when it is first asked."""
    if settings.queue.broker_is_redis:
        return _RedisQueues(settings.queue.broker_url, queues)
    return _AmqpQueues(settings, queues)


class _RedisQueues:
    def __init__(self, url: str, queues: Sequence[str]) -> None:
        self._client: Any = state_client(url, timeout_s=2.0)
        self._queues = list(queues)

    def depths(self) -> Mapping[str, QueueDepth]:
        try:
            flat = self._client.eval(_DEPTHS, len(self._queues), *self._queues, MAX_READ_BYTES)
        except redis.RedisError as error:
            raise BrokerError(f"the broker does not answer: {error}") from error
        now_s = time.time()
        return {
            queue: QueueDepth(int(messages), min(float(oldest), now_s) if oldest else None)
            for queue, messages, oldest in zip(self._queues, flat[::2], flat[1::2], strict=True)
        }

    def close(self) -> None:
        self._client.close()


class _AmqpQueues:
    def __init__(self, settings: Settings, queues: Sequence[str]) -> None:
        conf = celery_settings(settings, "producer")
        ssl = conf.get("broker_use_ssl") or False
        self._connection = Connection(conf["broker_url"], ssl=ssl, connect_timeout=2)
        self._queues = list(queues)

    def depths(self) -> Mapping[str, QueueDepth]:
        try:
            return {queue: QueueDepth(self._depth(queue)) for queue in self._queues}
        except (OSError, OperationalError, AMQPError) as error:
            self._connection.close()  # else the next look meets the same broken connection
            raise BrokerError(f"the broker does not answer: {error}") from error

    def _depth(self, queue: str) -> int:
        channel: Any = self._connection.default_channel
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except self._connection.channel_errors:
            return 0  # nobody has declared it yet

    def close(self) -> None:
        self._connection.release()
