"""Contestants that stand side by side and take short turns, for differences smaller than the machine's own drift."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.processes import Driver
from benchmarks.results import Goal, Metric, ratios
from benchmarks.session import Session, bulk_rate, fitted_count, metric

RATE, SHARE = "in bulk", "of that without"
HOW = (
    "All ways stand side by side, each on a database of its own, and take short turns, whose order turns round every "
    "time; a share is taken within one round, and the figure is the median of all rounds."
)


def taken_in_turns(session: Session, drivers: Mapping[str, Driver]) -> dict[str, list[float]]:
    """Requests per second of each in bulk, round by round; who began a round ends the next."""
    plan = session.plan
    count = min(fitted_count(driver, "noop", plan.turn_s, plan.max_bulk) for driver in drivers.values())
    rates: dict[str, list[float]] = {name: [] for name in drivers}
    for number in range(plan.turns):
        session.on_step(f"{count} in bulk each, round {number + 1} of {plan.turns}")
        order = list(drivers.items())
        for name, driver in order if number % 2 else reversed(order):
            rates[name].append(bulk_rate(driver, "noop", count, number))
    return rates


def shares(rates: Mapping[str, list[float]], without: str) -> dict[str, dict[str, Metric]]:
    """The metrics of each contestant: its rates, and their share of what `without` reached in the same round."""
    return {
        name: {
            RATE: metric("requests/s", own),
            SHARE: metric("median and spread of rounds", list(ratios(own, rates[without]))),
        }
        for name, own in rates.items()
    }


def interval(values: tuple[float, ...]) -> tuple[float, float]:
    """Between which two of the values the true median lies, in 95 of 100 cases (order statistics, normal limit)."""
    ordered, count = sorted(values), len(values)
    reach = 0.98 * count**0.5
    low, high = int(count / 2 - reach), int(count / 2 + reach + 0.5)
    return ordered[max(0, low)], ordered[min(count - 1, high)]


def goal(text: str, share: Metric, least: float) -> Goal:
    """That the median of the shares reaches `least`; the text tells how sure the median is."""
    low, high = interval(share.values)
    return Goal(text=f"{text} (95 % sure: {low:.3f} to {high:.3f})", value=statistics.median(share.values), goal=least)
