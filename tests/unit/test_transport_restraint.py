"""Which of several consumers takes a message, decided by each for itself."""

from __future__ import annotations

import pytest

from muai_batching.transport.restraint import FORGOTTEN_S, LONGEST_S, Restraint


def test_given_nobody_to_share_with_then_all_there_is_room_for_is_taken() -> None:
    assert Restraint().may_take(5, 250, 1.0) == 250


def test_given_empty_hands_then_one_is_taken_at_once_and_the_next_after_a_wait() -> None:
    restraint = Restraint(1)
    assert restraint.may_take(0, 2, 1.0) == 1
    assert restraint.may_take(1, 1, 1.0) == 0
    assert restraint.is_waiting(1, 1.0)
    assert restraint.rest_s(1.0) == pytest.approx(LONGEST_S)
    assert restraint.may_take(1, 1, 1.001 + LONGEST_S) == 1


def test_given_hands_that_become_free_meanwhile_then_the_wait_is_over() -> None:
    restraint = Restraint(1)
    assert restraint.may_take(1, 1, 1.0) == 0
    assert not restraint.is_waiting(0, 1.001)
    assert restraint.may_take(0, 2, 1.001) == 1


def test_given_short_work_then_messages_are_taken_as_they_come() -> None:
    restraint = Restraint(1)
    restraint.took(0.005)
    assert restraint.may_take(1, 1, 1.0) == 1
    assert restraint.may_take(0, 2, 1.0) == 2


def test_given_half_full_hands_then_the_wait_is_half_as_long() -> None:
    restraint = Restraint(16)
    restraint.took(3.0)
    assert restraint.patience_s(8) == LONGEST_S / 2
    assert restraint.patience_s(16) == restraint.patience_s(31) == LONGEST_S
    assert restraint.patience_s(0) == 0.0


def test_given_a_wait_that_ended_long_ago_then_another_message_is_waited_for_anew() -> None:
    restraint = Restraint(1)
    assert restraint.may_take(1, 1, 1.0) == 0
    assert restraint.may_take(1, 1, 1.0 + LONGEST_S + FORGOTTEN_S + 0.1) == 0
