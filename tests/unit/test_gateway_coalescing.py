"""Many callers' operations in one flight: what comes together, its bounds, and what is told when nobody answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from muai_producers.errors import BrokerError, InvalidRequestError, MuaiError
from muai_producers.gateway.coalescing import Coalescer


class Flights:
    """Remembers the flights; a closed gate holds them in the air. Doubles numbers and refuses negative ones."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def run(self, items: list[int]) -> list[int | MuaiError]:
        self.seen.append(items)
        self.gate.wait(timeout=10.0)
        if self.error is not None:
            raise self.error
        return [2 * item if item >= 0 else InvalidRequestError(f"{item} is negative") for item in items]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def flights() -> Flights:
    return Flights()


async def test_given_items_of_one_turn_then_one_flight_and_each_its_own_outcome(
    flights: Flights, executor: ThreadPoolExecutor
) -> None:
    coalescer: Coalescer[int, int] = Coalescer(flights.run, executor, max_items=100)
    outcomes = await asyncio.gather(*(coalescer.add(n) for n in (1, -2, 3)), return_exceptions=True)
    assert flights.seen == [[1, -2, 3]]
    assert outcomes[0] == 2
    assert isinstance(outcomes[1], InvalidRequestError)
    assert outcomes[2] == 6


async def test_given_a_flight_in_the_air_then_what_comes_meanwhile_goes_with_the_next(
    flights: Flights, executor: ThreadPoolExecutor
) -> None:
    coalescer: Coalescer[int, int] = Coalescer(flights.run, executor, max_items=3)
    flights.gate.clear()
    first = coalescer.add(0)
    while not flights.seen:
        await asyncio.sleep(0)
    others = [coalescer.add(n) for n in range(1, 6)]
    flights.gate.set()
    assert await first == 0
    assert await asyncio.gather(*others) == [2, 4, 6, 8, 10]
    assert flights.seen == [[0], [1, 2, 3], [4, 5]]


async def test_given_large_items_then_a_flight_is_bounded_in_bytes_and_the_largest_goes_alone(
    flights: Flights, executor: ThreadPoolExecutor
) -> None:
    coalescer: Coalescer[int, int] = Coalescer(flights.run, executor, max_items=10, max_bytes=100)
    futures = [coalescer.add(n, size) for n, size in enumerate((60, 40, 1, 500, 7))]
    await asyncio.gather(*futures)
    assert flights.seen == [[0, 1], [2], [3], [4]]


async def test_given_nobody_answers_then_all_who_wait_are_told_and_it_recovers_afterwards(
    flights: Flights, executor: ThreadPoolExecutor
) -> None:
    coalescer: Coalescer[int, int] = Coalescer(flights.run, executor, max_items=1, timeout_s=0.05)
    flights.gate.clear()
    told = await asyncio.gather(coalescer.add(1), coalescer.add(2), return_exceptions=True)
    assert [type(error) for error in told] == [BrokerError, BrokerError]
    with pytest.raises(BrokerError):
        await coalescer.add(3)
    flights.gate.set()
    async with asyncio.timeout(5.0):
        while True:
            try:
                assert await coalescer.add(4) == 8
                break
            except BrokerError:
                await asyncio.sleep(0)
    assert flights.seen == [[1], [4]]


async def test_given_the_flight_fails_as_a_whole_then_everybody_on_it_hears_and_the_next_takes_off(
    flights: Flights, executor: ThreadPoolExecutor
) -> None:
    coalescer: Coalescer[int, int] = Coalescer(flights.run, executor, max_items=10)
    flights.error = BrokerError("gone")
    told = await asyncio.gather(coalescer.add(1), coalescer.add(2), return_exceptions=True)
    assert [str(error) for error in told] == ["gone", "gone"]
    flights.error = None
    assert await coalescer.add(5) == 10


async def test_given_a_caller_that_left_then_the_others_are_served(
    flights: Flights, executor: ThreadPoolExecutor
) -> None:
    coalescer: Coalescer[int, int] = Coalescer(flights.run, executor, max_items=10)
    gone, stays = coalescer.add(1), coalescer.add(2)
    gone.cancel()
    assert await stays == 4
