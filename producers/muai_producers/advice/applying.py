"""Doing what a plan advises, as far as settings can change while processes run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from muai_config.runtime import reloadable_settings
from muai_producers.advice.records import ApplyRequest, ApplyResult, ConfigChange, NotApplied
from muai_producers.errors import InvalidRequestError

if TYPE_CHECKING:
    from muai_producers.runtime_config.editing import ConfigEditor
    from muai_producers.runtime_config.versions import ConfigVersions


def apply_plan(request: ApplyRequest, editor: ConfigEditor, versions: ConfigVersions, *, by: str) -> ApplyResult:
    """Make the plan's reloadable changes one version of the runtime configuration; the rest is told.

    Raises:
        InvalidRequestError: an optimization is named that the plan does not have, or two contradict each other.
        InvalidConfigError, ConfigConflictError: as `ConfigEditor.set`; nothing was written.
    """
    values, others = split(request)
    before = versions.current_number() if request.version is None else request.version
    if not values:
        return ApplyResult(version=before, rollback_to=before, applied={}, not_applied=others)
    why = request.why or f"advice for {request.plan.instance_id}"
    made = editor.set(values, by=by, why=why, expected=before)
    return ApplyResult(version=made.number, rollback_to=before, applied=values, not_applied=others)


def split(request: ApplyRequest) -> tuple[dict[str, Any], list[NotApplied]]:
    """The changes that can be made while processes run, by key, and the others with why they cannot. Pure."""
    reloadable = reloadable_settings()
    values: dict[str, Any] = {}
    others = []
    for change in _changes(request):
        if change.parameter not in reloadable:
            others.append(_not_applied(change, request))
        elif change.parameter in values and values[change.parameter] != change.recommended_value:
            raise InvalidRequestError(
                f"the plan has two values for {change.parameter}: choose among `optimizations`",
                {"field": "optimizations"},
            )
        else:
            values[change.parameter] = change.recommended_value
    return values, others


def _changes(request: ApplyRequest) -> Iterator[ConfigChange]:
    plan = request.plan
    by_name = {f"{one.type.value}_{index}": one for index, one in enumerate(plan.optimizations)}
    for name in by_name if request.optimizations is None else request.optimizations:
        if name not in by_name:
            has = ", ".join(by_name) or "none"
            raise InvalidRequestError(
                f"the plan has no optimization {name[:100]!r}; it has {has}", {"field": "optimizations"}
            )
        yield from by_name[name].config_changes


def _not_applied(change: ConfigChange, request: ApplyRequest) -> NotApplied:
    if change.parameter.startswith(("optimization.", "monitoring.", "queue.", "gateway.", "models.")):
        reason = "is read when a process starts: change the file, and restart what reads it"
    else:
        reason = f"is an option of {request.plan.instance_id}: restart that server with it"
    return NotApplied(parameter=change.parameter, recommended_value=change.recommended_value, reason=reason)
