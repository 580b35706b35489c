"""The tuner's decisions: a state machine of plain values, with the clock passed in. Pure.

One step at a time: it is made, measured over an interval, kept where it helped by more than noise, taken back where it
did not. A step that did not help is not tried again under the same load until `FORGET_S` have passed, so that the tuner
comes to rest. What held last under a load is where it starts when that load comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from muai_workers.tuning.canary import alone_first, spread_from, valid_there
from muai_workers.tuning.judging import judge
from muai_workers.tuning.measuring import is_of, measured, place_of, recent_of, uncollected, with_uncollected
from muai_workers.tuning.proposing import MIN_GAIN, PATIENCE, Move, bounds_of, move_to, moves, situation_of
from muai_workers.tuning.records import (
    MIN_STRETCHES,
    PARAMETERS,
    SETTLE_S,
    Knowledge,
    Look,
    Measured,
    Outcome,
    Parameter,
    Place,
    Rules,
    Stretch,
    Trial,
    TunerState,
    TuningEvent,
    Values,
)

MAX_PROLONGED = 1
WAKES = 2 * MIN_GAIN
"""Worth per request that must be lost before the tuner, once at rest, tries again under the same load."""
FORGET_S = 86_400.0
MAX_GAP = 3
"""Intervals after which what was in flight at the last decision says nothing any more."""
ALERT = "alert "
"""What the reason of an incident begins with."""
ALLOWED_LATE_S = 1.0
"""Looks come a little early or late."""
TUNER = "tuner"
"""Who the versions of the runtime configuration are by."""
Recall = Callable[[Place], Knowledge | None]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What follows from a look."""

    state: TunerState
    values: Values | None = None
    """What to set; None: nothing is to be changed. Whatever is on trial at one process alone ends with it."""
    canary: str = ""
    """The process that alone is to have `values`; '': all are."""
    restore: dict[Parameter, int | None] = {}
    """What to go back to: the runtime configuration's value before the tuner's, or None for none."""
    events: tuple[TuningEvent, ...] = ()
    learnt: tuple[tuple[Place, Knowledge], ...] = ()

    @property
    def why(self) -> str:
        """The reason, for the version of the runtime configuration."""
        return "; ".join(event.rationale for event in self.events)


def advance(state: TunerState, look: Look, recall: Recall, rules: Rules) -> Step:
    """The next step.

    Args:
        recall: what is known of a place.
    """
    state, events, lost = _reconciled(state, look)
    if lost:
        return Step(state=state, values=state.values)
    if look.incident:
        return _held(state, look, rules, events)
    if look.now_s < state.due_s - ALLOWED_LATE_S:
        return Step(state=state, events=events)
    state, look = _counted(state, look, rules)
    state = msgspec.structs.replace(state, due_s=look.now_s + rules.interval_s, holding="")
    step = _decided(state, look, recall, rules)
    return msgspec.structs.replace(step, events=(*events, *step.events))


def _counted(state: TunerState, look: Look, rules: Rules) -> tuple[TunerState, Look]:
    """The look with all that came, also while more waits at the broker than collectors take in."""
    replace = msgspec.structs.replace
    known, now_s = state.uncollected, look.now_s
    is_recent = now_s - state.looked_s <= MAX_GAP * rules.interval_s
    if look.in_flight is not None and state.in_flight is not None and is_recent:
        found = uncollected(look.stretches, (state.looked_s, state.in_flight), (now_s, look.in_flight))
        known = known if found is None else (*known, found)
    known = tuple(one for one in known if one.to_s >= now_s - rules.window_s - rules.interval_s)
    state = replace(state, in_flight=look.in_flight, looked_s=now_s, uncollected=known)
    return state, replace(look, stretches=with_uncollected(look.stretches, known))


def stand_down(state: TunerState, look: Look, still_tuned: Collection[Parameter] = ()) -> Step:
    """Tuning was switched off, but for some parameters: what the tuner has set of the others, and nobody else has
    since, goes back to what it found."""
    mine = state.values
    given_up = {} if mine is None else {name: was for name, was in state.originals.items() if name not in still_tuned}
    back = {name: was for name, was in given_up.items() if mine and look.values.of(name) == mine.of(name)}
    fresh = TunerState()
    if still_tuned:
        kept = {name: was for name, was in state.originals.items() if name in still_tuned}
        fresh = msgspec.structs.replace(state, values=None, trial=None, originals=kept)
    if not back:
        return Step(state=fresh)
    event = TuningEvent(
        at=look.now_s,
        outcome="stood_down",
        parameter="",
        old={name: look.values.of(name) for name in back},
        new={name: was for name, was in back.items() if was is not None},
        rationale=f"tuning of {', '.join(back)} is switched off: as configured again",
    )
    return Step(state=fresh, restore=back, events=(event,))


# -- before anything else --------------------------------------------------------------------------------------------


def _reconciled(state: TunerState, look: Look) -> tuple[TunerState, tuple[TuningEvent, ...], bool]:
    """The state as the configuration really is; the last is true where the tuner's own write never came about."""
    replace, mine = msgspec.structs.replace, state.values
    if mine is None:
        return replace(state, values=look.values, version=look.version, since_s=look.now_s), (), False
    if look.values == mine:
        events: tuple[TuningEvent, ...] = ()
        canary = state.trial.canary if state.trial is not None else ""
        if look.alone != canary:
            if not canary:
                # Its end was written down, and never came about.
                return replace(state, since_s=look.now_s, due_s=look.now_s + SETTLE_S), (), True
            if look.version != state.version:
                undone = _undone(state, look, f"taken back unjudged: {look.changed_by or 'somebody'} set something")
                events = undone.events
            state = replace(state, trial=None, since_s=look.now_s)
        if look.version != state.version and look.changed_by != TUNER:
            # Something else was changed: what was measured before does not hold.
            state = replace(state, since_s=look.now_s, trial=_renewed(state.trial, look.now_s))
        return replace(state, version=look.version), events, False
    if look.version == state.version:
        trial = _renewed(state.trial, look.now_s)
        return replace(state, since_s=look.now_s, trial=trial, due_s=look.now_s + SETTLE_S), (), True
    theirs = {name: was for name, was in state.originals.items() if look.values.of(name) == mine.of(name)}
    event = _event(look, "adopted", "", mine, look.values, f"{look.changed_by or 'somebody'} set them", state.place)
    fresh = replace(state, values=look.values, version=look.version, since_s=look.now_s, trial=None, originals=theirs)
    return fresh, (event,), False


def _renewed(trial: Trial | None, now_s: float) -> Trial | None:
    return None if trial is None else msgspec.structs.replace(trial, began_s=now_s)


def _held(state: TunerState, look: Look, rules: Rules, events: tuple[TuningEvent, ...]) -> Step:
    """An incident: nothing is tried, and what is on trial is taken back at once."""
    replace = msgspec.structs.replace
    held = replace(state, holding=look.incident, due_s=look.now_s + rules.interval_s, since_s=look.now_s)
    if state.trial is None:
        if state.holding.startswith(ALERT):
            return Step(state=held, events=events)
        assert state.values is not None
        paused = _event(look, "paused", "", state.values, state.values, look.incident, state.place)
        return Step(state=held, events=(*events, paused))
    undone = _undone(state, look, f"taken back unjudged: {look.incident}")
    return replace(undone, state=replace(undone.state, holding=look.incident), events=(*events, *undone.events))


# -- deciding --------------------------------------------------------------------------------------------------------


def _decided(state: TunerState, look: Look, recall: Recall, rules: Rules) -> Step:
    replace = msgspec.structs.replace
    recent = recent_of(look, look.stretches, rules)
    place = place_of(look, recent, state.place)
    if place is None:
        idle = replace(state, holding="too little comes to judge by")
        return (
            _undone(idle, look, "taken back unjudged: too little comes to judge by")
            if state.trial
            else Step(state=idle)
        )
    if place != state.place:
        if state.trial is None or not (state.trial.before.behind and measured(recent, rules.target_ms).behind):
            return _moved(state, look, place, recall, rules)
        # Behind before and after: what counts is how many are served, and that does not hang on how many come.
        state = replace(state, place=place)
    if state.trial is not None:
        return _judged(state, state.trial, look, place, recall, rules)
    return _tried(state, look, place, recall(place), _valid(look, state.since_s, place, rules), rules)


def _moved(state: TunerState, look: Look, place: Place, recall: Recall, rules: Rules) -> Step:
    """The load, or what is served, has changed: a trial that is on cannot be judged any more."""
    replace, came_from, base = msgspec.structs.replace, state.place, state.values
    assert base is not None
    state = replace(state, place=place)
    known = recall(place) or _nearest(place, recall)
    stretches = _valid(look, look.now_s - rules.interval_s - 1.0, place, rules)
    before = measured(stretches, rules.target_ms)
    smaller = before.behind and known is not None and known.best.batch_size < base.batch_size
    if smaller and situation_of(stretches, rules.target_ms).drains_in_s <= PATIENCE * rules.interval_s:
        # What has piled up under another load is still to be worked off: that wants what this load alone would not.
        return Step(state=replace(state, place=came_from, holding="what has piled up is worked off first"))
    undone = Step(state=state)
    if state.trial is not None:
        undone = _undone(state, look, "taken back unjudged: the load has changed")
        base = state.trial.old
    wanted = base if known is None or smaller else _bounded(known.best, look, rules)
    if wanted != base:
        move = move_to(base, wanted, f"what did best for {place}")
        return _begun(undone, look, place, _trial(move, base, look, before, recalled=True))
    if state.trial is not None:
        return undone
    return _tried(state, look, place, known, stretches, rules)


def _nearest(place: Place, recall: Recall) -> Knowledge | None:
    """What is known of the next level above or below: nearer to right than what suits a load far off."""
    for level in (place.level + 1, place.level - 1):
        known = recall(msgspec.structs.replace(place, level=level))
        if known is not None:
            return known
    return None


def _judged(state: TunerState, trial: Trial, look: Look, place: Place, recall: Recall, rules: Rules) -> Step:
    replace = msgspec.structs.replace
    # Batches that were formed before the change and wait for an engine tell nothing of it.
    stretches = _valid(look, trial.began_s + SETTLE_S, place, rules)
    if trial.canary and trial.canary != look.canary:
        return _undone(state, look, f"taken back unjudged: {trial.canary} batches other things now, or is gone")
    after = measured(valid_there(trial, look, rules) if trial.canary else stretches, rules.target_ms)
    verdict, why = judge(trial, after)
    promises = after.scores.mean > trial.before.scores.mean + MIN_GAIN
    if verdict == "unclear" and trial.prolonged < MAX_PROLONGED + promises:
        # What is only too short yet is no doubt.
        longer = replace(trial, prolonged=trial.prolonged + (after.scores.count >= MIN_STRETCHES))
        return Step(state=replace(state, trial=longer, holding=f"{trial.move}: not clear yet, {why}"))
    if trial.canary and verdict == "better":
        return _spread(state, trial, look, place, why)
    known = recall(place)
    spent = {} if known is None else {move: at for move, at in known.spent.items() if look.now_s - at < FORGET_S}
    # Where memory is to be freed, or the step was learnt, no difference speaks for it; else for what was there.
    keeps = verdict == "better" or (verdict != "worse" and (trial.relief or trial.recalled))
    if keeps:
        back = msgspec.structs.replace(trial, old=trial.new, new=trial.old).move
        learnt = Knowledge(best=trial.new, score=after.scores.mean, at_s=look.now_s, spent=spent | {back: look.now_s})
        event = _event(look, "kept", trial.parameter, trial.old, trial.new, why, place)
        kept = replace(state, trial=None, since_s=trial.began_s)
        step = Step(state=kept, events=(event,), learnt=((place, learnt),))
        return _and_then(step, look, place, learnt, stretches, rules)
    before = trial.before_all if trial.canary else trial.before
    learnt = Knowledge(
        best=trial.old, score=before.scores.mean, at_s=look.now_s, spent=spent | {trial.move: look.now_s}
    )
    step = _undone(state, look, why)
    step = replace(step, learnt=((place, learnt),))
    if verdict == "worse":
        # What it has done has to wear off before anything else can be judged.
        return step
    return _and_then(step, look, place, learnt, stretches, rules, before, trial.before if trial.canary else None)


def _spread(state: TunerState, trial: Trial, look: Look, place: Place, why: str) -> Step:
    """A step that has helped where it was tried first: now for all, who are to show the same."""
    event = _event(look, "spread", trial.parameter, trial.old, trial.new, f"at {trial.canary}: {why}", place)
    state = msgspec.structs.replace(
        state, values=trial.new, trial=spread_from(trial, look.now_s), since_s=look.now_s, version=look.version
    )
    return Step(state=state, values=trial.new, events=(event,))


def _and_then(
    step: Step,
    look: Look,
    place: Place,
    known: Knowledge,
    stretches: Sequence[Stretch],
    rules: Rules,
    before: Measured | None = None,
    before_there: Measured | None = None,
) -> Step:
    """After a verdict, the next trial in the same version: what held before it was measured already."""
    values = step.state.values
    assert values is not None
    look = msgspec.structs.replace(look, values=values)
    return _tried(step.state, look, place, known, stretches, rules, before, step, before_there)


def _tried(
    state: TunerState,
    look: Look,
    place: Place,
    known: Knowledge | None,
    stretches: Sequence[Stretch],
    rules: Rules,
    before: Measured | None = None,
    after: Step | None = None,
    before_there: Measured | None = None,
) -> Step:
    """Begin the likeliest trial that is left, if any is."""
    base = state.values
    assert base is not None
    nothing = after or Step(state=state)
    outside = _bounded(base, look, rules)
    # What had piled up once and is worked off says nothing of how these values do.
    recent = recent_of(look, stretches, rules)
    if measured(stretches, rules.target_ms).behind != measured(recent, rules.target_ms).behind:
        stretches = recent
    measured_now = before or measured(stretches, rules.target_ms)
    if outside != base:
        move = move_to(base, outside, "into the bounds of optimization.tuner")
        return _begun(nothing, look, place, _trial(move, base, look, measured_now, recalled=True))
    if measured_now.scores.count < MIN_STRETCHES:
        return nothing
    now = situation_of(stretches, rules.target_ms, look.stretches)
    spent = known.spent if known else {}
    # Where batches of one size alone were seen, a step that does not help still teaches what batches take.
    rests = known is not None and now.curve is not None and _rests(known, base, measured_now, look.now_s)
    for move in moves(look, now, rules):
        if rests and move.parameter != "cache_size_mb":
            continue
        trial = _trial(move, base, look, measured_now)
        if look.now_s - spent.get(trial.move, float("-inf")) >= FORGET_S:
            starts = {one.start_s for one in stretches}
            there = [one for one in look.canary_stretches if one.start_s in starts]
            trial = alone_first(trial, look, before_there or measured(there, rules.target_ms))
            return _begun(nothing, look, place, trial)
    if rests:
        return nothing
    learnt = _settled(known, base, measured_now, look.now_s)
    return msgspec.structs.replace(nothing, learnt=(*nothing.learnt, (place, learnt)))


def _rests(known: Knowledge, values: Values, now: Measured, now_s: float) -> bool:
    """Whether the tuner came to rest with these values and nothing has become worse: what it would try now is what
    chance suggests."""
    is_fresh = known.at_rest and known.best == values and now_s - known.at_s < FORGET_S
    return is_fresh and not now.behind and now.scores.mean > known.score - WAKES


def _settled(known: Knowledge | None, values: Values, now: Measured, now_s: float) -> Knowledge:
    """There is nothing left to try here: that is worth remembering too."""
    spent = known.spent if known else {}
    return Knowledge(best=values, score=now.scores.mean, at_s=now_s, spent=spent, at_rest=True)


def _valid(look: Look, since_s: float, place: Place, rules: Rules) -> list[Stretch]:
    """Stretches that tell of the values of now under the load of now."""
    oldest_s = look.now_s - max(rules.window_s, rules.interval_s) - 1.0
    return [one for one in look.stretches if one.start_s >= oldest_s and one.formed_s >= since_s and is_of(one, place)]


def _bounded(values: Values, look: Look, rules: Rules) -> Values:
    """`values` with what may be changed brought within its bounds, and the rest as it is now."""
    for name in PARAMETERS:
        bounds = bounds_of(look, rules, name)
        now = look.values.of(name)
        values = values.with_value(name, now if bounds is None else bounds.clamp(values.of(name)))
    return values


# -- writing it down -------------------------------------------------------------------------------------------------


def _begun(step: Step, look: Look, place: Place, trial: Trial) -> Step:
    old, new = trial.old, trial.new
    outcome: Outcome = "recalled"
    if not trial.recalled:
        outcome = "raised" if sum(new.changes_to(old).values()) < sum(old.changes_to(new).values()) else "lowered"
    found = {name: look.overridden.get(name) for name in old.changes_to(new)}
    state = msgspec.structs.replace(
        step.state,
        values=old if trial.canary else new,
        trial=trial,
        since_s=look.now_s,
        place=place,
        version=look.version,
        originals={**found, **step.state.originals},
    )
    why = f"{trial.why}; first at {trial.canary} alone" if trial.canary else trial.why
    event = _event(look, outcome, trial.parameter, old, new, why, place)
    return msgspec.structs.replace(step, state=state, values=new, canary=trial.canary, events=(*step.events, event))


def _trial(move: Move, old: Values, look: Look, before: Measured, *, recalled: bool = False) -> Trial:
    return Trial(
        parameter=move.parameter,
        old=old,
        new=move.values,
        began_s=look.now_s,
        why=move.why,
        before=before,
        relief=move.relief,
        recalled=recalled,
    )


def _undone(state: TunerState, look: Look, why: str) -> Step:
    trial = state.trial
    assert trial is not None
    event = _event(look, "rolled_back", trial.parameter, trial.new, trial.old, why, state.place)
    undone = msgspec.structs.replace(state, values=trial.old, trial=None, since_s=look.now_s, version=look.version)
    return Step(state=undone, values=trial.old, events=(event,))


def _event(
    look: Look, outcome: Outcome, parameter: str, old: Values, new: Values, why: str, place: Place | None
) -> TuningEvent:
    differing = old.changes_to(new)
    return TuningEvent(
        at=look.now_s,
        outcome=outcome,
        parameter=parameter,
        old={name: old.of(name) for name in differing},
        new={name: new.of(name) for name in differing},
        rationale=why,
        place="" if place is None else str(place),
    )
