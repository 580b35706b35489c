"""MuAI's client under arrivals that wait for nobody.

Told by BENCH_CONFIG and BENCH_MODEL. Each command `{"kind", "rate", "seconds", "seed"}` is answered with
`{"latencies_ms"}`, from the moment at which each request should have been sent until the client heard of its result;
`{"saturate": count}` with `{"rate"}`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

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

    def saturate(self, count: int) -> float:
        """Requests per second with all of them waiting from the start."""
        started_s = time.perf_counter()
        ids = self.client.submit_many({"model": MODEL, "inputs": text} for text in inputs(MODEL, count, 0))
        self._check(ids)
        return count / (time.perf_counter() - started_s)

    def run(self, kind: str, rate: float, seconds: float, seed: int) -> list[float]:
        """Latencies in milliseconds, in order of arrival."""
        times = arrival_times(kind, rate, seconds, seed)
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
            new = self.client.submit_many({"model": MODEL, "inputs": text} for text in due)
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


def main() -> None:
    loop = OpenLoop()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    replies.write(json.dumps({"versions": {}}) + "\n")
    for line in sys.stdin:
        command = json.loads(line)
        if "saturate" in command:
            answer: dict[str, object] = {"rate": loop.saturate(command["saturate"])}
        else:
            answer = {"latencies_ms": loop.run(**command)}
        replies.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
