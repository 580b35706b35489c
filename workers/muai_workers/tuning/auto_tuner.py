"""`AutoTuner`: looks at the fleet, decides, sets, and writes down what it did and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from muai_config.errors import ConfigError
from muai_producers.errors import ConfigConflictError, InvalidConfigError
from muai_producers.monitoring.events import tuning_decided
from muai_producers.performance.monitor import PerformanceMonitor
from muai_producers.runtime_config.editing import ConfigEditor
from muai_producers.runtime_config.versions import ConfigVersion, ConfigVersions
from muai_producers.store import Store
from muai_workers.tuning.advising import advice
from muai_workers.tuning.deciding import TUNER, Step, advance, stand_down
from muai_workers.tuning.looking import TunerLook, rules_of, values_of
from muai_workers.tuning.measuring import recent_of
from muai_workers.tuning.proposing import moves, situation_of
from muai_workers.tuning.records import KEYS, Look, Parameter, Rules, TunerState, TuningEvent, Values
from muai_workers.tuning.store import TuningStore

if TYPE_CHECKING:
    from muai_config import Settings

log = logging.getLogger(__name__)
TRIES = 5
"""Others may change other settings while the tuner sets its own."""
SWITCHED_OFF = "tuning is switched off"


class TuningRecommendations(msgspec.Struct, frozen=True, kw_only=True):
    """What the tuner would do, with the specification's names; None leaves a parameter as it is."""

    batch_size: int | None = None
    batch_timeout_ms: int | None = None
    cache_size_mb: int | None = None
    rationale: str = ""
    quantization: str = ""
    """Advice alone."""


class AutoTuner:
    """Tunes the whole fleet. Any number of them may run: what each decides is written once.

    `run` is what the schedule runs, every few seconds; it decides once per `tuning_interval_seconds`. In between it
    sees to it that nothing stays on trial while an alert is open or after tuning was switched off.

    Args:
        settings: files and environment, without what is changed at run time.
        wall_s: wall-clock seconds.
    Raises:
        redis.exceptions.RedisError: from every method, when the state store does not answer.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        monitor: PerformanceMonitor,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._looks = TunerLook(settings, store, monitor, wall_s)
        self._versions = ConfigVersions(store)
        self._editor = ConfigEditor(settings, self._versions, wall_s)
        self._configured = values_of(settings)
        self.memory = TuningStore(store)

    def run(self) -> list[TuningEvent]:
        """Take a look and do what follows; returns what was decided."""
        try:
            settings, version = self._looks.settings()
        except ConfigError as error:
            log.warning("the tuner waits: %s", error)
            return []
        state, seen = self.memory.state()
        figures = settings.monitoring
        if not (settings.optimization.tuner.enabled and figures.enabled and figures.performance.enabled):
            return self._stand_down(state, self._looks.brief(settings, version), seen) if seen else []
        rules, look = rules_of(settings), self._looks.brief(settings, version)
        if not set(state.originals) <= set(rules.bounds):
            return self._stand_down(state, look, seen, rules.bounds)
        if state.values is not None and look.values == state.values and not look.incident and look.now_s < state.due_s:
            return []
        look = self._looks.take(settings, version, rules)
        step = _with_advice(advance(state, look, self.memory.knowledge, rules), state.advice, look, rules)
        return self._carry_out(step, look, seen)

    def _carry_out(self, step: Step, look: Look, seen: bytes) -> list[TuningEvent]:
        # The intention first: a tuner that dies in between finds it, and that nothing was set, and sets it again.
        written = self.memory.commit(seen, step.state, (), step.learnt)
        if written is None:
            log.info("another control worker has tuned meanwhile")
            return []
        made = 0
        if step.values is not None:
            version = self._set(look, step, step.values)
            if version is None:
                # What the next look finds is taken as it is.
                self.memory.commit(written, replace(step.state, values=look.values, trial=None))
                return []
            made = version.number
        events = [replace(event, version=made) for event in step.events]
        self.memory.commit(written, replace(step.state, version=made or step.state.version), events)
        tell(events)
        return events

    def _stand_down(
        self, state: TunerState, look: Look, seen: bytes, still_tuned: Collection[Parameter] = ()
    ) -> list[TuningEvent]:
        step = stand_down(state, look, still_tuned)
        if state == step.state:
            return []
        # The other way round: what is given back twice is given back once.
        self._give_back(step.restore)
        if self._versions.current().canary is not None:
            self._editor.set({}, by=TUNER, why=SWITCHED_OFF)
        if self.memory.commit(seen, step.state, step.events) is None:
            return []
        tell(step.events)
        return list(step.events)

    # -- setting -------------------------------------------------------------------------------------------------

    def _set(self, look: Look, step: Step, wanted: Values) -> ConfigVersion | None:
        """Make the values a version; None when somebody else has changed them, which the next look will see."""
        changes = look.values.changes_to(wanted)
        for _ in range(TRIES):
            number = self._versions.current_number()
            try:
                version = self._versions.version(number)
                if number != look.version and any(
                    version.overrides.get(KEYS[name]) != look.overridden.get(name) for name in changes
                ):
                    return None
                if step.canary:
                    alone = {KEYS[name]: value for name, value in changes.items()}
                    return self._editor.try_on(step.canary, alone, by=TUNER, why=step.why, expected=number)
                return self._change(changes, step.state.originals, step.why, number)
            except ConfigConflictError:
                continue
            except InvalidConfigError as error:
                log.warning("the tuner's step is not allowed beside the other settings: %s", error.message)
                return None
        return None

    def _change(
        self, changes: Mapping[Parameter, int], originals: Mapping[Parameter, int | None], why: str, number: int
    ) -> ConfigVersion:
        """Set what is to be set, and unset what goes back to what files and environment say."""
        back = [
            name
            for name, value in changes.items()
            if originals.get(name) is None and name in originals and value == self._configured.of(name)
        ]
        version = self._versions.version(number)
        setting = {KEYS[name]: value for name, value in changes.items() if name not in back}
        if setting or not back:
            # With nothing to set, it ends what one process had alone.
            version = self._editor.set(setting, by=TUNER, why=why, expected=number)
            number = version.number
        if back:
            version = self._editor.unset([KEYS[name] for name in back], by=TUNER, why=why, expected=number)
        return version

    def _give_back(self, restore: Mapping[Parameter, int | None]) -> None:
        why = SWITCHED_OFF
        setting = {KEYS[name]: value for name, value in restore.items() if value is not None}
        if setting:
            self._editor.set(setting, by=TUNER, why=why)
        unset = [KEYS[name] for name, value in restore.items() if value is None]
        if unset:
            self._editor.unset(unset, by=TUNER, why=why)

    # -- the specification's -------------------------------------------------------------------------------------

    def analyze_performance(self) -> TuningRecommendations:
        """What the tuner would try next, from the performance data of now. Changes nothing, be tuning on or off.

        Raises:
            ConfigError: this process's own file contradicts the runtime configuration.
        """
        settings, version = self._looks.settings()
        rules = rules_of(settings)
        look = self._looks.take(settings, version, rules)
        now = situation_of(look.stretches, rules.target_ms)
        told = advice(look, now, rules)
        found = moves(look, now, rules) if look.stretches and look.model else []
        if not found:
            why = "nothing is to be gained" if look.model else "there are no performance data of this window"
            return TuningRecommendations(rationale=why, quantization=told)
        changes = look.values.changes_to(found[0].values)
        return TuningRecommendations(
            batch_size=changes.get("batch_size"),
            batch_timeout_ms=changes.get("batch_timeout_ms"),
            cache_size_mb=changes.get("cache_size_mb"),
            rationale=found[0].why,
            quantization=told,
        )

    def apply_tuning(self, recommendations: TuningRecommendations) -> ConfigVersion:
        """Set what is recommended, as a version of the runtime configuration; the tuner takes it for somebody's own
        change, neither judged nor taken back.

        Raises:
            InvalidConfigError: the whole would be wrong.
        """
        given = {KEYS[name]: getattr(recommendations, name) for name in KEYS}
        changes = {key: value for key, value in given.items() if value is not None}
        if not changes:
            return self._versions.current()
        return self._editor.set(changes, by="apply_tuning", why=recommendations.rationale)

    def get_tuning_history(self, count: int = 100) -> list[TuningEvent]:
        """The last decisions, newest first."""
        return self.memory.history(count)


def _with_advice(step: Step, before: str, look: Look, rules: Rules) -> Step:
    """The step, with advice where nothing else is left to do; told once as long as it holds."""
    if step.values is not None or step.state.trial is not None or not step.learnt:
        return step
    recent = recent_of(look, look.stretches, rules)
    told = advice(look, situation_of(recent, rules.target_ms), rules)
    state = replace(step.state, advice=told)
    # Its figures change from look to look; what it advises does not.
    if not told or before:
        return replace(step, state=state)
    event = TuningEvent(at=look.now_s, outcome="advised", parameter="quantization", old={}, new={}, rationale=told)
    return replace(step, state=state, events=(*step.events, event))


def tell(events: list[TuningEvent] | tuple[TuningEvent, ...]) -> None:
    """To the log and to the metrics."""
    for event in events:
        tuning_decided(event.parameter or "all", event.outcome)
        changes = ", ".join(
            f"{name} {event.old.get(name, 'as configured')} -> {event.new.get(name, 'as configured')}"
            for name in {**event.old, **event.new}
        )
        log.info("tuner: %s %s: %s", event.outcome, changes or event.parameter or "nothing", event.rationale)
