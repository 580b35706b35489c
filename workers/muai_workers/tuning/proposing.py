"""Which step to try next: from where requests lose their time. Pure.

Steps double a value or halve it. What is tried is a guess; the trial decides. So the rules here only have to put the
likely steps first, and to stay silent where there is nothing to gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from muai_workers.tuning.measuring import SPEED_WEIGHT, fitted, measured, rate_of
from muai_workers.tuning.records import Bounds, Look, Parameter, Rules, Stretch, Values

MIN_GAIN = 0.01
"""In worth per request: what a step must be expected to gain, and to have gained."""
FULL_SHARE = 0.7
"""Batches of on average so much of the largest size are held down by it."""
HEADROOM = 1.5
LEAST_HEADROOM = 1.1
LEAPS = (1, 2, 4, 8, 16, 32)
NOTICEABLE = 1.25
"""Timeouts that differ by less are as good as one."""
PATIENCE = 3
"""Intervals within which what has piled up may be worked off without another change."""
GOOD_HIT_RATE = 0.95
CACHE_FULL = 0.9
WORTH_FREEING = 0.25
ROOM_PERCENT = 80.0
TIGHT_PERCENT = 90.0


@dataclass(frozen=True)
class Move:
    """A step that could be tried."""

    values: Values
    parameter: Parameter | Literal["several"]
    why: str
    relief: bool = False


def move_to(old: Values, new: Values, why: str) -> Move:
    """The step from one setting to another."""
    changed = list(old.changes_to(new))
    return Move(new, changed[0] if len(changed) == 1 else "several", why)


@dataclass(frozen=True)
class Situation:
    """The recent stretches in a few figures, milliseconds per request."""

    rate: float
    served: float
    """Requests that end per second."""
    in_time: float
    """Share of what came."""
    score: float
    wait_ms: float
    batching_ms: float
    inference_ms: float
    mean_size: float
    behind: bool
    hit_rate: float | None
    curve: tuple[float, float] | None
    """a and b of a·n + b."""

    @property
    def drains_in_s(self) -> float:
        """Until what has piled up is worked off, if all goes on like this."""
        spare = self.served - self.rate
        return self.rate * self.wait_ms / 1000 / spare if spare > 0 else float("inf")


def situation_of(stretches: Sequence[Stretch], target_ms: float, all_known: Sequence[Stretch] = ()) -> Situation:
    """How the fleet does.

    Args:
        all_known: others besides, under other settings and loads: an engine's curve is the same in all of them, and
            takes batches of several sizes to be seen.
    """
    seconds = sum(stretch.length_s for stretch in stretches)
    asked = max(1, sum(max(stretch.arrived, stretch.ended) for stretch in stretches))
    served = max(1, sum(stretch.successes for stretch in stretches))
    batches = sum(stretch.batches for stretch in stretches)
    hits = sum(stretch.cache_hits for stretch in stretches)
    return Situation(
        rate=rate_of(stretches),
        served=sum(stretch.ended for stretch in stretches) / seconds if seconds else 0.0,
        in_time=sum(stretch.in_time for stretch in stretches) / asked,
        score=sum(stretch.worth for stretch in stretches) / asked,
        wait_ms=sum(stretch.waited_ms for stretch in stretches) / served,
        batching_ms=sum(stretch.batching_ms for stretch in stretches) / served,
        inference_ms=sum(stretch.inference_ms for stretch in stretches) / served,
        mean_size=sum(stretch.batched for stretch in stretches) / batches if batches else 0.0,
        behind=measured(stretches, target_ms).behind,
        hit_rate=hits / served if stretches else None,
        curve=fitted(all_known or stretches),
    )


def moves(look: Look, now: Situation, rules: Rules) -> list[Move]:
    """Steps to try, the likeliest to help first; none where nothing is to be gained."""
    found = [*_cache_moves(look, now, rules), *_batching_moves(look, now, rules)]
    unique: dict[Values, Move] = {}
    for move in found:
        if move.values != look.values and not _would_fall_behind(look, now, move.values):
            unique.setdefault(move.values, move)
    return list(unique.values())


# -- batches ---------------------------------------------------------------------------------------------------------


def _batching_moves(look: Look, now: Situation, rules: Rules) -> Iterator[Move]:
    if 1.0 - now.score < MIN_GAIN:
        return
    size, timeout = _scaler(look, rules, "batch_size"), _scaler(look, rules, "batch_timeout_ms")
    full = now.mean_size >= FULL_SHARE * look.values.batch_size
    late = f"{100 * (1 - now.in_time):.0f} % of requests are not answered within {rules.target_ms:.0f} ms"
    if now.behind and now.drains_in_s <= PATIENCE * rules.interval_s:
        return
    if now.behind:
        yield from _enough(look, now, rules, late)
        yield from _catching_up(look, now, full, size, timeout, late)
    elif now.in_time < 1.0 - MIN_GAIN:
        yield from _in_time(look, now, rules, full, size, timeout, late)
    else:
        yield from _sooner(look, now, rules, full, size, timeout)


Scaler = Callable[[float, str], Iterator[Move]]


def _catching_up(look: Look, now: Situation, full: bool, size: Scaler, timeout: Scaler, late: str) -> Iterator[Move]:
    """More comes than is served: fuller batches serve more, as far as a batch costs something besides its requests."""
    waits = f"requests wait {now.wait_ms:.0f} ms for an engine"
    if full:
        yield from size(2, f"{late}: {waits}, and batches are full ({now.mean_size:.0f} of {look.values.batch_size})")
    if look.timeout_matters and not full:
        yield from timeout(2, f"{late}: {waits}, and batches leave with {now.mean_size:.0f} requests at the timeout")
    yield from size(2, f"{late}: {waits}; larger batches may serve more")
    yield from size(0.5, f"{late}: {waits}; batches take {now.inference_ms:.0f} ms, smaller ones may end in time")
    if look.timeout_matters:
        yield from timeout(0.5, f"{late}: {waits}, of that {now.batching_ms:.0f} ms for companions")


def _in_time(
    look: Look, now: Situation, rules: Rules, full: bool, size: Scaler, timeout: Scaler, late: str
) -> Iterator[Move]:
    """The engines keep up, and still some are late: what takes longest is made shorter first."""
    shorter = f"{late}, and batches take {now.inference_ms:.0f} ms of that"
    companions = f"{late}, and requests wait {now.batching_ms:.0f} ms for companions"
    if look.timeout_matters and not full and now.batching_ms > now.inference_ms:
        yield from timeout(0.5, companions)
    if full:
        yield from size(2, f"{late}, and batches are full: requests wait {now.wait_ms:.0f} ms")
    if now.inference_ms > rules.target_ms / 2:
        yield from size(0.5, shorter)
    if look.timeout_matters:
        yield from timeout(0.5, companions)
        yield from timeout(2, f"{late}; fuller batches may leave the engines more time")
    yield from size(2, f"{late}; larger batches may leave the engines more time")
    yield from size(0.5, shorter)


def _sooner(look: Look, now: Situation, rules: Rules, full: bool, size: Scaler, timeout: Scaler) -> Iterator[Move]:
    """Everything is in time: what is left to gain is speed, where halving a part of the latency would show."""
    shows_ms = 2 * MIN_GAIN * rules.target_ms / SPEED_WEIGHT
    if look.timeout_matters and now.batching_ms >= shows_ms:
        yield from timeout(0.5, f"requests wait {now.batching_ms:.0f} ms for companions that do not come")
    if full and now.wait_ms >= shows_ms:
        yield from size(2, f"batches are full, and requests wait {now.wait_ms:.0f} ms")
    if now.inference_ms >= shows_ms:
        yield from size(0.5, f"batches take {now.inference_ms:.0f} ms; smaller ones end sooner")


def _enough(look: Look, now: Situation, rules: Rules, late: str) -> Iterator[Move]:
    """At once to where, by the fitted curve, the engines keep up with some to spare: what piles up meanwhile costs more
    than the way there could teach."""
    if now.curve is None:
        return
    bounds = bounds_of(look, rules, "batch_size")
    sizes = [] if bounds is None else [bounds.clamp(look.values.batch_size * leap) for leap in LEAPS]
    curve = now.curve
    # In the long run a request waits for most of a batch before its own, so a batch may take half of the target. But
    # nobody is answered in time before what has piled up is worked off, and a size too large is found out later.
    sizes = [size for size in sizes if curve[0] * size + curve[1] <= rules.target_ms] or sizes[:1]
    if not sizes:
        return
    enough = next((size for size in sizes if _capacity(look, curve, size) >= HEADROOM * now.rate), sizes[-1])
    wanted = look.values.with_value("batch_size", max(enough, look.values.batch_size))
    timeouts = bounds_of(look, rules, "batch_timeout_ms")
    if look.timeout_matters and timeouts is not None:
        fills_ms = timeouts.clamp(math.ceil(min(1000 * enough / now.rate, rules.target_ms / 2)))
        if fills_ms > NOTICEABLE * look.values.batch_timeout_ms:
            wanted = wanted.with_value("batch_timeout_ms", fills_ms)
    if wanted != look.values:
        why = f"{late}: requests wait {now.wait_ms:.0f} ms for an engine; batches of n take {curve[0]:.3g}n + "
        why += f"{curve[1]:.3g} ms, so {enough} in each serve up to {_capacity(look, curve, enough):.3g} a second, and "
        yield move_to(look.values, wanted, f"{why}{now.rate:.3g} come")


def _would_fall_behind(look: Look, now: Situation, wanted: Values) -> bool:
    """Whether, by the fitted curve, the engines could not keep up with smaller batches: no need to try that."""
    curve = now.curve
    if curve is None:
        return False
    sizes = [min(one.batch_size, _fill(look, now, one)) for one in (look.values, wanted)]
    return sizes[1] < sizes[0] and _capacity(look, curve, sizes[1]) < LEAST_HEADROOM * now.rate


def _fill(look: Look, now: Situation, values: Values) -> int:
    """Requests that come while a batch is open."""
    return values.batch_size if look.adaptive else 1 + int(now.rate * values.batch_timeout_ms / 1000)


def _capacity(look: Look, curve: tuple[float, float], size: int) -> float:
    """Requests per second that the engines serve in batches of this size."""
    per_request_ms, per_batch_ms = curve
    return 1000 * look.slots * size / max(1e-6, per_request_ms * size + per_batch_ms)


# -- cache -----------------------------------------------------------------------------------------------------------


def _cache_moves(look: Look, now: Situation, rules: Rules) -> Iterator[Move]:
    cache = look.cache
    if cache is None or now.hit_rate is None:
        return
    scale = _scaler(look, rules, "cache_size_mb")
    if look.memory_percent >= TIGHT_PERCENT and cache.used_share >= WORTH_FREEING:
        why = f"{look.memory_percent:.0f} % of the memory is in use"
        for move in scale(0.5, why):
            yield Move(move.values, move.parameter, move.why, relief=True)
    elif cache.used_share >= CACHE_FULL and now.hit_rate < GOOD_HIT_RATE and look.memory_percent < ROOM_PERCENT:
        yield from scale(
            2,
            f"the cache is full, {100 * now.hit_rate:.0f} % of requests find something in it, and "
            f"{100 - look.memory_percent:.0f} % of the memory is free",
        )


# -- steps -----------------------------------------------------------------------------------------------------------


def bounds_of(look: Look, rules: Rules, parameter: Parameter) -> Bounds | None:
    """What the parameter may be set to, with what else is set; None where it is not to be changed."""
    bounds = rules.bounds.get(parameter)
    if bounds is None:
        return None
    least = max(bounds.least, look.min_batch_size) if parameter == "batch_size" else bounds.least
    return Bounds(least, bounds.most) if least <= bounds.most else None


def _scaler(look: Look, rules: Rules, parameter: Parameter) -> Scaler:
    bounds, old = bounds_of(look, rules, parameter), look.values.of(parameter)

    def scaled(factor: float, why: str) -> Iterator[Move]:
        if bounds is None:
            return
        # From 0 and 1 doubling and halving must get somewhere.
        wanted = max(old + 1, round(old * factor)) if factor > 1 else int(old * factor)
        new = bounds.clamp(wanted)
        # Outside the bounds the nearest of them may lie the other way, which is not what the reason speaks of.
        if (new > old) == (factor > 1) and new != old:
            yield Move(look.values.with_value(parameter, new), parameter, why)

    return scaled
