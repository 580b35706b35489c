"""kombu's classes that this transport builds on. kombu is untyped: here it is said once for all of them."""

from __future__ import annotations

from typing import Any

from kombu.transport import redis, virtual

Channel: Any = redis.Channel
SentinelChannel: Any = redis.SentinelChannel
Transport: Any = redis.Transport
SentinelTransport: Any = redis.SentinelTransport
MultiChannelPoller: Any = redis.MultiChannelPoller
PubSub: Any = redis.PrefixedRedisPubSub
Message: Any = virtual.Message
QoS: Any = virtual.QoS
