"""Whether a step has helped: figures before it and after it, and whether the difference is more than noise. Pure."""

from __future__ import annotations

from typing import Literal

from muai_workers.tuning.comparing import Sample, chance_of_rise
from muai_workers.tuning.proposing import MIN_GAIN
from muai_workers.tuning.records import MIN_STRETCHES, Measured, Trial

LEVEL_OF_PROOF = 0.05
RESOLUTION = 0.002
"""Worth per request that a stretch cannot be told better than."""
RATE_GAIN = 0.03
"""While the engines are behind: least rise of what is served, as a share."""
MORE_FAILURES = 0.02
Verdict = Literal["better", "worse", "no different", "unclear"]


def judge(trial: Trial, after: Measured) -> tuple[Verdict, str]:
    """Whether a step has helped, by more than noise, and how one can tell."""
    before = trial.before
    if after.scores.count < MIN_STRETCHES:
        return "unclear", "too little was measured"
    if after.failed_share > before.failed_share + MORE_FAILURES:
        return (
            "worse",
            f"{100 * after.failed_share:.1f} % of attempts failed, before it {100 * before.failed_share:.1f} %",
        )
    if trial.parameter == "cache_size_mb" and not trial.relief:
        verdict, why = _compared("share of requests that find something cached", before.hits, after.hits, MIN_GAIN)
        hurt, hurts = _compared("worth per request", before.scores, after.scores, MIN_GAIN)
        return (hurt, hurts) if hurt == "worse" else (verdict, why)
    verdict, why = _compared("worth per request", before.scores, after.scores, MIN_GAIN)
    if verdict == "better" or not (before.behind or after.behind):
        return verdict, why
    # Answers are late for what had piled up already, whatever is done now: more served is what counts.
    least = RATE_GAIN * max(before.rates.mean, 1e-9)
    rated, rates = _compared("requests served per second", before.rates, after.rates, least)
    if rated == "worse" or (rated == "better" and (before.behind or verdict != "worse")):
        return rated, rates
    if before.behind and not after.behind:
        return "better", f"the engines keep up now; {why}"
    return ("worse", why) if verdict == "worse" and not before.behind else (rated, rates)


def _compared(what: str, before: Sample, after: Sample, least: float) -> tuple[Verdict, str]:
    """One figure before and after; a difference below `least` is none, however sure."""
    rise = after.mean - before.mean
    resolution = RESOLUTION * max(1.0, before.mean)
    up = chance_of_rise(before, after, resolution)
    told = f"{what} {before.mean:.3g} before, {after.mean:.3g} after (p = {min(up, 1 - up):.2g})"
    if up < LEVEL_OF_PROOF and rise >= least:
        return "better", told
    if up > 1 - LEVEL_OF_PROOF and -rise >= least and before.count >= 2 and after.count >= 2:
        return "worse", told
    if abs(rise) < least:
        return "no different", told
    return "unclear", told
