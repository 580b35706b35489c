"""kombu's entry points: name these classes in Celery's `broker_transport`."""

from __future__ import annotations

import time
from queue import Empty
from typing import Any

from muai_batching.transport import stock
from muai_batching.transport.channel import Channel, SentinelChannel
from muai_batching.transport.poller import Poller

PEEK_CHECK_S = 1.0


class Transport(stock.Transport):  # type: ignore[misc]
    """Redis with claims in the place of pops; same URLs, lists and payloads as kombu's own."""

    Channel = Channel
    cycle: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle.close()
        self.cycle = Poller()
        self._hub_hooks: tuple[Any, set[Any]] | None = None

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        before = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        self._hub_hooks = (loop, set(loop.on_tick) - before)
        self.cycle.use_hub(loop)
        self.cycle._brpop_health_tref.cancel()
        self.cycle._brpop_health_tref = loop.call_repeatedly(PEEK_CHECK_S, self.cycle.check_peeks)

    def close_connection(self, connection: Any) -> None:
        if self._hub_hooks is not None:
            loop, hooks = self._hub_hooks
            loop.on_tick.difference_update(hooks)
        channels = [*self._avail_channels, *self.channels]
        self._avail_channels.clear()
        for channel in channels:
            channel.close()
        super().close_connection(connection)

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver what is there, in bulk; wait for it up to `timeout` seconds.

        Raises:
            TimeoutError: nothing came.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while True:
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            try:
                self.cycle.get(self._deliver, timeout=None if left_s is None else max(0.0, left_s))
                return
            except Empty:
                if left_s is not None and left_s <= 0:
                    raise TimeoutError from None


class SentinelTransport(Transport):
    """The same behind Redis Sentinel."""

    default_port = stock.SentinelTransport.default_port
    Channel = SentinelChannel
