"""Many callers' small operations as one large one, off the event loop.

A round trip to the state store costs about the same for one request as for fifty. While one round trip is under way
what arrives is gathered, and goes with the next: the busier the gateway, the larger the groups, and an idle gateway
waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

from muai_producers.errors import BrokerError, MuaiError

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Coalescer(Generic[Item, Outcome]):
    """Hands items to `run`, many at a time, one flight after the other. Belongs to one event loop.

    Args:
        run: called on the executor's thread; returns one outcome or error per item, in order.
        max_items, max_bytes: bounds of one flight; an item that is larger by itself flies alone.
        timeout_s: after it, everybody who waits is told that the store does not answer, and so is whoever comes
            before the flight has landed.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Outcome | MuaiError]],
        executor: Executor,
        *,
        max_items: int,
        max_bytes: int = 8_000_000,
        timeout_s: float = 15.0,
    ) -> None:
        self._run = run
        self._executor = executor
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._waiting: deque[tuple[Item, int, asyncio.Future[Outcome]]] = deque()
        self._in_flight: list[asyncio.Future[Outcome]] = []
        self._busy = False
        self._stuck = False

    def add(self, item: Item, num_bytes: int = 0) -> asyncio.Future[Outcome]:
        """The future of the item's outcome; an error is raised from it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()
        if self._stuck:
            future.set_exception(_not_answering())
            return future
        self._waiting.append((item, num_bytes, future))
        if not self._busy:
            self._busy = True
            loop.call_soon(self._take_off)  # not at once: others of this turn of the loop come along
        return future

    def _take_off(self) -> None:
        items = self._board()
        if not items:
            self._busy = False
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout_s, self._give_up)
        landing = loop.run_in_executor(self._executor, self._run, items)
        landing.add_done_callback(lambda done: self._land(done, timer))

    def _board(self) -> list[Item]:
        items: list[Item] = []
        total_bytes = 0
        self._in_flight = []
        while self._waiting and len(items) < self._max_items:
            item, num_bytes, future = self._waiting[0]
            if items and total_bytes + num_bytes > self._max_bytes:
                break
            self._waiting.popleft()
            items.append(item)
            self._in_flight.append(future)
            total_bytes += num_bytes
        return items

    def _land(self, done: asyncio.Future[Sequence[Outcome | MuaiError]], timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self._stuck = False
        failure = done.exception()
        if failure is not None:
            _fail(self._in_flight, failure)
        else:
            for future, outcome in zip(self._in_flight, done.result(), strict=True):
                if future.done():
                    continue  # whoever waited has gone, or was told that nobody answers
                if isinstance(outcome, MuaiError):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
        self._take_off()

    def _give_up(self) -> None:
        self._stuck = True
        waiting = [future for _, _, future in self._waiting]
        self._waiting.clear()
        _fail(self._in_flight + waiting, None)


def _fail(futures: Sequence[asyncio.Future[Outcome]], failure: BaseException | None) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(_not_answering() if failure is None else failure)


def _not_answering() -> BrokerError:
    return BrokerError("the state store has not answered for a while")
