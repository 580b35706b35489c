"""The end of a gateway: what is under way has its time, and the server's own handler comes last."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest

from muai_producers.gateway.draining import Drain


@pytest.fixture
def ends() -> Iterator[list[int]]:
    """What the server's handlers were called with."""
    called: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in before:
        signal.signal(signum, lambda signum, _: called.append(signum))
    yield called
    for signum, handler in before.items():
        signal.signal(signum, handler)


async def until_ended(ends: list[int]) -> None:
    async with asyncio.timeout(5.0):
        while not ends:
            await asyncio.sleep(0.005)


async def test_given_work_under_way_then_the_end_waits_for_it(ends: list[int]) -> None:
    hurried: list[bool] = []
    drain = Drain(4.0, lambda: hurried.append(True))
    drain.take_signals()
    drain.num_active = 1
    began_s = asyncio.get_running_loop().time()
    signal.raise_signal(signal.SIGTERM)
    assert drain.draining
    asyncio.get_running_loop().call_later(1.2, setattr, drain, "num_active", 0)
    await until_ended(ends)
    assert ends == [signal.SIGTERM]
    assert 1.2 <= asyncio.get_running_loop().time() - began_s < 3.0
    assert not hurried


async def test_given_work_that_does_not_finish_then_it_is_hurried_and_the_end_comes_in_time(ends: list[int]) -> None:
    hurried: list[bool] = []
    drain = Drain(0.7, lambda: hurried.append(True))
    drain.take_signals()
    drain.num_active = 1
    began_s = asyncio.get_running_loop().time()
    signal.raise_signal(signal.SIGINT)
    await until_ended(ends)
    assert hurried == [True]
    assert asyncio.get_running_loop().time() - began_s < 2.0


async def test_given_a_second_signal_then_the_end_is_at_once(ends: list[int]) -> None:
    drain = Drain(60.0, lambda: None)
    drain.take_signals()
    drain.num_active = 1
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert ends == [signal.SIGTERM]
    await asyncio.sleep(0)  # the drain itself begins, and must not end the server once more
    drain.close()
    await asyncio.sleep(0)
    assert ends == [signal.SIGTERM]
