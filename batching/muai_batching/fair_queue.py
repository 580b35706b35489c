"""The order in which waiting requests are served: tenants share equally, a tenant's priorities come first, with age.

Between tenants it is start-time fair queueing (Goyal, Vin and Cheng, 1996), by tokens: a tenant's next request gets
a virtual start time, the later of the queue's virtual time and the finish of the tenant's last one; lowest start
first. A tenant that floods the queue moves its own later requests back, nobody else's. What a tenant left unused lately
it may catch up on, up to a credit of some batches: a short burst is not made to share with a flood.

Within a tenant, a request ranks as if it had arrived earlier by `ageing_s` for each step of its priority. So a
request of the lowest priority is overtaken only by those of the highest that arrive within nine steps after it: that
is the bound on its wait beyond first come, first served.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from muai_producers.wire import InferenceRequest


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the collector."""

    request: InferenceRequest
    tokens: int
    """Estimated input tokens, at least 1."""
    arrived_s: float
    """Monotonic seconds at which the collector got it."""
    handle: Any = None
    """What the broker needs to settle the request's message."""
    num_bytes: int = 0
    queued: bool = False
    """Kept by the queue: whether it is in it."""
    passed_over_s: float | None = None
    """Monotonic seconds at which a request behind it was first served before it."""


@dataclass(slots=True)
class _Flow:
    """One tenant's requests, best ranked first, as `(rank, arrival number, request)`."""

    finish: float = 0.0
    waiting: list[tuple[float, int, Waiting]] = field(default_factory=list)


MEAN_FADING = 0.99
MAX_PRIORITY = 9


class FairQueue:
    """Requests of one batch key in the order of service.

    Args:
        ageing_s: seconds of waiting that one step of priority is worth.
        credit_requests: how far, in requests of mean length, a tenant that asked for nothing is let ahead later.
    """

    def __init__(self, ageing_s: float, credit_requests: int = 0) -> None:
        self.ageing_s = ageing_s
        """May change; what waits already keeps its rank."""
        self._credit_requests = credit_requests
        self._mean_tokens = 0.0
        self._flows: dict[str, _Flow] = {}
        self._virtual_time = 0.0
        self._arrivals = 0
        self._count = 0
        self._by_arrival: deque[Waiting] = deque()
        self.num_by_priority = [0] * (MAX_PRIORITY + 1)
        """Requests that wait, by priority."""

    def __len__(self) -> int:
        return self._count

    def push(self, item: Waiting) -> None:
        """Add a request."""
        mean = self._mean_tokens or float(item.tokens)
        self._mean_tokens = MEAN_FADING * mean + (1 - MEAN_FADING) * item.tokens
        flow = self._flows.get(item.request.tenant)
        if flow is None:
            flow = self._flows[item.request.tenant] = _Flow(self._earliest_start)
        self._arrivals += 1
        rank = item.arrived_s - item.request.priority * self.ageing_s
        entry = (rank, self._arrivals, item)
        if not flow.waiting or flow.waiting[-1] < entry:
            flow.waiting.append(entry)
        else:
            insort(flow.waiting, entry)
        self._count += 1
        self.num_by_priority[item.request.priority] += 1
        item.queued = True
        self._by_arrival.append(item)

    def peek(self, count: int) -> list[Waiting]:
        """The next `count` requests in order of service, which stay in the queue."""
        busy = [flow for flow in self._flows.values() if flow.waiting]
        if len(busy) == 1:
            return [item for _, _, item in busy[0].waiting[:count]]
        heads = [(self._start(flow), flow.waiting[0][1], 0, flow) for flow in busy]
        heapq.heapify(heads)
        chosen: list[Waiting] = []
        while heads and len(chosen) < count:
            start, _, index, flow = heads[0]
            item = flow.waiting[index][2]
            chosen.append(item)
            if index + 1 < len(flow.waiting):
                heapq.heapreplace(heads, (start + item.tokens, flow.waiting[index + 1][1], index + 1, flow))
            else:
                heapq.heappop(heads)
        return chosen

    def remove(self, items: Iterable[Waiting], *, served: bool) -> None:
        """Take requests out; `served` ones count towards their tenants' shares."""
        gone: dict[str, set[int]] = {}
        for item in items:
            item.queued = False
            self.num_by_priority[item.request.priority] -= 1
            gone.setdefault(item.request.tenant, set()).add(id(item))
        starts: list[float] = []
        for tenant, ids in gone.items():
            flow = self._flows[tenant]
            start = self._start(flow)
            tokens = _take(flow.waiting, ids)
            self._count -= len(ids)
            if served:
                flow.finish = start + tokens
                starts.append(start)
        if starts:
            self._virtual_time = max(self._virtual_time, min(starts))
        self._forget_idle_flows()

    @property
    def _earliest_start(self) -> float:
        return self._virtual_time - self._credit_requests * self._mean_tokens

    def _start(self, flow: _Flow) -> float:
        """Virtual start of a flow's next request."""
        return max(self._earliest_start, flow.finish)

    def _forget_idle_flows(self) -> None:
        if not self._count:
            self._flows.clear()
            self._virtual_time = 0.0
            return
        idle = [t for t, flow in self._flows.items() if not flow.waiting and flow.finish <= self._earliest_start]
        for tenant in idle:
            del self._flows[tenant]

    def items(self) -> list[Waiting]:
        """All that wait, in no particular order."""
        return [item for flow in self._flows.values() for _, _, item in flow.waiting]

    def oldest_arrival_s(self) -> float:
        """Arrival of the longest waiting request; infinity when empty."""
        while self._by_arrival and not self._by_arrival[0].queued:
            self._by_arrival.popleft()
        return self._by_arrival[0].arrived_s if self._by_arrival else float("inf")


def _take(waiting: list[tuple[float, int, Waiting]], ids: set[int]) -> int:
    """Remove the entries of those object ids, which lie near the front; returns the sum of their tokens."""
    kept, tokens, seen, left = [], 0, 0, len(ids)
    while left:
        entry = waiting[seen]
        seen += 1
        if id(entry[2]) in ids:
            tokens += entry[2].tokens
            left -= 1
        else:
            kept.append(entry)
    waiting[:seen] = kept
    return tokens
