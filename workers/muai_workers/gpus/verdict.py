"""Whether a GPU is well: the state of each, from what NVML tells of it and what its worker gets done. Pure.

Times are seconds of a monotonic clock, passed in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from muai_producers.fleet import GpuState
from muai_workers.gpus.nvml import Vitals
from muai_workers.gpus.xids import describe_xid, is_hardware

LONGEST_QUARANTINE_S = 3600.0
FORGIVEN_AFTER_S = 3600.0
"""After so much health a failure counts as the first again."""
COOLER_BY_C = 5.0
"""A GPU that was too hot is well again once it is this much below the limit, so that it does not come and go."""
# `nvmlDeviceGpuRecoveryAction_t`, by what the driver wants done.
RECOVERY_ACTIONS = {
    1: "a reset of the GPU",
    2: "a reboot",
    3: "an end of what it does with its peers",
    4: "a reset of the GPU once nothing runs on it",
}
WORKS_NEVERTHELESS = 3


@dataclass(frozen=True)
class Rules:
    """What the configuration says."""

    hang_s: float = 300.0
    """With requests in the engine. 0: nothing counts as hung."""
    load_hang_s: float = 1800.0
    """While a model is loaded. 0: that may take for ever."""
    quarantine_s: float = 60.0
    max_temperature_c: float | None = None


@dataclass(frozen=True)
class WorkerLook:
    """What the worker of a GPU is doing."""

    run: int
    """Which run of its process this is: what an earlier one did says nothing of this one."""
    in_flight: int
    """Requests that are in its engine."""
    progress: int
    """Answers and pieces of answers that its engine has given, in this run."""
    loading: tuple[str, ...] = ()
    """Models that it is loading."""

    @property
    def is_busy(self) -> bool:
        """Whether it has anything to do."""
        return bool(self.in_flight or self.loading)


@dataclass(frozen=True)
class Effort:
    """When a worker's GPU was last seen to do anything."""

    look: WorkerLook
    load: tuple[float | None, int | None]
    """The GPU's utilization and, while a model is loaded, its used memory."""
    since_s: float
    """Since then it has had work, answered none of it, and computed the same."""

    def hang(self, rules: Rules, now_s: float) -> str | None:
        """What is wrong, where it has had work for too long and done none."""
        limit_s = rules.hang_s if self.look.in_flight else rules.load_hang_s
        if not limit_s or not self.look.is_busy or now_s - self.since_s < limit_s:
            return None
        if self.look.in_flight:
            return f"it hangs: for {limit_s:g} s its worker had work and answered none, and its load did not change"
        models = ", ".join(self.look.loading)
        return (
            f"it hangs: for {limit_s:g} s its worker was loading {models}, and neither its load nor its memory changed"
        )


def next_effort(before: Effort | None, look: WorkerLook | None, vitals: Vitals, now_s: float) -> Effort | None:
    """The effort after one more look.

    Args:
        look: None: nobody knows what the worker does; then it cannot be hung.
    """
    if look is None:
        return None
    load = (vitals.utilization_percent, vitals.memory_used_bytes if look.loading else None)
    if (
        before is None
        or not look.is_busy
        or bool(before.look.in_flight) != bool(look.in_flight)
        or (before.look.run, before.look.progress, before.look.loading) != (look.run, look.progress, look.loading)
        or before.load != load
    ):
        return Effort(look, load, now_s)
    return replace(before, look=look)


@dataclass(frozen=True)
class GpuCase:
    """What is known of one GPU."""

    state: GpuState = "ok"
    reason: str = ""
    last_xid: int | None = None
    failures: int = 0
    """One after another, without an hour of health between two."""
    failed_s: float | None = None
    """When the last trouble that condemns it was seen."""
    ecc_uncorrected: int | None = None
    """At the last look: more at the next is a new error, fewer a GPU that was reset."""

    def quarantine_s(self, rules: Rules) -> float:
        """How long it must be well before it is used again."""
        doubled = rules.quarantine_s * 2.0 ** min(30, max(0, self.failures - 1))
        return min(max(LONGEST_QUARANTINE_S, rules.quarantine_s), doubled)


def unseen(before: GpuCase, reason: str) -> GpuCase:
    """The case while there is no driver to tell anything. A GPU that had failed stays failed; the worker of any other
    goes on, since not to see a fault is no fault.
    """
    return before if before.state == "failed" else replace(before, state="unseen", reason=reason)


def next_case(before: GpuCase, vitals: Vitals, hang: str | None, rules: Rules, now_s: float) -> GpuCase:
    """The case after one more look.

    Args:
        hang: see `Effort.hang`.
    """
    last_xid = vitals.xids[-1] if vitals.xids else before.last_xid
    ecc = before.ecc_uncorrected if vitals.ecc_uncorrected is None else vitals.ecc_uncorrected
    seen = replace(before, last_xid=last_xid, ecc_uncorrected=ecc)
    fault = _fault(before, vitals, rules) or hang
    if fault is not None:
        failures = before.failures
        if before.state != "failed":
            failures = failures + 1 if _failed_lately(before, rules, now_s) else 1
        return replace(seen, state="failed", reason=fault, failures=failures, failed_s=now_s)
    if before.state == "failed" and before.failed_s is not None:
        rest_s = before.failed_s + before.quarantine_s(rules) - now_s
        if rest_s > 0:
            return replace(seen, reason=_waiting(before.reason))
    concern = _concern(vitals)
    return replace(seen, state="degraded" if concern else "ok", reason=concern or "")


def _failed_lately(case: GpuCase, rules: Rules, now_s: float) -> bool:
    if case.failed_s is None:
        return False
    return now_s - case.failed_s < case.quarantine_s(rules) + FORGIVEN_AFTER_S


def _waiting(reason: str) -> str:
    suffix = "; well since, and not used again yet"
    return reason if reason.endswith(suffix) else reason + suffix


def _fault(before: GpuCase, vitals: Vitals, rules: Rules) -> str | None:
    """Why nothing should run on the GPU."""
    if vitals.lost:
        return f"it does not answer: {vitals.lost}"
    hardware = [xid for xid in vitals.xids if is_hardware(xid)]
    if hardware:
        return f"the driver reported {describe_xid(hardware[-1])}"
    if vitals.recovery_action and vitals.recovery_action != WORKS_NEVERTHELESS:
        wanted = RECOVERY_ACTIONS.get(vitals.recovery_action, f"recovery action {vitals.recovery_action}")
        return f"the driver wants {wanted}"
    if vitals.rows_failed:
        return "a broken row of its memory could not be replaced"
    if _more(before.ecc_uncorrected, vitals.ecc_uncorrected):
        return f"its memory has errors that cannot be corrected ({vitals.ecc_uncorrected} since the driver was loaded)"
    limit_c = vitals.shutdown_c if rules.max_temperature_c is None else rules.max_temperature_c
    if vitals.temperature_c is not None and limit_c is not None:
        was_too_hot = before.state == "failed" and "°C" in before.reason
        if vitals.temperature_c >= limit_c - (COOLER_BY_C if was_too_hot else 0.0):
            return f"it is too hot: {vitals.temperature_c:.0f} °C, and the limit is {limit_c:.0f} °C"
    return None


def _more(before: int | None, now: int | None) -> bool:
    return before is not None and now is not None and now > before


def _concern(vitals: Vitals) -> str | None:
    """What an operator should know of a GPU that works."""
    if vitals.recovery_action == WORKS_NEVERTHELESS:
        return f"the driver wants {RECOVERY_ACTIONS[WORKS_NEVERTHELESS]}"
    if vitals.rows_pending:
        return "a broken row of its memory is replaced at its next reset"
    if vitals.slowdown_c is not None and vitals.temperature_c is not None and vitals.temperature_c >= vitals.slowdown_c:
        return f"it is hot and therefore slow: {vitals.temperature_c:.0f} °C"
    return None
