"""Latencies in logarithmic bins: a sketch that is merged by adding, with a stated relative error. Pure.

DDSketch (Masson, Rim, Lee, 2019), as the library ddsketch has it. A value falls into the bin that its logarithm rounds
up to, and any value of a bin is within `RELATIVE_ERROR` of what the bin stands for. Counts of bins are added where they
are kept, so processes merge their sketches without reading them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache

from ddsketch.ddsketch import BaseDDSketch
from ddsketch.mapping import LogarithmicMapping
from ddsketch.store import DenseStore

RELATIVE_ERROR = 0.01
SHORTEST_MS = 0.001
"""What takes less is told as this; so there are no more than some 1,300 bins."""
LONGEST_MS = 86_400_000.0
_MAPPING = LogarithmicMapping(RELATIVE_ERROR)
_key = _MAPPING.key


def bin_of(latency_ms: float) -> int:
    """The bin of a latency; what is out of range is in the outermost bin."""
    key: int = _key(min(max(latency_ms, SHORTEST_MS), LONGEST_MS))
    return key


def binned(latencies_ms: Sequence[float]) -> dict[int, int]:
    """How many of these are in each bin. Those of a batch are much alike: sorted, each bin is looked up once."""
    counts: dict[int, int] = {}
    ordered, below = sorted(latencies_ms), 0
    while below < len(ordered):
        key = bin_of(ordered[below])
        upto = max(below + 1, bisect_right(ordered, _upper_ms(key), below))
        counts[key] = counts.get(key, 0) + upto - below
        below = upto
    return counts


@lru_cache(maxsize=4096)
def _upper_ms(key: int) -> float:
    """The longest latency of a bin."""
    bound: float = _MAPPING.gamma**key
    return bound


def middle_ms(key: int) -> float:
    """What a bin stands for: no value of it is further away than the relative error."""
    middle: float = _MAPPING.value(key)
    return middle


def quantiles(counts: Mapping[int, int], wanted: Sequence[float]) -> list[float] | None:
    """The values at these ranks (0 to 1), each within the relative error of the exact one; None of nothing.

    The exact one is the value at position ⌊q·(n - 1)⌋ of the sorted n values.
    """
    if not counts:
        return None
    store = DenseStore()
    for key in sorted(counts):
        store.add(key, counts[key])
    sketch = BaseDDSketch(_MAPPING, store, DenseStore(), 0.0)
    return [sketch.get_quantile_value(rank) or 0.0 for rank in wanted]


def mean_ms(counts: Mapping[int, int]) -> float:
    """The mean, within the relative error; 0.0 of nothing."""
    total = sum(counts.values())
    return sum(middle_ms(key) * count for key, count in counts.items()) / total if total else 0.0
