"""What the tuner sees, remembers and decides: plain values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from muai_workers.tuning.comparing import Sample

Parameter = Literal["batch_size", "batch_timeout_ms", "cache_size_mb"]
PARAMETERS: tuple[Parameter, ...] = ("batch_size", "batch_timeout_ms", "cache_size_mb")
KEYS: Mapping[Parameter, str] = {
    "batch_size": "optimization.batcher.max_batch_size",
    "batch_timeout_ms": "optimization.batcher.batch_timeout_ms",
    "cache_size_mb": "optimization.cache.max_memory_mb",
}
"""The settings that the parameters are."""
LATE_S = 3.0
"""Processes write once a second; a stretch is complete so long after its end."""
SETTLE_S = 2.0
"""After a change, until every process has it, and what was under way has ended."""
MIN_STRETCHES = 2
"""Fewer of them show nothing."""
Outcome = Literal[
    "raised", "lowered", "recalled", "spread", "kept", "rolled_back", "paused", "adopted", "stood_down", "advised"
]


class Values(msgspec.Struct, frozen=True, kw_only=True):
    """One value for each parameter."""

    batch_size: int
    batch_timeout_ms: int
    cache_size_mb: int

    def of(self, parameter: Parameter) -> int:
        """The value of a parameter."""
        value: int = getattr(self, parameter)
        return value

    def with_value(self, parameter: Parameter, value: int) -> Values:
        """The same, but for one value."""
        return msgspec.structs.replace(self, **{parameter: value})

    def changes_to(self, other: Values) -> dict[Parameter, int]:
        """What of `other` differs."""
        return {name: other.of(name) for name in PARAMETERS if other.of(name) != self.of(name)}


class Bounds(NamedTuple):
    """What a parameter may be."""

    least: int
    most: int

    def clamp(self, value: int) -> int:
        """The nearest allowed value."""
        return min(max(value, self.least), self.most)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says of tuning."""

    bounds: Mapping[Parameter, Bounds]
    """Of the parameters that may be changed; others are left alone."""
    interval_s: float = 60.0
    window_s: float = 300.0
    target_ms: float = 1000.0


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """What the best settings depend on: who serves what, and under how much load."""

    model: str
    engine: str
    device: str
    level: int
    """Of the load: the power of two nearest to the arrivals per second."""

    @property
    def key(self) -> str:
        """Its name where what was learnt is kept."""
        return "\t".join((self.model, self.engine, self.device, str(self.level)))

    def __str__(self) -> str:
        return f"{self.model} on {self.engine} ({self.device}) at about {2.0**self.level:g} requests/s"


class Stretch(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet in one stretch of time, some seconds long."""

    start_s: float
    length_s: float
    arrived: int = 0
    ended: int = 0
    """Requests that ended, well or not, but for those that were cancelled."""
    in_time: int = 0
    worth: float = 0.0
    """Sum over what was answered in time: 1 for an instant answer, a little less the nearer it comes to the target."""
    waited_ms: float = 0.0
    """Sum of the time until requests reached an engine."""
    batching_ms: float = 0.0
    """Of that, what they waited in the collector."""
    dispatch_ms: float = 0.0
    """Of that, what they waited in a batch that was formed."""
    inference_ms: float = 0.0
    """Sum of the time in the engine."""
    successes: int = 0
    cache_hits: int = 0
    failed_attempts: int = 0
    batches: int = 0
    batched: int = 0
    """Requests in these batches."""
    fit: tuple[int, ...] = (0, 0, 0, 0, 0)
    """Of a·n + b: the sums of `performance.fitting.SIZE_LINE`, but for the last."""

    @property
    def end_s(self) -> float:
        return self.start_s + self.length_s

    @property
    def rate(self) -> float:
        """Arrivals per second."""
        return self.arrived / self.length_s

    @property
    def formed_s(self) -> float:
        """When, on average, the first batches that ended here were formed: under the settings of then."""
        busy_ms = self.dispatch_ms + self.inference_ms
        return self.start_s - busy_ms / 1000 / self.successes if self.successes else self.start_s

    @property
    def score(self) -> float | None:
        """Worth per request, 0 to 1; None where there was nothing."""
        asked = max(self.arrived, self.ended)
        return self.worth / asked if asked else None

    @property
    def hit_rate(self) -> float | None:
        return self.cache_hits / self.successes if self.successes else None


class CacheLook(msgspec.Struct, frozen=True, kw_only=True):
    """How the cache of conversations does."""

    used_share: float
    """Of what it may take, on all workers together."""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet as the tuner finds it."""

    now_s: float
    version: int
    """Of the runtime configuration."""
    changed_by: str
    """Who made that version."""
    values: Values
    overridden: dict[Parameter, int]
    """Of the tuned keys, those that the runtime configuration sets."""
    stretches: tuple[Stretch, ...] = ()
    """Complete ones, oldest first."""
    model: str = ""
    """The one with most requests."""
    engine: str = ""
    device: str = ""
    slots: int = 1
    adaptive: bool = True
    min_batch_size: int = 1
    memory_percent: float = 0.0
    """In use by anybody: of the fullest GPU, or of the fullest host where there are none."""
    quantized: bool | None = None
    """Whether the model runs with small weights; None where the engine has none."""
    in_flight: int | None = None
    """Requests accepted and not answered, wherever they wait; None where nobody has counted them."""
    cache: CacheLook | None = None
    """None where no worker keeps conversations."""
    incident: str = ""
    """The open alert that forbids tuning; '' for none."""
    canary: str = ""
    """The collector that batches what is asked for most, where there are others: a step is tried on it first."""
    canary_stretches: tuple[Stretch, ...] = ()
    """As `stretches`, of what the canary batches alone."""
    alone: str = ""
    """The process for which alone the version sets something; '' for none."""

    @property
    def timeout_matters(self) -> bool:
        """Adaptive batching with batches of one never waits for the timeout."""
        return not self.adaptive or self.min_batch_size > 1


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What settings have shown."""

    scores: Sample = Sample()
    rates: Sample = Sample()
    """Requests that ended per second."""
    hits: Sample = Sample()
    """Shares of requests that found some of their prompt."""
    behind: bool = False
    """More comes than is served, or waits longer than the target allows: then what counts is how much is served."""
    failed_share: float = 0.0
    """Attempts that failed for the engine's sake, per request."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A step that has been made and is not judged yet."""

    parameter: Parameter | Literal["several"]
    old: Values
    new: Values
    began_s: float
    why: str
    before: Measured
    relief: bool = False
    """It is meant to free memory: it is kept unless it hurts."""
    recalled: bool = False
    """It goes back to what once did best: it is kept unless it hurts."""
    prolonged: int = 0
    canary: str = ""
    """The collector that alone has it so far; `before` is what that one did. '': all have it."""
    before_all: Measured = Measured()
    """What all did, while one alone has it."""

    @property
    def move(self) -> str:
        """Its name among what was tried."""
        return move_name(self.old, self.new)


def move_name(old: Values, new: Values) -> str:
    """A step between two settings, as it is remembered."""
    return "; ".join(f"{name} {old.of(name)}>{new.of(name)}" for name in old.changes_to(new))


class Uncollected(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests a second came to the broker and not to a collector, whose memory is bounded; below 0: were
    collected of those that had piled up there."""

    from_s: float
    to_s: float
    rate: float


class Knowledge(msgspec.Struct, frozen=True, kw_only=True):
    """What was learnt of one place."""

    best: Values
    score: float
    at_s: float
    spent: dict[str, float] = {}
    """Steps that did not help there, and when that was found."""
    at_rest: bool = False
    """Nothing was left to try."""


class TunerState(msgspec.Struct, frozen=True, kw_only=True):
    """What the tuner remembers between two looks."""

    values: Values | None = None
    """What it wants to hold now."""
    version: int = 0
    """Of the runtime configuration, when that was decided."""
    since_s: float = 0.0
    """Since when they hold."""
    due_s: float = 0.0
    place: Place | None = None
    trial: Trial | None = None
    advice: str = ""
    originals: dict[Parameter, int | None] = {}
    """What the tuner found of the keys that it has changed: the runtime configuration's value, or None for none."""
    in_flight: int | None = None
    """At the last decision."""
    looked_s: float = 0.0
    """When that was."""
    uncollected: tuple[Uncollected, ...] = ()
    holding: str = ""
    """Why nothing is done now."""


class TuningEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A decision, for the history."""

    at: float
    """Wall-clock seconds since the epoch."""
    outcome: Outcome
    parameter: str
    """`batch_size`, `batch_timeout_ms`, `cache_size_mb`, or `several`."""
    old: dict[str, int]
    new: dict[str, int]
    rationale: str
    place: str = ""
    version: int = 0
    """Of the runtime configuration that came of it; 0: none did."""
