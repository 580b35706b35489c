"""Where there are several collectors, a step is tried on one of them before all have it. Pure.

What that one batches, it alone batches, so its figures are those of its batch keys.
"""

from __future__ import annotations

from msgspec.structs import replace

from muai_workers.tuning.records import MIN_STRETCHES, SETTLE_S, Look, Measured, Rules, Stretch, Trial


def alone_first(trial: Trial, look: Look, before: Measured) -> Trial:
    """The trial as one collector's alone, where there are others to be spared; else as it is.

    Args:
        before: what that collector's requests have shown; figures of all are in the trial.
    """
    acts_elsewhere = trial.old.cache_size_mb != trial.new.cache_size_mb
    if not look.canary or acts_elsewhere or trial.recalled or before.scores.count < MIN_STRETCHES:
        return trial
    return replace(trial, canary=look.canary, before=before, before_all=trial.before)


def spread_from(trial: Trial, now_s: float) -> Trial:
    """The trial as everybody's, from now on."""
    return replace(trial, canary="", before=trial.before_all, before_all=Measured(), began_s=now_s, prolonged=0)


def valid_there(trial: Trial, look: Look, rules: Rules) -> list[Stretch]:
    """The canary's stretches that tell of what is on trial."""
    oldest_s = look.now_s - max(rules.window_s, rules.interval_s) - 1.0
    since_s = trial.began_s + SETTLE_S
    return [one for one in look.canary_stretches if one.start_s >= oldest_s and one.formed_s >= since_s and one.arrived]
