"""From counted figures to what settings are judged by. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from muai_producers.performance.bins import middle_ms
from muai_producers.performance.fitting import SIZE_LINE, fitted_line
from muai_producers.performance.report import is_own_fault
from muai_producers.performance.series import ATTEMPT, ERROR, Tally
from muai_workers.tuning.comparing import sample_of
from muai_workers.tuning.records import LATE_S, Look, Measured, Place, Rules, Stretch, Uncollected

SPEED_WEIGHT = 0.1
"""What an answer at the last moment is worth less than an instant one. So settings that answer the same number in time
differ by how soon; and no setting that answers a tenth less in time can seem better for being fast."""
STEP_SHARE = 0.8
"""A load is of another level when it is so many powers of two away from the level's own: more than half of one, or a
load between two levels would count as a change at every look."""
SAME_LEVEL = 1.3
"""Powers of two within which a stretch belongs to a level: single stretches scatter more than what they add up to."""
MIN_REQUESTS = 20
NOTICEABLE_SHARE = 0.2


def stretch_of(tally: Tally, start_s: float, length_s: float, target_ms: float) -> Stretch:
    """What was counted in a stretch of time, as far as tuning wants to know."""
    in_time, worth = 0, 0.0
    for key, count in tally.durations.get("total", {}).items():
        latency_ms = middle_ms(key)
        if latency_ms <= target_ms:
            in_time += count
            worth += count * (1.0 - SPEED_WEIGHT * latency_ms / target_ms)
    counters = tally.counters
    errors = {name.removeprefix(ERROR): count for name, count in counters.items() if name.startswith(ERROR)}
    # Wrong requests and cancelled ones say nothing of the settings.
    faults = sum(count for code, count in errors.items() if not is_own_fault(code))
    others = sum(errors.values()) - faults
    # A request that failed has a total time too, and none of the stages: what is in time is what was served.
    successes = counters.get("ok", 0)
    served = min(1.0, successes / in_time) if in_time else 1.0
    return Stretch(
        start_s=start_s,
        length_s=length_s,
        arrived=max(0, counters.get("arrived", 0) - others),
        ended=successes + faults,
        in_time=min(in_time, successes),
        worth=worth * served,
        waited_ms=sum(_sum_ms(tally, stage) for stage in ("queue", "batching", "dispatch")),
        batching_ms=_sum_ms(tally, "batching"),
        dispatch_ms=_sum_ms(tally, "dispatch"),
        inference_ms=_sum_ms(tally, "inference"),
        successes=successes,
        cache_hits=counters.get("cache_hits", 0),
        failed_attempts=sum(count for name, count in counters.items() if name.startswith(ATTEMPT)),
        batches=sum(tally.sizes.values()),
        batched=sum(size * count for size, count in tally.sizes.items()),
        fit=tuple(counters.get(name, 0) for name in SIZE_LINE[:5]),
    )


def _sum_ms(tally: Tally, stage: str) -> float:
    return sum(middle_ms(key) * count for key, count in tally.durations.get(stage, {}).items())


def measured(stretches: Sequence[Stretch], target_ms: float) -> Measured:
    """What these stretches say of the settings that held in them."""
    scores = [stretch.score for stretch in stretches]
    hits = [stretch.hit_rate for stretch in stretches]
    arrived = sum(stretch.arrived for stretch in stretches)
    successes = sum(stretch.successes for stretch in stretches)
    ended = sum(stretch.ended for stretch in stretches)
    waited_ms = sum(stretch.waited_ms for stretch in stretches) / successes if successes else 0.0
    failed = sum(stretch.failed_attempts for stretch in stretches)
    return Measured(
        scores=sample_of([score for score in scores if score is not None]),
        rates=sample_of([stretch.ended / stretch.length_s for stretch in stretches if stretch.score is not None]),
        hits=sample_of([hit for hit in hits if hit is not None]),
        behind=arrived >= MIN_REQUESTS and (waited_ms > target_ms or ended < 0.9 * arrived),
        failed_share=failed / (ended + failed) if ended + failed else 0.0,
    )


def recent_of(look: Look, stretches: Sequence[Stretch], rules: Rules) -> list[Stretch]:
    """Of `stretches`, those of the last interval; of one shorter than two stretches, enough to hold one for certain."""
    longest_s = max((one.length_s for one in stretches), default=0.0)
    since_s = look.now_s - max(rules.interval_s, 2 * longest_s + LATE_S) - 1.0
    return [one for one in stretches if one.start_s >= since_s]


def rate_of(stretches: Iterable[Stretch]) -> float:
    """Arrivals per second over all of them."""
    parts = list(stretches)
    seconds = sum(stretch.length_s for stretch in parts)
    return sum(stretch.arrived for stretch in parts) / seconds if seconds else 0.0


def place_of(look: Look, recent: Sequence[Stretch], before: Place | None) -> Place | None:
    """Who serves what under which load; None where too little comes to say. A load between two levels stays of the one
    that it was of."""
    if not look.model or sum(stretch.arrived for stretch in recent) < MIN_REQUESTS:
        return None
    exact = math.log2(rate_of(recent))
    level = round(exact)
    if before is not None and abs(exact - before.level) < STEP_SHARE:
        level = before.level
    return Place(model=look.model, engine=look.engine, device=look.device, level=level)


def is_of(stretch: Stretch, place: Place) -> bool:
    """Whether a stretch's load is of the place's level."""
    return stretch.arrived > 0 and abs(math.log2(stretch.rate) - place.level) < SAME_LEVEL


def with_uncollected(stretches: Sequence[Stretch], known: Sequence[Uncollected]) -> tuple[Stretch, ...]:
    """The stretches with what really came, where collectors have counted what they took in."""
    return tuple(_with_arrivals(stretch, known) for stretch in stretches)


def _with_arrivals(stretch: Stretch, known: Sequence[Uncollected]) -> Stretch:
    middle_s = stretch.start_s + stretch.length_s / 2
    rate = next((one.rate for one in known if one.from_s <= middle_s < one.to_s), 0.0)
    return replace(stretch, arrived=max(0, round(stretch.arrived + rate * stretch.length_s))) if rate else stretch


def uncollected(stretches: Sequence[Stretch], before: tuple[float, int], now: tuple[float, int]) -> Uncollected | None:
    """What came and was not collected between two moments, by how many more are in flight than came and did not end;
    None where that is within what figures that are seconds late can be wrong by.

    Args:
        before: the moment, and how many were in flight then.
    """
    within = [one for one in stretches if one.start_s >= before[0] - one.length_s / 2]
    seconds, took_s = sum(one.length_s for one in within), now[0] - before[0]
    if seconds <= 0.0 or took_s <= 0.0:
        return None
    arrived = sum(one.arrived for one in within) / seconds
    ended = sum(one.ended for one in within) / seconds
    rate = (now[1] - before[1]) / took_s - (arrived - ended)
    if abs(rate) < NOTICEABLE_SHARE * max(arrived, ended, MIN_REQUESTS / took_s):
        return None
    return Uncollected(from_s=before[0], to_s=now[0], rate=rate)


def fitted(stretches: Iterable[Stretch]) -> tuple[float, float] | None:
    """a and b of a·n + b, the milliseconds of a batch of n; None until batches of two sizes were seen."""
    line = fitted_line([sum(parts) for parts in zip(*(one.fit for one in stretches), strict=True)])
    return None if line is None else (line.slope, line.fixed_ms)
