"""What surrounds the processes fails under load: the broker, the network, the clock."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos.proxy import Proxy
from tests.chaos.stack import ANSWER_LIMIT_S, Stack, num_requests
from tests.transport_support import wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.xdist_group("chaos")]

FAKETIME_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib64/faketime/libfaketimeMT.so.1",
)
NOTICES_OF_ABSENCE = ("batch given back", "the state store does not take results")
"""What a worker says of a state store that does not answer: at the start of a batch, or at its end."""


def test_given_requests_in_flight_when_the_broker_is_killed_and_starts_again_then_each_has_one_result(
    stack: Stack,
) -> None:
    load = stack.submit(num_requests())
    stack.await_share(load, 0.2)
    load.faults_s.append(time.monotonic())
    stack.broker.kill()
    stack.broker.start()
    load.away_s = time.monotonic() - load.faults_s[-1]
    stack.verify("kill -9 of the broker, restart", load)


def test_given_another_broker_when_the_state_store_is_killed_and_starts_again_then_each_has_one_result(
    stack: Stack,
) -> None:
    if stack.broker is stack.state:
        pytest.skip("here the broker is the state store: the test before this one")
    load = stack.submit(num_requests())
    stack.await_share(load, 0.2)
    workers = ("worker-1", "worker-2")
    said_before = stack.num_said(NOTICES_OF_ABSENCE, workers)
    load.faults_s.append(time.monotonic())
    stack.state.kill()
    # Away for longer than a worker's client tries again by itself: whatever the worker was at, it has noticed.
    wait_until(lambda: stack.num_said(NOTICES_OF_ABSENCE, workers) > said_before, ANSWER_LIMIT_S, "a worker to notice")
    stack.state.start()
    load.away_s = time.monotonic() - load.faults_s[-1]
    stack.verify("kill -9 of the state store, restart", load)


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    proxy = Proxy(stack.broker.port)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("victim", ["collector", "worker-1"])
def test_given_requests_in_flight_when_replies_of_the_broker_vanish_then_each_has_one_result(
    stack: Stack, proxy: Proxy, victim: str
) -> None:
    through_proxy = stack.write_config("through-proxy", proxy.port)
    stack.restart(victim, MUAI_TEST_CONFIG=str(through_proxy))
    load = stack.submit(num_requests())
    stack.await_share(load, 0.2)
    load.faults_s.append(time.monotonic())
    proxy.swallow()
    wait_until(lambda: proxy.num_swallowed, what="a reply that vanishes")
    stack.verify(f"black hole between broker and {victim.split('-')[0]}", load)
    # By force: on AMQP the victim may still wait for the rest of a frame, until TCP gives the connection up.
    stack.restart(victim, signal.SIGKILL, MUAI_TEST_CONFIG=str(stack.config_file))


def faketime_library() -> str:
    for library in FAKETIME_LIBRARIES:
        if Path(library).exists():
            return library
    reason = "libfaketime is not installed (apt-get install libfaketime)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def test_given_requests_in_flight_when_the_collectors_clock_jumps_back_then_each_has_one_result(
    stack: Stack, tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    faketime = {
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_TIMESTAMP_FILE": str(clock),
    }
    jump(stack, clock, "collector", -3600, LD_PRELOAD=faketime_library(), **faketime)
    stack.restart("collector", LD_PRELOAD="")


def test_given_requests_in_flight_when_a_workers_clock_jumps_ahead_then_each_has_one_result(
    stack: Stack, tmp_path: Path
) -> None:
    clock = tmp_path / "clock"
    # libfaketime breaks time.sleep, which the fake engine works with: here Python's own clock is shifted.
    jump(stack, clock, "worker-1", 3600, MUAI_TEST_CLOCK=str(clock))
    stack.restart("worker-1", MUAI_TEST_CLOCK="")


def jump(stack: Stack, clock: Path, victim: str, seconds: int, **environment: str) -> None:
    clock.write_text("+0")
    stack.restart(victim, **environment)
    load = stack.submit(num_requests())
    stack.await_share(load, 0.2)
    load.faults_s.append(time.monotonic())
    replacement = clock.with_suffix(".new")
    replacement.write_text(f"{seconds:+d}")
    replacement.replace(clock)
    stack.verify(f"clock of the {victim.split('-')[0]} jumps {seconds // 3600:+d} h", load)
