"""Keys and tenants: who may call, whose requests exist for whom, and how much each may ask for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import ROOT, wait_until

from muai_producers import InferenceClient
from muai_producers.keys import Keys, TenantLimits, new_key
from muai_producers.store import Store

pytestmark = pytest.mark.redis
NOOP = {"model": "noop", "inputs": "hello"}
PARKED = {"model": "parked", "inputs": "hello"}
CACHE_S = 1.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    folder = tmp_path_factory.mktemp("tenants")
    key, record = new_key("from-file", TenantLimits(max_tokens=10))
    (folder / "keys.jsonl").write_bytes(b"# ours\n\n" + msgspec.json.encode(record) + b"\n")
    (folder / "key").write_text(key)
    gateway = {
        "require_keys": True,
        "key_cache_s": CACHE_S,
        "keys_file": str(folder / "keys.jsonl"),
        "max_requests_per_call": 50,
    }
    with gateway_stack(folder, queue_capacity=400, sections={"gateway": gateway}) as stack:
        stack.start_serving()
        stack.start_gateway()
        yield stack


def a_key(stack: GatewayStack, tenant: str, **limits: int) -> str:
    key, record = new_key(tenant, TenantLimits(**limits))
    Keys(Store(stack.redis.client)).add(record)
    return key


def a_client(stack: GatewayStack, key: str) -> httpx.Client:
    return httpx.Client(base_url=stack.url, timeout=30.0, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def acme(stack: GatewayStack) -> Iterator[httpx.Client]:
    with a_client(stack, a_key(stack, "acme")) as client:
        yield client


@pytest.fixture
def rival(stack: GatewayStack) -> Iterator[httpx.Client]:
    with a_client(stack, a_key(stack, "rival")) as client:
        yield client


def code_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


def test_given_no_key_or_a_wrong_one_then_401_and_what_needs_none_still_answers(stack: GatewayStack) -> None:
    key = a_key(stack, "acme")
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": "Basic abc"},
        {"authorization": "Bearer nonsense"},
        {"x-api-key": key[:-1] + ("A" if key[-1] != "A" else "B")},
        {"x-api-key": new_key("acme")[0]},
    ]
    with httpx.Client(base_url=stack.url) as http:
        for headers in wrong:
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/inference"), ("GET", "/nothing")):
                response = http.request(method, path, headers=headers)
                assert (response.status_code, code_of(response)) == (401, "unauthorized"), headers
                assert response.headers["www-authenticate"].startswith("Bearer")
        for path in ("/health", "/ready", "/openapi.json"):
            assert http.get(path).status_code == 200
        assert http.get("/v1/models", headers={"X-API-Key": key}).status_code == 200
        assert http.get("/v1/models", headers={"authorization": f"bearer {key}"}).status_code == 200


def test_given_another_tenants_id_then_it_answers_exactly_as_an_unknown_one(
    acme: httpx.Client, rival: httpx.Client
) -> None:
    finished = acme.post("/v1/inference?wait=20", json=NOOP).json()["id"]
    waiting = acme.post("/v1/inference", json=PARKED).json()["id"]
    unknown = str(uuid.uuid4())

    def answer(method: str, request_id: str) -> tuple[int, str]:
        response = rival.request(method, f"/v1/inference/{request_id}", params={"wait": "0.2"})
        told = response.text.replace(request_id, "ID").replace(response.headers["x-request-id"], "REQUEST")
        return response.status_code, told

    for method in ("GET", "DELETE"):
        expected = answer(method, unknown)
        assert expected[0] == 404
        assert answer(method, finished) == answer(method, waiting) == expected
    assert acme.get(f"/v1/inference/{finished}").json()["state"] == "SUCCESS"
    cancelled = acme.delete(f"/v1/inference/{waiting}")
    assert cancelled.json()["state"] == "REVOKED"
    assert answer("GET", waiting)[0] == 404
    assert acme.get(f"/v1/inference/{waiting}").json()["state"] == "REVOKED"


def test_given_a_failure_or_a_cancel_by_the_client_then_it_is_still_its_tenants(
    stack: GatewayStack, acme: httpx.Client, rival: httpx.Client
) -> None:
    failed = acme.post("/v1/inference?wait=20", json={**PARKED, "deadline_s": 0.2}).json()
    assert failed["error"]["code"] == "deadline_exceeded"
    with InferenceClient(stack.settings) as client:
        theirs = client.submit("parked", "hello", tenant="acme")
        assert client.cancel(theirs)
    for request_id in (failed["id"], theirs):
        assert acme.get(f"/v1/inference/{request_id}").status_code == 200
        assert rival.get(f"/v1/inference/{request_id}").status_code == 404


def test_given_the_same_idempotency_key_of_two_tenants_then_two_requests(
    acme: httpx.Client, rival: httpx.Client
) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first = acme.post("/v1/inference?wait=20", json=NOOP, headers=headers).json()
    other = rival.post("/v1/inference?wait=20", json={**NOOP, "inputs": "other"}, headers=headers).json()
    assert other["state"] == "SUCCESS"
    assert other["id"] != first["id"]
    assert acme.post("/v1/inference", json=NOOP, headers=headers).json()["id"] == first["id"]


def test_given_a_limit_of_requests_in_flight_then_it_is_that_tenants_alone(
    stack: GatewayStack, acme: httpx.Client
) -> None:
    with a_client(stack, a_key(stack, "small", max_requests=2)) as small:
        ids = [small.post("/v1/inference", json=PARKED).json()["id"] for _ in range(2)]
        refused = small.post("/v1/inference", json=PARKED)
        assert (refused.status_code, code_of(refused)) == (429, "queue_full")
        assert refused.json()["error"]["details"]["limit"] == "tenant_max_requests"
        assert int(refused.headers["retry-after"]) >= 1
        assert acme.post("/v1/inference?wait=20", json=NOOP).status_code == 200
        for request_id in ids:
            assert small.delete(f"/v1/inference/{request_id}").status_code == 200


def test_given_requests_per_minute_then_the_next_is_told_when_to_come_and_a_call_of_many_counts_each(
    stack: GatewayStack,
) -> None:
    with a_client(stack, a_key(stack, "slow", requests_per_minute=3)) as slow:
        assert slow.post("/v1/inference/batch", json={"requests": [NOOP, NOOP]}).status_code == 202
        assert slow.post("/v1/inference?wait=20", json=NOOP).status_code == 200
        refused = slow.post("/v1/inference", json=NOOP)
        assert (refused.status_code, code_of(refused)) == (429, "rate_limited")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert slow.get("/v1/models").status_code == 200  # looking costs nothing


def test_given_a_key_of_the_file_then_it_works_with_its_limits(stack: GatewayStack) -> None:
    with a_client(stack, (stack.folder / "key").read_text()) as client:
        refused = client.post("/v1/inference", json={**NOOP, "inputs": "x" * 100})
        assert refused.json()["error"]["details"]["limit"] == "tenant_max_tokens"
        assert client.post("/v1/inference?wait=20", json=NOOP).status_code == 200


def run_muai(stack: GatewayStack, *args: str) -> subprocess.CompletedProcess[str]:
    packages = os.pathsep.join(str(ROOT / name) for name in ("config", "producers", "batching", "workers"))
    env = {**os.environ, "PYTHONPATH": packages, "MUAI_CONFIG": str(stack.config), "MUAI_HOME": str(stack.folder)}
    command = [sys.executable, "-m", "muai_producers", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_given_muai_keys_then_a_key_is_shown_once_listed_without_its_secret_and_revoked_in_time(
    stack: GatewayStack,
) -> None:
    made = run_muai(stack, "keys", "create", "--tenant", "shop", "--name", "web", "--max-requests", "9")
    key = made.stdout.strip()
    key_id = key.split("_")[1]
    listed = run_muai(stack, "keys", "list", "--json")
    (entry,) = [json for json in map(msgspec.json.decode, listed.stdout.splitlines()) if json["id"] == key_id]
    assert (entry["tenant"], entry["name"], entry["limits"]) == ("shop", "web", {"max_requests": 9})
    kept = repr(stack.redis.client.hgetall("muai:keys"))
    for told in (listed.stdout, kept):
        assert key not in told
        assert key.rsplit("_", 1)[1] not in told
    with a_client(stack, key) as client:
        assert client.get("/v1/models").status_code == 200
        assert run_muai(stack, "keys", "revoke", key_id).returncode == 0
        began_s = time.monotonic()
        wait_until(lambda: client.get("/v1/models").status_code == 401, timeout_s=20.0, what="the revocation")
        assert time.monotonic() - began_s < CACHE_S + 10.0
    assert run_muai(stack, "keys", "revoke", key_id).returncode == 1
    assert run_muai(stack, "keys", "create", "--tenant", "a:b").returncode == 1


def test_given_a_record_that_was_printed_then_it_is_the_keys_and_nothing_was_stored(
    stack: GatewayStack, tmp_path: Path
) -> None:
    before = stack.redis.client.hlen("muai:keys")
    create = ("keys", "create", "--tenant", "shop", "--operator", "--print-record")
    key, record = run_muai(stack, *create).stdout.splitlines()
    assert stack.redis.client.hlen("muai:keys") == before
    file = tmp_path / "keys.jsonl"
    file.write_text(record)
    (found,) = Keys(Store(stack.redis.client), file).find([key.split("_")[1]])
    assert found is not None
    assert (found.tenant, found.operator) == ("shop", True)


def test_given_many_requests_in_one_call_then_each_is_accepted_or_refused_by_itself(acme: httpx.Client) -> None:
    mark = uuid.uuid4().hex
    requests: list[Any] = [
        {**NOOP, "idempotency_key": mark},
        {**NOOP, "model": "nop"},
        "nonsense",
        {**NOOP, "idempotency_key": mark},
        {**NOOP, "priority": 99},
    ]
    response = acme.post("/v1/inference/batch", json={"requests": requests})
    assert response.status_code == 202
    many = response.json()
    assert (many["accepted"], many["refused"]) == (2, 3)
    codes = [item["error"] and item["error"]["code"] for item in many["data"]]
    assert codes == [None, "model_not_found", "invalid_request", None, "invalid_request"]
    ids = {item["receipt"]["id"] for item in many["data"] if item["receipt"]}
    assert len(ids) == 1
    assert acme.get(f"/v1/inference/{ids.pop()}?wait=20").json()["state"] == "SUCCESS"


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        ({"requests": []}, {}, "requests"),
        ({"requests": [NOOP] * 51}, {}, "requests"),
        ({}, {}, "requests"),
        ({"requests": [NOOP]}, {"Idempotency-Key": "x"}, "idempotency-key"),
    ],
)
def test_given_a_wrong_call_of_many_then_the_field_is_named(
    acme: httpx.Client, body: Any, headers: dict[str, str], field: str
) -> None:
    response = acme.post("/v1/inference/batch", json=body, headers=headers)
    assert (response.status_code, code_of(response)) == (400, "invalid_request")
    assert response.json()["error"]["details"]["field"] == field


def test_given_many_that_are_all_wrong_then_400_and_each_is_told(acme: httpx.Client) -> None:
    response = acme.post("/v1/inference/batch", json={"requests": [{"model": "nop", "inputs": "x"}, 7]})
    assert response.status_code == 400
    told = response.json()["error"]["details"]["requests"]
    assert [one["code"] for one in told] == ["model_not_found", "invalid_request"]


def test_given_a_trace_context_then_it_is_in_the_message_and_comes_back(
    stack: GatewayStack, acme: httpx.Client
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = acme.post("/v1/inference", json=PARKED, headers={"traceparent": parent, "tracestate": "a=b"})
    assert response.headers["traceparent"] == parent
    request_id = response.json()["id"]

    def messages() -> list[bytes]:
        kept = [raw for key in stack.redis.client.keys("*") for raw in values(stack, key)]
        return [raw for raw in kept if request_id.encode() in raw and b'"traceparent":"' + parent.encode() in raw]

    wait_until(lambda: bool(messages()), what="the message")
    assert acme.delete(f"/v1/inference/{request_id}").status_code == 200
    bad = acme.post("/v1/inference?wait=20", json=NOOP, headers={"traceparent": "nonsense"})
    assert bad.status_code == 200
    assert "traceparent" not in bad.headers


def values(stack: GatewayStack, key: bytes) -> list[bytes]:
    client: Any = stack.redis.client
    kind = client.type(key)
    if kind == b"list":
        return list(client.lrange(key, 0, -1))
    return list(client.hgetall(key).values()) if kind == b"hash" else []


def test_given_answers_lately_then_a_receipt_says_how_long_it_will_take(
    stack: GatewayStack, acme: httpx.Client
) -> None:
    for _ in range(4):  # some requests are answered, over more than a second: there is a pace
        acme.post("/v1/inference?wait=20", json=NOOP)
        time.sleep(0.6)
    receipt = acme.post("/v1/inference", json=NOOP).json()
    assert receipt["queue_position"] >= 1
    assert receipt["estimated_wait_s"] > 0


def test_given_another_tenants_files_batches_and_streams_then_they_do_not_exist(
    acme: httpx.Client, rival: httpx.Client
) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "parked", "input": "x"}}
    content = msgspec.json.encode(line)
    file_id = acme.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", content)}).json()["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    stolen = rival.post("/v1/batches", json=body)
    assert (stolen.status_code, code_of(stolen)) == (404, "file_not_found")
    batch_id = acme.post("/v1/batches", json=body).json()["id"]
    request_id = acme.post("/v1/inference", json=PARKED).json()["id"]
    for method, path in (
        ("GET", f"/v1/files/{file_id}"),
        ("GET", f"/v1/files/{file_id}/content"),
        ("DELETE", f"/v1/files/{file_id}"),
        ("GET", f"/v1/batches/{batch_id}"),
        ("POST", f"/v1/batches/{batch_id}/cancel"),
        ("GET", f"/v1/inference/{request_id}/stream"),
    ):
        assert rival.request(method, path).status_code == 404, path
    assert rival.get("/v1/files").json()["data"] == rival.get("/v1/batches").json()["data"] == []
    assert acme.get(f"/v1/files/{file_id}/content").content == content
    assert [one["id"] for one in acme.get("/v1/batches").json()["data"]] == [batch_id]
    assert acme.post(f"/v1/batches/{batch_id}/cancel").json()["status"] == "cancelling"
    assert acme.delete(f"/v1/inference/{request_id}").status_code == 200
