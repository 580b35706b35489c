"""Which engine serves a request next: pure decisions over plain values, with the clock passed in.

The collector resolves the chain and takes the first attempt from it, an engine worker takes the next attempt when its
own engine failed, and `OptimizationManager` does both in process: all three through the functions here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from muai_producers.errors import (
    EngineError,
    EnginesExhaustedError,
    EngineUnavailableError,
    MuaiError,
    OutOfMemoryError,
    UnsupportedParameterError,
)
from muai_producers.fleet import FleetView
from muai_producers.wire import Attempt


@dataclass(frozen=True)
class EngineState:
    """What is known of one engine, for one model, at the moment of a decision."""

    available: bool
    reason: str = ""
    """Why it is not available; unread when it is."""
    cooling_until_s: float = 0.0
    """Until then the engine is passed over, because it failed."""

    def after_failure(self, now_s: float, cooldown_s: float) -> EngineState:
        """The state once the engine as a whole has failed."""
        return replace(self, cooling_until_s=now_s + cooldown_s)

    def after_success(self) -> EngineState:
        """The state once the engine has served something."""
        return replace(self, cooling_until_s=0.0)


@dataclass(frozen=True)
class NextAttempt:
    """Where a request goes now."""

    engine: str | None
    """None: the chain is spent."""
    rest: tuple[str, ...]
    """Engines still to be tried after `engine`, in order."""
    skipped: tuple[Attempt, ...]
    """Engines passed over on the way to `engine`, each with its reason."""


def resolve_chain(
    preference: Sequence[str], configured: Sequence[str], allowed: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Order the engines that a request may be tried on: what it prefers first, then the configured order.

    Args:
        preference: the request's own engines, best first; may be empty.
        configured: the model's chain, or the settings' `engine_preference`.
        allowed: engines that may serve at all; None: any that `preference` or `configured` names.
    Returns:
        every engine once.
    """
    ordered = dict.fromkeys((*preference, *configured))
    if allowed is None:
        return tuple(ordered)
    permitted = set(allowed)
    return tuple(name for name in ordered if name in permitted)


def next_attempt(chain: Sequence[str], states: Mapping[str, EngineState], now_s: float) -> NextAttempt:
    """Take the first engine of `chain` that can run now.

    Calling it again with the returned `rest` moves on, so no engine is tried twice.

    Args:
        chain: engines not tried yet, in order.
        states: by engine; one that is missing here counts as unavailable.
        now_s: seconds on the clock of `cooling_until_s`.
    """
    skipped: list[Attempt] = []
    for position, name in enumerate(chain):
        obstacle = _obstacle(name, states.get(name), now_s)
        if obstacle is None:
            return NextAttempt(name, tuple(chain[position + 1 :]), tuple(skipped))
        skipped.append(attempt(name, obstacle))
    return NextAttempt(None, (), tuple(skipped))


def route(chain: Sequence[str], model: str, fleet: FleetView) -> NextAttempt:
    """Take the first engine of `chain` that has a live worker and is not cooling down for the model.

    When every live engine is cooling down, the first of them is tried nevertheless: it may have recovered, and a
    refusal for certain helps nobody.

    Returns:
        no engine when none of the chain has a live worker.
    """
    states = {
        engine: EngineState(
            available=fleet.slots(engine) > 0 and (engine, model) not in fleet.cooling,
            reason=_absence(engine, fleet.cooling.get((engine, model))),
        )
        for engine in chain
    }
    found = next_attempt(chain, states, 0.0)
    if found.engine is not None:
        return found
    return next_attempt(
        chain, {engine: EngineState(fleet.slots(engine) > 0, state.reason) for engine, state in states.items()}, 0.0
    )


def _absence(engine: str, cooling_because: str | None) -> str:
    if cooling_because:
        return f"{engine} failed a short while ago and is passed over: {cooling_because}"
    return f"no {engine} worker is running"


def attempt(engine: str, error: MuaiError) -> Attempt:
    """Record that `engine` did not serve the request."""
    return Attempt(engine=engine, error=error.to_wire())


def cools_engine(error: MuaiError) -> bool:
    """Whether an error that left a whole batch unserved says that the engine should be passed over for a while.

    Running out of memory does not: the next batch may be smaller. Nor does a parameter that the engine does not have.
    """
    return isinstance(error, EngineError) and not isinstance(error, OutOfMemoryError | UnsupportedParameterError)


def chain_spent(model: str, attempts: Sequence[Attempt]) -> EnginesExhaustedError:
    """The error for a request that no engine of its chain served; names every engine and what it answered."""
    told = "; ".join(f"{one.engine}: {one.error.get('message', '')}" for one in attempts) or "the chain is empty"
    history = [{"engine": one.engine, "error": one.error} for one in attempts]
    return EnginesExhaustedError(f"no engine could serve {model}: {told}", {"model": model, "attempts": history})


def _obstacle(name: str, state: EngineState | None, now_s: float) -> EngineUnavailableError | None:
    if state is None:
        return EngineUnavailableError(f"no engine named {name} is running", {"engine": name})
    if not state.available:
        return EngineUnavailableError(state.reason, {"engine": name})
    if state.cooling_until_s > now_s:
        rest_s = state.cooling_until_s - now_s
        message = f"{name} failed a short while ago and is passed over for {rest_s:.1f} s more"
        return EngineUnavailableError(message, {"engine": name, "retry_after_s": round(rest_s, 3)})
    return None
