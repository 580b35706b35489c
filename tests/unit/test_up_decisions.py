"""Whether and when a dead process is started again, and in which order processes stop."""

import pytest

from muai_workers.up.decisions import (
    STOP_ORDER,
    GiveUp,
    Restart,
    RestartPolicy,
    Role,
    after_death,
    describe_status,
    is_viable,
    next_to_stop,
)

POLICY = RestartPolicy(first_delay_s=1.0, max_delay_s=8.0, quick_s=10.0, max_quick_deaths=6)


def die(*, uptime_s: float = 1.0, quick_deaths: int = 0, status: int = 1, chance: float = 0.0) -> Restart | GiveUp:
    return after_death(POLICY, status=status, uptime_s=uptime_s, quick_deaths=quick_deaths, chance=chance)


def test_Given_quick_deaths_in_a_row_Then_each_delay_doubles_up_to_the_longest() -> None:
    assert [die(quick_deaths=before) for before in range(5)] == [
        Restart(1.0, 1),
        Restart(2.0, 2),
        Restart(4.0, 3),
        Restart(8.0, 4),
        Restart(8.0, 5),
    ]


def test_Given_one_quick_death_too_many_Then_it_is_given_up_with_the_count() -> None:
    decision = die(quick_deaths=5)
    assert isinstance(decision, GiveUp)
    assert "6 times in a row" in decision.reason


def test_Given_a_process_that_had_worked_When_it_dies_Then_it_comes_back_soon_and_the_count_begins_anew() -> None:
    assert die(uptime_s=10.0, quick_deaths=5) == Restart(1.0, 0)


@pytest.mark.parametrize(("chance", "delay_s"), [(0.0, 4.0), (0.5, 3.0), (1.0, 2.0)])
def test_Given_chance_Then_it_cuts_the_delay_by_up_to_half(chance: float, delay_s: float) -> None:
    assert die(quick_deaths=2, chance=chance) == Restart(delay_s, 3)


def test_Given_a_wrong_configuration_Then_it_is_not_tried_again() -> None:
    decision = die(status=2)
    assert isinstance(decision, GiveUp)
    assert "configuration" in decision.reason


def test_Given_an_engine_given_up_When_another_runs_Then_the_installation_still_serves() -> None:
    others = {Role.REDIS: [False], Role.COLLECTOR: [False], Role.CONTROL: [False]}
    assert is_viable({**others, Role.ENGINE: [True, False]})
    assert not is_viable({**others, Role.ENGINE: [True, True]})


@pytest.mark.parametrize("role", [Role.REDIS, Role.COLLECTOR, Role.CONTROL])
def test_Given_the_only_process_of_a_needed_role_given_up_Then_it_does_not(role: Role) -> None:
    assert not is_viable({Role.ENGINE: [False], role: [True]})


def test_Given_flower_or_the_gateway_given_up_Then_the_queue_still_serves() -> None:
    assert is_viable({Role.ENGINE: [False], Role.FLOWER: [True], Role.GATEWAY: [True]})


def test_Given_everything_running_Then_who_hands_work_on_stops_before_who_takes_it_and_redis_last() -> None:
    running = set(Role)
    stages = []
    while stage := next_to_stop(running):
        stages.append(stage)
        running -= stage
    assert stages == list(STOP_ORDER)
    order = [role for stage in stages for role in sorted(stage)]
    assert order[:4] == [Role.GATEWAY, Role.COLLECTOR, Role.ENGINE, Role.CONTROL]
    assert set(order[4:-1]) == {Role.EXPORTER, Role.FLOWER}
    assert order[-1] == Role.REDIS


def test_Given_nothing_running_Then_nothing_is_to_stop() -> None:
    assert next_to_stop([]) == frozenset()


@pytest.mark.parametrize(("status", "words"), [(3, "exit status 3"), (-9, "killed by SIGKILL"), (-200, "signal 200")])
def test_Given_a_status_Then_it_is_told_in_words(status: int, words: str) -> None:
    assert words in describe_status(status)
