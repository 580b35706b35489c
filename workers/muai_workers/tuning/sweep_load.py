"""Open-loop load: requests that come at random and wait for nobody, as users do."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from muai_producers.client import InferenceClient
from muai_producers.errors import MuaiError, ResultTimeoutError
from muai_workers.tuning.sweep import SweepError

ANSWERED_S = 300.0
"""After the last arrival: what has piled up by then is worked off, or the sweep ends."""


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times within [0, seconds) of Poisson arrivals, `rate` per second on average."""
    chance = random.Random(seed)
    gaps = (chance.expovariate(rate) for _ in range(round(2 * rate * seconds) + 100))
    return [time_s for time_s in accumulate(gaps) if time_s < seconds]


class OpenLoop:
    """Puts load on an installation.

    Args:
        requests: sent in turn, from a place that the seed says.
    Raises:
        SweepError: from every method, when answers do not come, or when none is a result.
    """

    def __init__(self, client: InferenceClient, requests: Sequence[Mapping[str, Any]]) -> None:
        self._client = client
        self._requests = requests

    def _some(self, count: int, seed: int) -> Iterator[Mapping[str, Any]]:
        chance = random.Random(seed)
        return (chance.choice(self._requests) for _ in range(count))

    def saturate(self, count: int, seed: int) -> float:
        """Requests served per second with all of them waiting from the start."""
        started_s = time.perf_counter()
        ids = self._client.submit_many(self._some(count, seed))
        outcomes = self._outcomes(ids)
        took_s = time.perf_counter() - started_s
        failed = [one for one in outcomes.values() if isinstance(one, MuaiError)]
        if len(failed) == len(ids):
            raise SweepError(f"no request was served; the first error: {failed[0].code}: {failed[0].message}")
        return (len(ids) - len(failed)) / took_s

    def run(self, rate: float, seconds: float, seed: int) -> list[float | None]:
        """Latencies in milliseconds in order of arrival, each from when the request should have been sent; None for one
        that failed."""
        times = arrivals(rate, seconds, seed)
        requests = list(self._some(len(times), seed))
        ids: list[str] = []
        late_ms: list[float] = []
        start_s = time.perf_counter() + 0.05
        while len(ids) < len(times):
            time.sleep(max(0.0, start_s + times[len(ids)] - time.perf_counter()))
            elapsed_s = time.perf_counter() - start_s
            due = [at for at in range(len(ids), len(times)) if times[at] <= elapsed_s]
            if due:
                ids += self._client.submit_many(requests[at] for at in due)
                late_ms += [1000 * (elapsed_s - times[at]) for at in due]
        outcomes = self._outcomes(ids)
        latencies: list[float | None] = []
        for request_id, lag_ms in zip(ids, late_ms, strict=True):
            outcome = outcomes[request_id]
            latencies.append(None if isinstance(outcome, MuaiError) else lag_ms + outcome.latency_ms)
        return latencies

    def _outcomes(self, ids: Sequence[str]) -> dict[str, Any]:
        try:
            return dict(self._client.results(ids, ANSWERED_S))
        except ResultTimeoutError as error:
            left = len(error.details.get("open", ()))
            raise SweepError(f"{left} of {len(ids)} requests were not answered within {ANSWERED_S:.0f} s") from None
