"""What of the figures the tuner takes for recent."""

from __future__ import annotations

import pytest

from muai_workers.tuning.measuring import recent_of
from muai_workers.tuning.records import LATE_S, Bounds, Look, Rules, Stretch, Values

STRETCH_S = 10.0
RULES = {"bounds": {"batch_size": Bounds(1, 64)}}


@pytest.mark.parametrize("second", range(10))
@pytest.mark.parametrize("interval_s", [5.0, 15.0, 60.0])
def test_given_any_moment_then_a_whole_stretch_is_recent_though_intervals_be_short(
    interval_s: float, second: int
) -> None:
    """Else a fleet with thousands of requests waiting seems to have nothing to do."""
    now_s = 1000.0 + second
    starts = [STRETCH_S * number for number in range(110)]
    stretches = tuple(
        Stretch(start_s=start_s, length_s=STRETCH_S) for start_s in starts if start_s + STRETCH_S <= now_s - LATE_S
    )
    values = Values(batch_size=2, batch_timeout_ms=50, cache_size_mb=1024)
    look = Look(now_s=now_s, version=0, changed_by="", values=values, overridden={}, stretches=stretches)
    found = recent_of(look, look.stretches, Rules(interval_s=interval_s, **RULES))
    assert found
    assert found == list(stretches[-len(found) :])
    assert found[0].start_s >= now_s - max(interval_s, 2 * STRETCH_S + LATE_S) - 1.0
