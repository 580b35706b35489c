"""Processes that die, are stopped, or are asked to end, under load: nothing is lost, nothing is answered twice."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from tests.chaos.stack import Stack, lease_ttl_s, num_requests

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.xdist_group("chaos")]

EVERYTHING = ("collector", "worker-1", "worker-2", "control")


@pytest.mark.parametrize(
    ("what", "victims"),
    [
        ("the collector", ("collector",)),
        ("an engine worker", ("worker-1",)),
        ("the control worker", ("control",)),
        ("all processes at once", EVERYTHING),
    ],
)
def test_given_requests_in_flight_when_killed_then_each_has_one_result(
    stack: Stack, what: str, victims: tuple[str, ...]
) -> None:
    load = stack.submit(num_requests())
    stack.await_share(load, 0.2)
    stack.signal(load, signal.SIGKILL, *victims)
    stack.verify(f"kill -9 of {what}", load)


@pytest.mark.parametrize("victim", ["collector", "worker-1"])
def test_given_requests_in_flight_when_stopped_for_three_leases_then_what_wakes_up_is_fenced_off(
    stack: Stack, victim: str
) -> None:
    load = stack.submit(num_requests())
    stack.await_share(load, 0.2)
    stack.signal(load, signal.SIGSTOP, victim)
    # The fault is the passing of this time: there is no event to wait for.
    threading.Event().wait(3 * lease_ttl_s())
    # Nobody collects while the only collector stands still: its pause is not counted against it.
    load.faults_s[:] = [time.monotonic()] if victim == "collector" else load.faults_s
    stack.processes[victim].signal(signal.SIGCONT)
    stack.verify(f"SIGSTOP of {victim.split('-')[0]} for three leases", load)


def test_given_requests_in_flight_when_asked_to_end_at_any_moment_then_each_has_one_result(stack: Stack) -> None:
    load = stack.submit(num_requests())
    for share, victim in [
        (0.0, "collector"),
        (0.1, "worker-1"),
        (0.3, "worker-2"),
        (0.5, "collector"),
        (0.7, "worker-1"),
    ]:
        stack.await_share(load, share)
        stack.processes[victim].wait_ready()
        stack.signal(load, signal.SIGTERM, victim)
    stack.verify("SIGTERM at five moments", load)
