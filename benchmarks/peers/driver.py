"""The producer's side of a contestant: obeys one JSON command a line, answers with one JSON line.

Commands: `{"do": "bulk", "model", "count", "seed"}` answers `{"seconds"}`, from the first submission to the last
result received; `{"do": "idle", "model", "count", "seed"}` answers `{"latencies_ms"}` of requests sent one at a time.
Standard library only: it runs in every peer's environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from texts import inputs


class Producer(Protocol):
    def bulk(self, texts: Sequence[str]) -> None:
        """Submit every text, return when every result is here. Raises when one is missing or failed."""

    def one(self, text: str) -> None:
        """Submit one text, return with its result."""


def obey(make: Callable[[], Producer], packages: Sequence[str]) -> None:
    """Make the producer, and serve commands until standard input ends."""
    # What a library prints, while it loads too, must not get between the answers.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    producer = make()

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields) + "\n")

    reply(versions={name: importlib.metadata.version(name) for name in packages})
    for line in sys.stdin:
        command = json.loads(line)
        texts = inputs(command["model"], command["count"], command["seed"])
        if command["do"] == "bulk":
            started_s = time.perf_counter()
            producer.bulk(texts)
            reply(seconds=time.perf_counter() - started_s)
        else:
            reply(latencies_ms=[_latency_ms(producer, text) for text in texts])


def _latency_ms(producer: Producer, text: str) -> float:
    started_s = time.perf_counter()
    producer.one(text)
    return (time.perf_counter() - started_s) * 1000
