"""From sums and gauges to what prometheus_client writes as a page. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

from muai_producers.monitoring.instruments import INSTRUMENTS, Instrument
from muai_producers.monitoring.recorder import Gathered, Labels, Series


def families(sums: Gathered, gauges: Mapping[Series, float]) -> Iterator[Metric]:
    """Every instrument that has a series, in the order of the table, its series in the order of their labels."""
    found: dict[str, dict[Labels, list[float]]] = {}
    for (name, labels), value in (*sums.counters.items(), *gauges.items()):
        found.setdefault(name, {})[labels] = [value]
    for (name, labels), cells in sums.histograms.items():
        found.setdefault(name, {})[labels] = cells
    for instrument in INSTRUMENTS:
        if instrument.name in found:
            yield _family(instrument, found[instrument.name])


def _family(instrument: Instrument, series: Mapping[Labels, Sequence[float]]) -> Metric:
    name = instrument.name.removesuffix("_total") if instrument.kind == "counter" else instrument.name
    family = Metric(name, instrument.help, instrument.kind)
    for labels, values in sorted(series.items()):
        named = {label: value for label, value in zip(instrument.labels, labels, strict=True) if value}
        if instrument.kind == "histogram":
            _add_histogram(family, instrument, named, values)
        else:
            family.add_sample(instrument.name, named, values[0])
    return family


def _add_histogram(family: Metric, instrument: Instrument, named: dict[str, str], cells: Sequence[float]) -> None:
    *counts, total = cells
    bounds = [*map(floatToGoString, instrument.buckets), "+Inf"]
    below = list(accumulate(counts))
    for bound, count in zip(bounds, below, strict=True):
        family.add_sample(f"{instrument.name}_bucket", {**named, "le": bound}, count)
    family.add_sample(f"{instrument.name}_count", named, below[-1])
    family.add_sample(f"{instrument.name}_sum", named, total)
