"""Which engine a request goes to: pure decisions over the fleet as it was last seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from muai_producers.errors import EngineUnavailableError
from muai_producers.fleet import FleetView
from muai_producers.wire import Attempt


@dataclass(frozen=True)
class Route:
    """The engine to send to, what remains of the chain after it, and why engines before it were passed over."""

    engine: str
    rest: tuple[str, ...]
    skipped: tuple[Attempt, ...] = ()


def chain_for(preference: Sequence[str], configured: Sequence[str]) -> tuple[str, ...]:
    """The request's preferred engines first, as far as its model may run on them, then the rest of the chain."""
    preferred = [engine for engine in preference if engine in configured]
    return tuple(dict.fromkeys([*preferred, *configured]))


def choose_route(chain: Sequence[str], model: str, fleet: FleetView) -> Route | None:
    """The first engine of the chain that has a live worker and is not cooling down for the model.

    When every live engine is cooling down, the first of them is tried nevertheless: it may have recovered, and a
    refusal for certain helps nobody.

    Returns:
        None when no engine of the chain has a live worker; the request then waits for one.
    """
    live = [engine for engine in chain if fleet.slots(engine) > 0]
    if not live:
        return None
    ready = [engine for engine in live if (engine, model) not in fleet.cooling]
    engine = (ready or live)[0]
    at = chain.index(engine)
    skipped = tuple(_skipped(passed, model, fleet.cooling) for passed in chain[:at])
    return Route(engine, tuple(chain[at + 1 :]), skipped)


def _skipped(engine: str, model: str, cooling: Mapping[tuple[str, str], str]) -> Attempt:
    reason = cooling.get((engine, model))
    message = f"{engine} is cooling down: {reason}" if reason else f"no {engine} worker is running"
    return Attempt(engine=engine, error=EngineUnavailableError(message, {"engine": engine, "skipped": True}).to_wire())


def engines_of(chains: Iterable[Sequence[str]]) -> set[str]:
    """Every engine that any of the chains names."""
    return {engine for chain in chains for engine in chain}
