"""From what is found at each check to what is told: each alert's beginning once, its end once, never a storm. Pure.

    quiet ──found──▶ pending ──found for `for_s`──▶ firing ──not found for `resolve_after_s`──▶ quiet

Told is a beginning unless one of the same type and subject was told within the rate limit; an alert that still fires
when the limit is over is told then. An end is told where the beginning was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from muai_producers.alerts.records import Alert, AlertState, Finding

REFRESH_S = 60.0
"""How often Alertmanager is told that an alert lasts; it would take it for over by itself."""


@dataclass(frozen=True)
class AlertRules:
    """The configuration's, in seconds."""

    rate_limit_s: float
    resolve_after_s: float


@dataclass
class Step:
    """What one check came to."""

    states: dict[str, AlertState] = field(default_factory=dict)
    changed: list[Alert] = field(default_factory=list)
    """Alerts that began or ended, for the history."""
    notices: list[Alert] = field(default_factory=list)
    """What is to be told to every destination."""
    refreshed: list[Alert] = field(default_factory=list)
    """Alerts that last: what Alertmanager is told again."""


def alert_id(key: str, since_s: float) -> str:
    """The id of the alert of this type and subject that began then: whoever computes it gets the same."""
    return hashlib.blake2b(f"{key}\t{since_s!r}".encode(), digest_size=10).hexdigest()


def advance(states: Mapping[str, AlertState], findings: Iterable[Finding], now_s: float, rules: AlertRules) -> Step:
    """The states after a check that found this.

    Args:
        now_s: wall-clock seconds; a clock that went back delays, and tells nothing twice.
    """
    found = {finding.key: finding for finding in findings}
    step = Step()
    for key in sorted({*states, *found}):
        state, finding = states.get(key), found.get(key)
        after = _lasting(key, state, finding, now_s, rules, step) if finding else _absent(state, now_s, rules, step)
        if after is not None:
            step.states[key] = after
    return step


def _lasting(
    key: str, state: AlertState | None, finding: Finding, now_s: float, rules: AlertRules, step: Step
) -> AlertState:
    if state is None or state.phase == "quiet":
        told_s = None if state is None else state.told_s
        state = AlertState(phase="pending", since_s=now_s, seen_s=now_s, told_s=told_s)
    if state.phase == "pending":
        if now_s - state.since_s < finding.for_s:
            return msgspec.structs.replace(state, seen_s=now_s)
        state = _begun(key, state, finding, now_s)
        if state.alert is not None:
            step.changed.append(state.alert)
    state = msgspec.structs.replace(state, seen_s=now_s)
    if not state.is_told and (state.told_s is None or now_s - state.told_s >= rules.rate_limit_s):
        state = msgspec.structs.replace(state, is_told=True, told_s=now_s, refreshed_s=now_s)
        step.notices += [] if state.alert is None else [state.alert]
    elif state.is_told and now_s - state.refreshed_s >= REFRESH_S:
        state = msgspec.structs.replace(state, refreshed_s=now_s)
        step.refreshed += [] if state.alert is None else [state.alert]
    return state


def _begun(key: str, state: AlertState, finding: Finding, now_s: float) -> AlertState:
    alert = Alert(
        id=alert_id(key, state.since_s),
        alert_type=finding.type,
        subject=finding.subject,
        severity=finding.severity,
        message=finding.message,
        timestamp=state.since_s,
        metadata=finding.metadata,
    )
    return AlertState(phase="firing", since_s=now_s, seen_s=now_s, alert=alert, told_s=state.told_s)


def _absent(state: AlertState | None, now_s: float, rules: AlertRules, step: Step) -> AlertState | None:
    if state is None:
        return None
    if state.phase == "firing":
        if now_s - state.seen_s < rules.resolve_after_s:
            return state
        if state.alert is not None:
            ended = msgspec.structs.replace(state.alert, resolved_at=now_s)
            step.changed.append(ended)
            step.notices += [ended] if state.is_told else []
    if state.told_s is None or now_s - state.told_s >= rules.rate_limit_s:
        return None
    return AlertState(phase="quiet", since_s=now_s, seen_s=state.seen_s, told_s=state.told_s)
