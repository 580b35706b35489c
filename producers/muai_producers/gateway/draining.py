"""How a gateway stops: it says that it is not ready, refuses what is new, and lets what is under way finish."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)
SHOW_UNREADY_S = 1.0
"""Least time between saying so and ending, for load balancers to notice."""
LAST_WORD_S = 2.0
"""Before the time is over, whoever still waits for a result is told where the request stands; a quarter of the time at
most."""
STEP_S = 0.02


class Drain:
    """The end of one gateway. Belongs to one event loop once `take_signals` was called.

    Args:
        timeout_s: what is under way has so long to finish.
        hurry: called when the time is nearly over; whoever waits should be answered.
    """

    def __init__(self, timeout_s: float, hurry: Callable[[], None]) -> None:
        self.draining = False
        self.num_active = 0
        """HTTP requests under way, health checks apart."""
        self._timeout_s = timeout_s
        self._hurry = hurry
        self._previous: dict[int, Any] = {}
        self._finishing: asyncio.Task[None] | None = None

    def take_signals(self) -> None:
        """Put the drain before what SIGTERM and SIGINT do now, which is the server's own end.

        A second signal ends the server at once. Nothing happens outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.getsignal(signum)

            def on_signal(signum: int, frame: Any) -> None:
                if self.draining:
                    self._end(signum)
                else:
                    self.draining = True
                    loop.call_soon_threadsafe(self._begin, signum)

            signal.signal(signum, on_signal)

    def _begin(self, signum: int) -> None:
        log.info("stopping: taking nothing new, %d requests under way", self.num_active)
        self._finishing = asyncio.get_running_loop().create_task(self._finish(signum))

    def close(self) -> None:
        """The server has ended."""
        if self._finishing is not None:
            self._finishing.cancel()

    async def _finish(self, signum: int) -> None:
        began_s = time.monotonic()
        await self._idle_until(began_s + self._timeout_s - min(LAST_WORD_S, self._timeout_s / 4))
        if self.num_active:
            self._hurry()
            await self._idle_until(began_s + self._timeout_s)
        await asyncio.sleep(min(SHOW_UNREADY_S, self._timeout_s) - (time.monotonic() - began_s))
        self._end(signum)

    async def _idle_until(self, deadline_s: float) -> None:
        while self.num_active and time.monotonic() < deadline_s:
            await asyncio.sleep(STEP_S)

    def _end(self, signum: int) -> None:
        previous = self._previous.get(signum)
        if callable(previous):
            previous(signum, None)
