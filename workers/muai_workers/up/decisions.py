"""What a supervisor decides: whether and when to restart, when to give up, whom to stop next. Pure.

Times are seconds of a monotonic clock, passed in.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

WRONG_USAGE = 2
"""The exit status of a process whose configuration or arguments are wrong: starting it again cannot help."""


class Role(StrEnum):
    """What a process is for."""

    REDIS = "redis"
    GATEWAY = "gateway"
    COLLECTOR = "collector"
    ENGINE = "engine"
    CONTROL = "control"
    FLOWER = "flower"
    EXPORTER = "exporter"


# Whoever hands work on stops before whoever takes it; the broker goes last.
STOP_ORDER: tuple[frozenset[Role], ...] = (
    frozenset({Role.GATEWAY}),
    frozenset({Role.COLLECTOR}),
    frozenset({Role.ENGINE}),
    frozenset({Role.CONTROL, Role.FLOWER, Role.EXPORTER}),
    frozenset({Role.REDIS}),
)
NEEDED = frozenset({Role.REDIS, Role.COLLECTOR, Role.ENGINE, Role.CONTROL})
"""Roles without a single process of which the installation does not work. It can do without Flower, without the
metrics page, and without the gateway, whose port may be taken: requests also come through the queue."""


@dataclass(frozen=True)
class RestartPolicy:
    """How patiently a process that dies is started again."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    quick_s: float = 20.0
    """A death within this time of the start is a quick one: the process never got to work."""
    max_quick_deaths: int = 5
    """In a row; then the process is given up."""


@dataclass(frozen=True)
class Restart:
    """Start it again after a while."""

    delay_s: float
    quick_deaths: int


@dataclass(frozen=True)
class GiveUp:
    """Leave it; `reason` is for people."""

    reason: str


@dataclass(frozen=True)
class Hold:
    """A process that must not run for now."""

    reason: str
    patience_s: float
    """How long it may take to stop before it is killed."""


def after_death(
    policy: RestartPolicy, *, status: int, uptime_s: float, quick_deaths: int, chance: float
) -> Restart | GiveUp:
    """What to do about a process that ended unasked.

    The delay doubles with each quick death in a row, and is cut by up to half at random, so that processes that died
    of one cause do not all come back at one moment.

    Args:
        status: as `subprocess` gives it: negative for a signal.
        quick_deaths: in a row, before this one.
        chance: from 0 to 1, drawn by the caller.
    """
    if status == WRONG_USAGE:
        return GiveUp(f"its configuration or arguments are wrong (exit status {WRONG_USAGE})")
    quick_deaths = quick_deaths + 1 if uptime_s < policy.quick_s else 0
    if quick_deaths >= policy.max_quick_deaths:
        return GiveUp(f"it died {quick_deaths} times in a row within {policy.quick_s:.0f} s of its start")
    # The first death in a long time is as likely as not bad luck: come back at once.
    delay_s = min(policy.max_delay_s, policy.first_delay_s * 2 ** max(0, quick_deaths - 1))
    return Restart(delay_s * (1 - chance / 2), quick_deaths)


def is_viable(given_up_by_role: Mapping[Role, Iterable[bool]]) -> bool:
    """Whether every needed role that was started still has a process that is not given up.

    An engine that is given up is no end as long as another engine runs: the chain passes over it.
    """
    return not any(role in NEEDED and all(flags) for role, flags in given_up_by_role.items())


def next_to_stop(running: Iterable[Role]) -> frozenset[Role]:
    """The roles to stop now: the first stage that still has a running process; empty when none has."""
    left = set(running)
    return next((stage for stage in STOP_ORDER if stage & left), frozenset())


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
