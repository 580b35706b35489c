"""MuAI's client under arrivals that wait for nobody.

Told by BENCH_CONFIG and BENCH_MODEL. Each command `{"kind", "rate", "seconds", "seed"}`, or `{"burst": count, "seed"}`,
with a `tenant` or without, is answered with `{"latencies_ms"}`, from the moment at which each request should have been
sent until the client heard of its result; `{"saturate": count}` with `{"rate"}`. `{"flood": count, "tenant"}` submits
and waits for nothing, `{"drain": true}` for what floods have left.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arrivals import arrival_times
from texts import inputs

from muai_config import load_settings
from muai_producers import InferenceClient
from muai_producers.errors import MuaiError

MODEL = os.environ["BENCH_MODEL"]
ANSWERED_S = 120.0


class OpenLoop:
    def __init__(self) -> None:
        self.client = InferenceClient(load_settings(Path(os.environ["BENCH_CONFIG"])))
        self.finished_s: dict[str, float] = {}
        self._wanted = 0
        self._all_here = threading.Event()
        self._flooded: list[str] = []

    def saturate(self, count: int) -> float:
        """Requests per second with all of them waiting from the start."""
        started_s = time.perf_counter()
        ids = self.client.submit_many({"model": MODEL, "inputs": text} for text in inputs(MODEL, count, 0))
        self._check(ids)
        return count / (time.perf_counter() - started_s)

    def flood(self, count: int, tenant: str) -> None:
        self._flooded += self._submit(inputs(MODEL, count, 0), tenant)

    def drain(self) -> int:
        """Wait for what floods have left; how many were still unanswered."""
        left = len(self._flooded) - sum(1 for _ in self.client.finished(self._flooded, dict.fromkeys(self._flooded)))
        self._check(self._flooded)
        self._flooded.clear()
        return left

    def run(self, kind: str, rate: float, seconds: float, seed: int, tenant: str = "") -> list[float]:
        """Latencies in milliseconds, in order of arrival."""
        return self.send(arrival_times(kind, rate, seconds, seed), seed, tenant)

    def send(self, times: Sequence[float], seed: int, tenant: str) -> list[float]:
        """Submit at those seconds from now; latencies in milliseconds."""
        texts = inputs(MODEL, len(times), seed)
        self.finished_s.clear()
        self._all_here.clear()
        self._wanted = len(times)
        ids: list[str] = []
        stops = []
        start_s = time.perf_counter() + 0.05
        while len(ids) < len(times):
            wait_s = start_s + times[len(ids)] - time.perf_counter()
            if wait_s > 0:
                time.sleep(wait_s)
            elapsed_s = time.perf_counter() - start_s
            due = [texts[at] for at in range(len(ids), len(times)) if times[at] <= elapsed_s]
            new = self._submit(due, tenant)
            ids += new
            if new:
                stops.append(self.client.watch(new, self._hear))
                # What finished between being sent and being watched is not told.
                self._hear([request_id for request_id, _ in self.client.finished(new, dict.fromkeys(new))])
        self._all_here.wait(ANSWERED_S)
        for stop in stops:
            stop()
        self._check(ids)
        return [
            (self.finished_s[request_id] - start_s - time_s) * 1000
            for request_id, time_s in zip(ids, times, strict=True)
        ]

    def _submit(self, texts: Sequence[str], tenant: str) -> list[str]:
        who = {"tenant": tenant} if tenant else {}
        return self.client.submit_many({"model": MODEL, "inputs": text, **who} for text in texts)

    def _hear(self, ids: list[str]) -> None:
        now_s = time.perf_counter()
        for request_id in ids:
            self.finished_s.setdefault(request_id, now_s)
        if len(self.finished_s) >= self._wanted:
            self._all_here.set()

    def _check(self, ids: list[str]) -> None:
        for _, outcome in self.client.results(ids, timeout_s=ANSWERED_S):
            if isinstance(outcome, MuaiError):
                raise outcome


def obey(loop: OpenLoop, command: dict[str, Any]) -> dict[str, Any]:
    """The answer to a command."""
    if "saturate" in command:
        return {"rate": loop.saturate(command["saturate"])}
    if "flood" in command:
        loop.flood(command["flood"], command["tenant"])
        return {}
    if "drain" in command:
        return {"left": loop.drain()}
    if "burst" in command:
        return {"latencies_ms": loop.send([0.0] * command["burst"], command["seed"], command["tenant"])}
    return {"latencies_ms": loop.run(**command)}


def main() -> None:
    loop = OpenLoop()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    replies.write(json.dumps({"versions": {}}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        replies.write(json.dumps(obey(loop, command)) + "\n")


if __name__ == "__main__":
    main()
