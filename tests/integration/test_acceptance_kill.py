"""The acceptance test: 2,000 requests, two models, four producers, one kill -9 of a worker, on each broker.

Were it to fail, an accepted request would be lost, or answered twice, when a GPU worker dies under load.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.chaos.brokers import RedisServer
from tests.chaos.stack import Load, Stack
from tests.chaos.supervisor import ROOT, child_environment

NUM_PRODUCERS = 4
REQUESTS_PER_MODEL = 250
MODELS = {
    "first": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
    "second": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
}
PRODUCER_LIMIT_S = 60.0


@pytest.fixture(
    params=[pytest.param("redis", marks=pytest.mark.redis), pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)]
)
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    node = request.getfixturevalue("rabbit_node") if request.param == "rabbitmq" else None
    state = RedisServer(tmp_path / "redis")
    workers = {"worker-1": "engine", "worker-2": "engine"}
    stack = Stack(node or state, state, tmp_path / "stack", workers=workers, models=MODELS, lease_ttl_s=2.0)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        sys.stdout.write(stack.logs())
        state.stop()


def start_producer(stack: Stack, name: str) -> subprocess.Popen[bytes]:
    arguments = ["producer", str(stack.config_file), name, str(REQUESTS_PER_MODEL), ",".join(MODELS)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.role", *arguments],
        env=child_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )


@pytest.mark.timeout(240)
def test_given_four_producers_when_a_worker_is_killed_then_each_request_has_one_result(stack: Stack) -> None:
    load = Load([], stack.refused())
    producers = [start_producer(stack, f"producer-{number}") for number in range(NUM_PRODUCERS)]
    stack.witness.wait_for_any(len(producers) * REQUESTS_PER_MODEL // 2, PRODUCER_LIMIT_S)
    stack.signal(load, signal.SIGKILL, "worker-1")
    said = [json.loads(producer.communicate(timeout=PRODUCER_LIMIT_S)[0]) for producer in producers]

    for one in said:
        assert one["failed"] == []
        assert Counter(one["answered"]) == Counter(one["ids"])
        assert len(one["ids"]) == REQUESTS_PER_MODEL * len(MODELS)
        load.ids.extend(one["ids"])
    assert len(set(load.ids)) == 2000
    stack.witness.expect(load.ids)
    figures = stack.verify("worker killed under four producers", load)
    assert figures.requests == 2000
    assert stack.processes["worker-1"].lives == 2
