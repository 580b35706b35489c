"""Batches that take long, and requests that spoil or kill what serves them: a batch is not a unit of failure."""

from __future__ import annotations

import pytest
from tests.chaos.stack import Stack, lease_ttl_s

from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import PoisonedRequestError

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300), pytest.mark.xdist_group("chaos")]


def test_given_a_batch_of_three_leases_when_it_ends_then_it_has_run_once(stack: Stack) -> None:
    load = stack.submit(0, texts=[f"SLEEP:{3 * lease_ttl_s()}"])
    figures = stack.verify("a batch that takes three leases", load)
    assert sum(load.ids[0] in run for run in stack.runs()) == 1
    assert figures.refused == 0


def test_given_a_killer_of_workers_when_served_then_it_is_tried_alone_and_its_companions_succeed(stack: Stack) -> None:
    load = stack.submit(31, texts=["KILL"])
    killer = load.ids[0]
    stack.verify("1 request of 32 kills its worker", load, failures=[killer])
    letters = DeadLetters(stack.client.store).get([killer])
    assert [letter.code for letter in letters] == [PoisonedRequestError.code]
    runs = [run for run in stack.runs() if killer in run]
    assert len(runs) == stack.settings.queue.max_deliveries
    assert runs[-1] == [killer]


def test_given_a_spoiler_of_batches_when_served_then_31_of_32_succeed_within_six_rounds(stack: Stack) -> None:
    load = stack.submit(31, texts=["POISON"])
    spoiler = load.ids[0]
    stack.verify("1 request of 32 spoils its batch", load, failures=[spoiler])
    assert sum(spoiler in run for run in stack.runs()) <= 6
