"""How a gateway stops, and what it says while the state store is away."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import wait_until

from muai_producers import InferenceClient

pytestmark = pytest.mark.redis
PARKED = {"model": "parked", "inputs": "hello"}


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[GatewayStack]:
    with gateway_stack(tmp_path, graceful_shutdown_timeout=3) as stack:
        yield stack


async def is_draining(http: httpx.AsyncClient) -> bool:
    return "this gateway is stopping" in (await http.get("/ready")).json()["reasons"]


async def until_draining(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(5.0):
        while not await is_draining(http):
            await asyncio.sleep(0.01)


async def until_accepted(stack: GatewayStack, number: int) -> list[str]:
    """The ids in flight, once there are so many."""
    async with asyncio.timeout(10.0):
        while True:
            ids: list[bytes] = stack.redis.client.hkeys("muai:inflight")
            if len(ids) == number:
                return [request_id.decode() for request_id in ids]
            await asyncio.sleep(0.01)


def test_given_sigterm_then_unready_first_new_ones_refused_and_what_is_under_way_is_answered(
    stack: GatewayStack,
) -> None:
    gateway = stack.start_gateway()

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=stack.url, timeout=30.0) as http:
            waiting = asyncio.create_task(http.post("/v1/inference?wait=30", json=PARKED))
            (request_id,) = await until_accepted(stack, 1)
            gateway.terminate()
            await until_draining(http)
            refused = await http.post("/v1/inference", json=PARKED)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert refused.headers["retry-after"] == "1"
            assert (await http.get("/health")).json()["status"] == "degraded"
            with InferenceClient(stack.settings) as client:
                assert client.cancel(request_id)
            answered = await waiting
            assert answered.status_code == 200
            assert answered.json()["state"] == "REVOKED"

    asyncio.run(scenario())
    assert gateway.popen.wait(timeout=5.0) == 0


def test_given_sigterm_and_no_result_in_time_then_the_receipt_is_given_and_the_request_goes_on(
    stack: GatewayStack,
) -> None:
    gateway = stack.start_gateway()

    async def scenario() -> str:
        async with httpx.AsyncClient(base_url=stack.url, timeout=30.0) as http:
            waiting = asyncio.create_task(http.post("/v1/inference?wait=30", json=PARKED))
            await until_accepted(stack, 1)
            gateway.terminate()
            answered = await waiting
            assert answered.status_code == 202
            request_id: str = answered.json()["id"]
            return request_id

    request_id = asyncio.run(scenario())
    assert gateway.popen.wait(timeout=5.0) == 0
    assert stack.redis.client.hexists("muai:inflight", request_id)


def test_given_several_worker_processes_then_one_port_and_an_orderly_end(stack: GatewayStack) -> None:
    gateway = stack.start_gateway("--workers", "2")
    assert httpx.get(f"{stack.url}/v1/models").status_code == 200
    gateway.terminate()
    assert gateway.popen.wait(timeout=15.0) == 0


def test_given_the_state_store_is_away_then_503_with_a_time_and_all_is_well_when_it_is_back(
    stack: GatewayStack,
) -> None:
    stack.start_gateway()
    with httpx.Client(base_url=stack.url, timeout=30.0) as http:
        stack.redis.kill()
        refused = http.post("/v1/inference", json=PARKED)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "broker_unavailable"
        assert str(stack.redis.port) not in refused.text
        assert refused.headers["retry-after"] == "1"
        unhealthy = http.get("/health")
        assert unhealthy.status_code == 503
        assert unhealthy.json()["status"] == "unhealthy"
        assert unhealthy.json()["queue_size"] is None
        assert http.get("/ready").json()["checks"]["state_store"] is False
        stack.redis.start()
        wait_until(lambda: http.get("/ready").json()["checks"]["state_store"], what="the state store")
        accepted = http.post("/v1/inference", json=PARKED)
        assert accepted.status_code == 202
        assert http.delete(accepted.json()["status_url"]).json()["state"] == "REVOKED"


def test_given_the_state_store_hangs_then_the_probes_still_answer_soon(stack: GatewayStack) -> None:
    stack.start_gateway()
    with httpx.Client(base_url=stack.url, timeout=30.0) as http:
        stack.redis.process.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: http.get("/health").status_code == 503, timeout_s=10.0, what="unhealthy")
            began_s = time.monotonic()
            assert http.get("/ready").json()["checks"]["state_store"] is False
            assert time.monotonic() - began_s < 5.0
        finally:
            stack.redis.process.send_signal(signal.SIGCONT)


def test_given_an_address_that_others_reach_then_a_key_is_needed_unless_told_otherwise(stack: GatewayStack) -> None:
    guarded = stack.start_gateway("--host", "0.0.0.0")
    refused = httpx.get(f"{stack.url}/v1/models")
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "unauthorized"
    assert refused.headers["www-authenticate"].startswith("Bearer")
    guarded.terminate()
    assert guarded.popen.wait(timeout=20.0) == 0
    stack.start_gateway("--host", "0.0.0.0", "--insecure-no-auth")
    assert httpx.get(f"{stack.url}/v1/models").status_code == 200
