"""The metrics of a whole installation, in the state store: where processes add what they counted, and how it is read.

Counters and histograms are sums over all processes, past and present: a process adds its increases, so a sum never
falls, and no process's death takes anything from it. Gauges stay with the process that reports them, in one record
that runs out `ALIVE_S` after its last sign of life: the series of a dead process are gone with it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from muai_producers.monitoring.instruments import BY_NAME, INSTRUMENTS, Instrument
from muai_producers.monitoring.recorder import Gathered, Labels, Reading, Series, capped
from muai_producers.store import Store

ALIVE_S = 15.0
SEEN_S = 3600
"""How long a process's last increases are known by their number, for it may send them again."""
BETWEEN_LABELS, BEFORE_CELL = "\x1f", "\x1e"
INFINITE, SUM = "+Inf", "sum"

# KEYS: the process's last number, then one hash for each metric. ARGV: number, how long it is kept, then per hash the
# most fields that it may have, the number of its increases, and three words for each: field, the field that counts in
# its place where there are too many, amount. Sent again with the same number, it changes nothing.
ADD = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
local at = 3
for i = 2, #KEYS do
  local limit, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  for j = at + 2, at + 1 + 3 * count, 3 do
    local field = ARGV[j]
    if redis.call('HEXISTS', KEYS[i], field) == 0 and redis.call('HLEN', KEYS[i]) >= limit then field = ARGV[j + 1] end
    redis.call('HINCRBYFLOAT', KEYS[i], field, ARGV[j + 2])
  end
  at = at + 2 + 3 * count
end
return 1
"""


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a process says of itself."""

    id: str
    role: str
    host: str
    at: float
    """Wall-clock seconds since the epoch."""
    readings: list[tuple[str, tuple[str, ...], float]] = []
    """Metric, label values, value."""
    degraded: dict[str, str] = {}
    """Parts of monitoring that do not work there, and why."""


@dataclass(frozen=True)
class Totals:
    """The metrics at one moment."""

    sums: Gathered = field(default_factory=Gathered)
    processes: tuple[ProcessReport, ...] = ()

    def gauges(self) -> dict[Series, float]:
        """The processes' gauges, merged as each metric wants it."""
        merged: dict[Series, float] = {}
        for process in sorted(self.processes, key=lambda one: one.at):
            for name, labels, value in process.readings:
                instrument = BY_NAME.get(name)
                if instrument is None or len(labels) != len(instrument.labels):
                    continue  # of another version of this program
                series = (name, labels)
                merged[series] = _merge(instrument, merged.get(series), value)
        return merged


def _merge(instrument: Instrument, before: float | None, value: float) -> float:
    if before is None or instrument.merge == "latest":
        return value
    return before + value if instrument.merge == "sum" else max(before, value)


def degraded_parts(processes: Iterable[ProcessReport]) -> dict[str, str]:
    """Parts of monitoring that do not work somewhere: the reason, and where."""
    return {part: f"{reason} ({process.id})" for process in processes for part, reason in process.degraded.items()}


class SharedMetrics:
    """Adds to the installation's metrics, and reads them.

    Raises:
        redis.exceptions.RedisError: from every method, when the store does not answer.
    """

    def __init__(self, store: Store) -> None:
        self._client: Any = store.client
        self._prefix = f"{store.keys.prefix}:metrics"
        self._processes = f"{self._prefix}:processes"
        self._add = self._client.register_script(ADD)

    def add(self, process_id: str, number: int, increases: Gathered) -> bool:
        """Add a process's increases; False when those of that number are in already.

        Args:
            number: differs from that of the increases before.
        """
        keys, args = [f"{self._prefix}:seen:{process_id}"], [str(number), SEEN_S]
        for instrument, fields in _by_instrument(increases):
            keys.append(self._sums(instrument))
            args += (_field_limit(instrument), len(fields), *(word for words in fields for word in words))
        return bool(self._add(keys=keys, args=args))

    def report(self, report: ProcessReport) -> None:
        """Say how a process stands."""
        pipe = self._client.pipeline(transaction=False)
        pipe.set(self._process(report.id), msgspec.json.encode(report), px=int(ALIVE_S * 1000))
        pipe.zadd(self._processes, {report.id: report.at})
        pipe.execute()

    def withdraw(self, process_id: str) -> None:
        """A process ends: its gauges end with it."""
        pipe = self._client.pipeline(transaction=False)
        pipe.delete(self._process(process_id), f"{self._prefix}:seen:{process_id}")
        pipe.zrem(self._processes, process_id)
        pipe.execute()

    def processes(self) -> tuple[ProcessReport, ...]:
        """The processes that are alive. Forgets those that are not."""
        ids = [raw.decode() for raw in self._client.zrange(self._processes, 0, -1)]
        if not ids:
            return ()
        found = self._client.mget([self._process(one) for one in ids])
        dead = [one for one, raw in zip(ids, found, strict=True) if raw is None]
        if dead:
            # Not one that came back meanwhile: its time is a new one.
            self._client.zremrangebyscore(self._processes, "-inf", time.time() - 2 * ALIVE_S)
        return tuple(msgspec.json.decode(raw, type=ProcessReport) for raw in found if raw is not None)

    def read(self) -> Totals:
        """The metrics now."""
        summed = [one for one in INSTRUMENTS if one.kind != "gauge"]
        pipe = self._client.pipeline(transaction=False)
        for instrument in summed:
            pipe.hgetall(self._sums(instrument))
        sums = Gathered()
        for instrument, raw in zip(summed, pipe.execute(), strict=True):
            _read_sums(instrument, raw, sums)
        return Totals(sums, self.processes())

    def _sums(self, instrument: Instrument) -> str:
        return f"{self._prefix}:sums:{instrument.name}"

    def _process(self, process_id: str) -> str:
        return f"{self._prefix}:process:{process_id}"


def as_wire(readings: Sequence[Reading]) -> list[tuple[str, tuple[str, ...], float]]:
    """Gauges as a report carries them."""
    return [(instrument.name, labels, value) for instrument, labels, value in readings]


def _field_limit(instrument: Instrument) -> int:
    # One series more than a process may have is room for the one that counts for the rest.
    cells = len(instrument.buckets) + 2 if instrument.kind == "histogram" else 1
    return instrument.max_series * cells


def _by_instrument(increases: Gathered) -> Iterator[tuple[Instrument, list[tuple[str, str, str]]]]:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for (name, labels), amount in increases.counters.items():
        spare = capped(BY_NAME[name], labels)
        found.setdefault(name, []).append((_field(labels), _field(spare), repr(amount)))
    for (name, labels), cells in increases.histograms.items():
        instrument = BY_NAME[name]
        spare = capped(instrument, labels)
        for cell, amount in zip(_cells(instrument), cells, strict=True):
            if amount:
                found.setdefault(name, []).append((_field(labels, cell), _field(spare, cell), repr(amount)))
    for name, fields in found.items():
        yield BY_NAME[name], fields


def _cells(instrument: Instrument) -> list[str]:
    return [*map(repr, instrument.buckets), INFINITE, SUM]


def _field(labels: Labels, cell: str = "") -> str:
    joined = BETWEEN_LABELS.join(labels)
    return joined + BEFORE_CELL + cell if cell else joined


def _read_sums(instrument: Instrument, raw: Mapping[bytes, bytes], into: Gathered) -> None:
    places = {cell: place for place, cell in enumerate(_cells(instrument))}
    for field_name, amount in raw.items():
        joined, _, cell = field_name.decode().partition(BEFORE_CELL)
        labels = tuple(joined.split(BETWEEN_LABELS)) if instrument.labels else ()
        if len(labels) != len(instrument.labels):
            continue  # of another version of this program
        series = (instrument.name, labels)
        if instrument.kind == "counter":
            into.counters[series] = float(amount)
        elif cell in places:
            into.histograms.setdefault(series, [0.0] * len(places))[places[cell]] = float(amount)
