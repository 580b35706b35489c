"""The gateway over HTTP, with a collector and a worker behind it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.gateway_support import GatewayStack, gateway_stack

from muai_producers import InferenceClient
from muai_producers.store import Store

pytestmark = pytest.mark.redis
NOOP = {"model": "noop", "inputs": "hello"}
PARKED = {"model": "parked", "inputs": "hello"}
FAILED_IN_TIME = {"model": "parked", "inputs": "hello", "deadline_s": 0.2}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    folder = tmp_path_factory.mktemp("gateway")
    with gateway_stack(folder, queue_capacity=300, preload_models=["noop"]) as stack:
        stack.start_serving()
        stack.start_gateway()
        yield stack


@pytest.fixture
def http(stack: GatewayStack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=30.0) as client:
        yield client


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a response, whose shape is checked."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"code", "message", "details", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return error


def test_given_a_wait_then_the_result_comes_with_the_first_answer(http: httpx.Client) -> None:
    response = http.post("/v1/inference?wait=20", json=NOOP)
    assert response.status_code == 200
    standing = response.json()
    assert standing["state"] == "SUCCESS"
    assert standing["error"] is None
    assert standing["result"]["engine_used"] == "fake"
    assert standing["result"]["metadata"]["request_id"] == standing["id"]
    assert http.get(standing["status_url"]).json() == standing


def test_given_no_wait_then_a_receipt_at_once_and_the_result_by_long_poll(http: httpx.Client) -> None:
    response = http.post("/v1/inference", json={**NOOP, "parameters": {"truncate": True}, "priority": 9})
    receipt = response.json()
    assert response.status_code == 202
    assert receipt["state"] == "PENDING"
    assert receipt["queue_position"] >= 1
    assert response.headers["location"] == receipt["status_url"] == f"/v1/inference/{receipt['id']}"
    standing = http.get(receipt["status_url"], params={"wait": 20}).json()
    assert standing["state"] == "SUCCESS"


def test_given_a_preference_to_wait_then_it_is_applied_and_said_so(http: httpx.Client) -> None:
    response = http.post("/v1/inference", json=NOOP, headers={"Prefer": "respond-async, wait=20"})
    assert response.status_code == 200
    assert response.headers["preference-applied"] == "wait=20"


def test_given_a_wait_that_is_too_short_then_the_receipt_and_the_request_goes_on(http: httpx.Client) -> None:
    response = http.post("/v1/inference?wait=0.2", json=PARKED)
    assert response.status_code == 202
    request_id = response.json()["id"]
    assert http.get(f"/v1/inference/{request_id}?wait=0.1").json()["state"] in ("PENDING", "RECEIVED")
    assert http.delete(f"/v1/inference/{request_id}").status_code == 200


def test_given_chat_messages_then_the_model_answers_the_last_turn(http: httpx.Client) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    for inputs in (turns, {"messages": turns}, {"text": "hello"}):
        standing = http.post("/v1/inference?wait=20", json={"model": "chatty", "inputs": inputs}).json()
        assert standing["state"] == "SUCCESS", standing
        assert standing["result"]["outputs"]["text"]


def test_given_a_request_that_fails_then_its_standing_says_why(http: httpx.Client) -> None:
    response = http.post("/v1/inference?wait=20", json=FAILED_IN_TIME)
    assert response.status_code == 200
    assert response.json()["state"] == "FAILURE"
    assert response.json()["result"] is None
    assert response.json()["error"]["code"] == "deadline_exceeded"


def test_given_a_request_of_another_client_then_its_end_is_heard_at_once(
    http: httpx.Client, stack: GatewayStack
) -> None:
    with InferenceClient(stack.settings) as client:
        request_id = client.submit("parked", "hello", deadline_s=1.0)
        began_s = time.monotonic()
        standing = http.get(f"/v1/inference/{request_id}?wait=20").json()
    assert standing["error"]["code"] == "deadline_exceeded"
    assert time.monotonic() - began_s < 6.0


def test_given_a_cancelled_request_then_whoever_waits_hears_it_and_a_second_cancel_is_refused(
    stack: GatewayStack,
) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=stack.url, timeout=30.0) as http:
            request_id = (await http.post("/v1/inference", json=PARKED)).json()["id"]
            waiting = asyncio.create_task(http.get(f"/v1/inference/{request_id}?wait=25"))
            began_s = time.monotonic()
            cancelled = await http.delete(f"/v1/inference/{request_id}")
            assert cancelled.json()["state"] == "REVOKED"
            assert (await waiting).json() == cancelled.json()
            assert time.monotonic() - began_s < 10.0
            error = error_of(await http.delete(f"/v1/inference/{request_id}"), 409, "already_finished")
            assert error["details"]["state"] == "REVOKED"

    asyncio.run(scenario())


def test_given_an_unknown_id_then_404_for_each_method(http: httpx.Client) -> None:
    for method in ("GET", "DELETE"):
        error_of(http.request(method, f"/v1/inference/{uuid.uuid4()}"), 404, "request_not_found")
    error_of(http.get("/v1/inference/" + "x" * 3000), 404, "request_not_found")


def test_given_an_idempotency_key_then_one_request_and_a_conflict_for_other_content(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first = http.post("/v1/inference?wait=20", json=NOOP, headers=headers)
    again = http.post("/v1/inference", json=NOOP, headers=headers)
    waited = http.post("/v1/inference?wait=5", json=NOOP, headers=headers)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == waited.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    assert again.json()["state"] == "SUCCESS"
    assert waited.json() == first.json()
    error_of(http.post("/v1/inference", json={**NOOP, "inputs": "other"}, headers=headers), 409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"model": "nop", "inputs": "x"}, 404, "model_not_found", "model"),
        ({"inputs": "x"}, 400, "invalid_request", "model"),
        ({"model": "noop"}, 400, "invalid_request", "inputs"),
        ({"model": "noop", "inputs": 7}, 400, "invalid_request", "inputs"),
        ({"model": "noop", "inputs": "  "}, 400, "invalid_request", "inputs.text"),
        ({"model": "noop", "inputs": {"text": "x", "prompt": "y"}}, 400, "invalid_request", "inputs"),
        ({"model": "chatty", "inputs": []}, 400, "invalid_request", "inputs.messages"),
        ({"model": "chatty", "inputs": [{"role": "boss", "content": "x"}]}, 400, "invalid_request", "inputs[0].role"),
        ({**NOOP, "task": "chat"}, 400, "unsupported_task", "task"),
        ({**NOOP, "task": "dance"}, 400, "invalid_request", "task"),
        ({**NOOP, "priority": 10}, 400, "invalid_request", "priority"),
        ({**NOOP, "deadline_s": -1}, 400, "invalid_request", "deadline_s"),
        ({**NOOP, "deadline_s": 1e-9}, 400, "invalid_request", "deadline_s"),
        ({**NOOP, "parameters": {"top_p": 2}}, 400, "invalid_request", "parameters.top_p"),
        ({**NOOP, "parameters": {"heat": 2}}, 400, "invalid_request", "parameters.heat"),
        ({**NOOP, "engine_preference": ["steam"]}, 400, "invalid_request", "engine_preference"),
        ({**NOOP, "colour": "red"}, 400, "invalid_request", "colour"),
        ([], 400, "invalid_request", ""),
    ],
)
def test_given_a_wrong_body_then_the_field_is_named_and_nothing_enqueued(
    http: httpx.Client, stack: GatewayStack, body: Any, status: int, code: str, field: str
) -> None:
    before = Store(stack.redis.client).in_flight()
    error = error_of(http.post("/v1/inference", json=body), status, code)
    assert error["details"].get("field") == field
    assert Store(stack.redis.client).in_flight() == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"model": "\\ud800"}', b"nonsense"])
def test_given_what_is_no_json_then_400(http: httpx.Client, content: bytes) -> None:
    response = http.post("/v1/inference", content=content, headers={"content-type": "application/json"})
    error_of(response, 400, "malformed_message")


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"X-Muai-Priority": "10"}, "x-muai-priority"),
        ({"X-Muai-Priority": "4.5"}, "x-muai-priority"),
        ({"X-Muai-Deadline-S": "soon"}, "x-muai-deadline-s"),
        ({"X-Muai-Deadline-S": "0"}, "x-muai-deadline-s"),
        ({"Idempotency-Key": "two words"}, "Idempotency-Key"),
        ({"X-Request-Id": "x" * 201}, "X-Request-Id"),
    ],
)
def test_given_a_wrong_header_then_it_is_named(http: httpx.Client, headers: dict[str, str], field: str) -> None:
    error = error_of(http.post("/v1/inference", json=NOOP, headers=headers), 400, "invalid_request")
    assert error["details"] == {"field": field}


def test_given_deadline_and_priority_as_headers_then_they_count_but_not_twice(http: httpx.Client) -> None:
    headers = {"X-Muai-Priority": "2", "X-Muai-Deadline-S": "0.2", "X-Request-Id": "order/66"}
    response = http.post("/v1/inference?wait=20", json=PARKED, headers=headers)
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert response.headers["x-request-id"] == "order/66"
    error = error_of(http.post("/v1/inference", json={**NOOP, "priority": 1}, headers=headers), 400, "invalid_request")
    assert error["details"] == {"field": "priority"}


@pytest.mark.parametrize("wait", ["61", "-1", "nan", "1e1", ""])
def test_given_a_wrong_wait_then_400(http: httpx.Client, wait: str) -> None:
    for response in (
        http.post("/v1/inference", params={"wait": wait}, json=NOOP),
        http.get("/v1/inference/x", params={"wait": wait}),
    ):
        assert error_of(response, 400, "invalid_request")["details"] == {"field": "wait"}


def test_given_a_body_over_the_limit_then_413_whether_announced_or_in_chunks(http: httpx.Client) -> None:
    body = json.dumps({**NOOP, "inputs": "x" * 1_000_001}).encode()
    headers = {"content-type": "application/json"}
    error = error_of(http.post("/v1/inference", content=body, headers=headers), 413, "payload_too_large")
    assert error["details"] == {"max_bytes": 1_000_000}
    chunks = (body[start : start + 100_000] for start in range(0, len(body), 100_000))
    error_of(http.post("/v1/inference", content=chunks, headers=headers), 413, "payload_too_large")


def test_given_a_body_just_under_the_limit_whose_message_is_over_it_then_413_for_it_alone(stack: GatewayStack) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=stack.url, timeout=30.0) as http:
            too_large = {**NOOP, "inputs": "x" * 999_950}
            responses = await asyncio.gather(
                *(http.post("/v1/inference?wait=20", json=too_large if n == 3 else NOOP) for n in range(8))
            )
            statuses = [response.status_code for response in responses]
            assert statuses == [413 if n == 3 else 200 for n in range(8)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_given_another_media_type_then_415(http: httpx.Client, headers: dict[str, str]) -> None:
    error_of(http.post("/v1/inference", content=b"{}", headers=headers), 415, "unsupported_media_type")


def test_given_unknown_paths_and_methods_then_the_same_shape_of_error(http: httpx.Client) -> None:
    error_of(http.get("/v1/inferense"), 404, "not_found")
    error_of(http.get("/v1/inference/"), 404, "not_found")
    response = http.put("/health")
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET"


def test_given_the_queue_is_full_then_429_with_a_time_and_room_is_used_to_the_last(stack: GatewayStack) -> None:
    async def scenario() -> None:
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=stack.url, timeout=30.0, limits=limits) as http:
            room = 300 - Store(stack.redis.client).in_flight()
            responses = await asyncio.gather(*(http.post("/v1/inference", json=PARKED) for _ in range(room + 40)))
            accepted = [response.json()["id"] for response in responses if response.status_code == 202]
            refused = [response for response in responses if response.status_code != 202]
            try:
                assert len(set(accepted)) == room
                assert len(refused) == 40
                for response in refused:
                    error = error_of(response, 429, "queue_full")
                    assert error["details"]["limit"] == "queue_capacity"
                    assert int(response.headers["retry-after"]) >= 1
                health = (await http.get("/health")).json()
                assert health["queue_size"] == 300
                assert any("nearly full" in reason for reason in health["reasons"])
            finally:
                await asyncio.gather(*(http.delete(f"/v1/inference/{request_id}") for request_id in accepted))
            assert Store(stack.redis.client).in_flight() == 300 - room

    asyncio.run(scenario())


def test_given_many_at_once_then_each_gets_its_own_result(stack: GatewayStack) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=stack.url, timeout=30.0) as http:
            responses = await asyncio.gather(
                *(
                    http.post("/v1/inference?wait=25", json={"model": "chatty", "inputs": f"word{n}"})
                    for n in range(200)
                )
            )
        standings = [response.json() for response in responses]
        assert [standing["result"]["outputs"]["text"] for standing in standings] == [f"word{n}" for n in range(200)]
        assert max(standing["result"]["batch_size"] for standing in standings) > 1

    asyncio.run(scenario())


def test_models_health_and_readiness_tell_what_there_is(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()
    assert models["object"] == "list"
    assert {entry["id"]: (entry["task"], entry["engines"]) for entry in models["data"]} == {
        "noop": ("text-classification", ["fake"]),
        "chatty": ("chat", ["fake"]),
        "parked": ("embedding", ["onnx"]),
    }
    health = http.get("/health").json()
    assert health["status"] == "degraded"
    assert health["reasons"] == ["no engine worker serves parked"]
    assert health["engines_available"] == ["fake"]
    assert "noop" in health["models_loaded"]
    assert health["queue_capacity"] == 300
    assert health["uptime_seconds"] > 0
    ready = http.get("/ready")
    assert ready.status_code == 200
    assert ready.json() == {
        "ready": True,
        "checks": {"serving": True, "state_store": True, "broker": True, "collector": True, "model:noop": True},
        "reasons": [],
    }


def test_the_openapi_document_is_served(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert {"/v1/inference", "/v1/inference/{id}", "/v1/models", "/health", "/ready"} <= set(document["paths"])
    assert {"/v1/chat/completions", "/v1/workflows/{name}"} <= set(document["paths"])
