"""A collector of traces that is not there: requests do not notice, nothing is lost, and the way back needs nobody."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.traced_stack import TracedStack
from tests.tracing_support import grpc_receiver
from tests.transport_support import free_port, own_redis, wait_until

from muai_producers import InferenceClient

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]


def test_Given_no_collector_of_traces_Then_nothing_is_lost_little_is_said_and_it_is_found_when_it_comes(
    tmp_path: Path,
) -> None:
    port = free_port()
    with own_redis(tmp_path) as redis:
        endpoint = f"http://127.0.0.1:{port}"
        stack = TracedStack(tmp_path, redis.url, redis.url, endpoint, capacity=10_000, export_timeout_ms=1000)
        try:
            stack.start()
            with InferenceClient(stack.settings) as client:
                ids = client.submit_many({"model": "plain", "inputs": f"number {number}"} for number in range(1000))
                outcomes = dict(client.results(ids, timeout_s=60))
                assert len(outcomes) == 1000
                assert all(not isinstance(one, Exception) for one in outcomes.values())
                wait_until(lambda: "traces degraded" in stack.logs(), what="word of it")
                with grpc_receiver(port) as (_, inbox):

                    def is_traced() -> bool:
                        request_id = client.submit("plain", "again")
                        client.result(request_id, timeout_s=30)
                        time.sleep(0.5)  # the pause after a failure passes, and nothing else is awaited
                        return any(span.name == "request" for span in inbox.now())

                    wait_until(is_traced, 60, "traces after the collector came")
        finally:
            started_s = time.monotonic()
            stack.stop()
            took_s = time.monotonic() - started_s
        assert took_s < 20, "the end of a process waits for no collector"
        said = stack.logs()
        assert said.count("traces degraded") <= 5, "once for each process"
        assert said.count("retrying in") == 0, "what the exporter itself says of each try"
        assert "Traceback" not in said
