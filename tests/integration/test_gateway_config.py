"""The runtime configuration over HTTP: for operators, whole or not at all, one after the other, told to everybody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from tests.gateway_support import GatewayStack, gateway_stack
from tests.transport_support import wait_until

from muai_config.runtime import reloadable_settings
from muai_producers.keys import Keys, new_key
from muai_producers.runtime_config.versions import Applied, ConfigVersions
from muai_producers.store import Store

pytestmark = pytest.mark.redis
SIZE, LEAST = "optimization.batcher.max_batch_size", "optimization.batcher.min_batch_size"
CONFIG, HISTORY, ROLLBACK = "/api/v1/config", "/api/v1/config/history", "/api/v1/config/rollback"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    folder = tmp_path_factory.mktemp("config")
    with gateway_stack(folder, sections={"gateway": {"require_keys": True}}) as stack:
        stack.start_gateway()
        yield stack


def a_client(stack: GatewayStack, *, operator: bool) -> httpx.Client:
    key, record = new_key("ops", name="on call", operator=operator)
    Keys(Store(stack.redis.client)).add(record)
    return httpx.Client(base_url=stack.url, timeout=30.0, headers={"authorization": f"Bearer {key}"})


@pytest.fixture
def ops(stack: GatewayStack) -> Iterator[httpx.Client]:
    """An operator, before whom nothing was ever changed."""
    stack.redis.client.delete(ConfigVersions(Store(stack.redis.client)).keys.versions)
    with a_client(stack, operator=True) as client:
        yield client


def number_of(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return int(response.json().get("number", 0))


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, str(response.json()["error"]["code"])


def test_given_a_key_that_is_no_operators_then_nothing_is_shown_or_changed(stack: GatewayStack) -> None:
    with a_client(stack, operator=False) as client:
        for response in (
            client.get(CONFIG),
            client.patch(CONFIG, json={"set": {SIZE: 64}}),
            client.get(HISTORY),
            client.post(ROLLBACK, json={}),
        ):
            assert error_of(response) == (403, "forbidden")
    assert ConfigVersions(Store(stack.redis.client)).current_number() == 0


def test_given_a_change_then_it_is_a_version_that_the_gateway_works_by_and_says_who_made_it(
    stack: GatewayStack, ops: httpx.Client
) -> None:
    assert ops.get(CONFIG).json()["values"][SIZE] == 32
    made = ops.patch(CONFIG, json={"set": {SIZE: 64}, "why": "larger GPUs"})
    assert number_of(made) == 1
    assert made.headers["etag"] == '"1"'
    assert made.json()["by"].startswith("key ")
    assert made.json()["by"].endswith("(on call), tenant ops")
    shown = ops.get(CONFIG)
    assert shown.json()["values"][SIZE] == 64
    assert shown.json()["version"]["why"] == "larger GPUs"
    assert shown.headers["etag"] == '"1"'
    wait_until(lambda: [one["version"] for one in ops.get(CONFIG).json()["processes"]] == [1], what="the gateway")
    ops.patch(CONFIG, json={"set": {"monitoring.server.queue_capacity": 77}})
    wait_until(
        lambda: httpx.get(f"{stack.url}/health").json()["queue_capacity"] == 77, what="health by the new capacity"
    )
    assert ops.get("/v1/console/overview").json()["capacity"] == 77
    assert number_of(ops.patch(CONFIG, json={"set": {SIZE: 64}})) == 2, "what changes nothing is no version"


def test_given_keys_to_set_and_others_to_let_go_then_both_are_one_version(ops: httpx.Client) -> None:
    ops.patch(CONFIG, json={"set": {SIZE: 64}})
    made = ops.patch(CONFIG, json={"set": {"queue.tenant_max_requests": 5}, "unset": [SIZE]}).json()
    assert (made["number"], made["overrides"]) == (2, {"queue.tenant_max_requests": 5})
    assert made["removed"] == [SIZE]


def test_given_a_change_that_is_wrong_as_a_whole_then_422_names_each_key_and_nothing_is_written(
    ops: httpx.Client,
) -> None:
    ops.patch(CONFIG, json={"set": {LEAST: 8}})
    refused = ops.patch(CONFIG, json={"set": {SIZE: 4, "queue.engine_cooldown_s": 5}})
    assert error_of(refused) == (422, "invalid_config")
    assert [one["key"] for one in refused.json()["error"]["details"]["problems"]] == [LEAST]
    assert ops.get(CONFIG).json()["version"]["number"] == 1
    twice = ops.patch(CONFIG, json={"set": {SIZE: 64}, "unset": [SIZE]})
    assert error_of(twice) == (422, "invalid_config")


@pytest.mark.parametrize(
    ("headers", "body", "told"),
    [
        ({"if-match": '"1"'}, {}, (200, None)),
        ({"if-match": "*"}, {}, (200, None)),
        ({}, {"version": 1}, (200, None)),
        ({"if-match": '"0"'}, {}, (409, "config_conflict")),
        ({}, {"version": 0}, (409, "config_conflict")),
        ({"if-match": '"1"'}, {"version": 0}, (400, "invalid_request")),
        ({"if-match": "1"}, {}, (400, "invalid_request")),
    ],
)
def test_given_a_change_thought_of_for_a_version_then_it_holds_for_that_version_alone(
    ops: httpx.Client, headers: dict[str, str], body: dict[str, Any], told: tuple[int, str | None]
) -> None:
    ops.patch(CONFIG, json={"set": {SIZE: 64}})
    changed = ops.patch(CONFIG, json={"set": {SIZE: 128}, **body}, headers=headers)
    assert (changed.status_code, changed.json().get("error", {}).get("code")) == told
    if told[0] != 200:
        refused = ops.post(ROLLBACK, json={"to": 0, **body}, headers=headers)
        assert error_of(refused) == told
    assert ops.get(CONFIG).json()["values"][SIZE] == (128 if told[0] == 200 else 64)


@pytest.mark.property(58)
def test_given_every_reloadable_key_then_its_documented_example_is_set_over_http_and_taken_back(
    ops: httpx.Client,
) -> None:
    before = ops.get(CONFIG).json()["values"]
    examples = {key: info.example for key, info in reloadable_settings().items()}
    examples["monitoring.anomaly.webhook_url"] = "http://127.0.0.1:1/"
    assert set(before) == set(examples)
    assert number_of(ops.patch(CONFIG, json={"set": examples})) == 1
    assert ops.get(CONFIG).json()["values"] == examples
    assert number_of(ops.post(ROLLBACK, json={"to": 0})) == 2
    assert ops.get(CONFIG).json()["values"] == before


def test_given_rollbacks_then_the_history_has_who_and_why_newest_first(ops: httpx.Client) -> None:
    ops.patch(CONFIG, json={"set": {SIZE: 64}, "why": "first"})
    ops.patch(CONFIG, json={"set": {SIZE: 128}, "why": "second"})
    back = ops.post(ROLLBACK, json={"version": 2, "why": "too slow"})
    assert number_of(back) == 3
    assert back.json()["restores"] == 1
    assert number_of(ops.post(ROLLBACK, json={"to": 0})) == 4
    told = ops.get(HISTORY, params={"limit": 3}).json()["data"]
    assert [(one["number"], one.get("why", "")) for one in told] == [(4, ""), (3, "too slow"), (2, "second")]
    assert ops.get(CONFIG).json()["values"][SIZE] == 32
    assert error_of(ops.post(ROLLBACK, json={"to": 77})) == (404, "unknown_config_version")
    assert error_of(ops.get(HISTORY, params={"limit": "2.5"})) == (400, "invalid_request")
    assert error_of(ops.patch(CONFIG, json={})) == (400, "invalid_request")


def test_given_a_process_that_cannot_apply_a_version_then_health_names_it_with_the_reason_until_it_can(
    stack: GatewayStack, ops: httpx.Client
) -> None:
    document = yaml.safe_load(stack.config.read_text())
    document["optimization"] = {"batcher": {"min_batch_size": 8}}
    whole = stack.config.read_text()
    stack.config.write_text(yaml.safe_dump(document))
    process = stack.start("collector", "--name", "stubborn")
    try:
        wait_until(lambda: any("stubborn" in one.process for one in _applied(stack)), what="the collector")
        stack.config.write_text(whole)
        ops.patch(CONFIG, json={"set": {SIZE: 4}})
        wait_until(lambda: any("stubborn" in reason for reason in _reasons(stack)), what="health's word")
        [told] = [reason for reason in _reasons(stack) if "stubborn" in reason]
        assert "keeps version 0" in told
        assert "cannot apply version 1" in told
        assert LEAST in told
        ops.patch(CONFIG, json={"set": {SIZE: 16}})
        wait_until(lambda: not any("stubborn" in reason for reason in _reasons(stack)), what="that it can")
    finally:
        process.stop()


def _applied(stack: GatewayStack) -> list[Applied]:
    return ConfigVersions(Store(stack.redis.client)).applied()


def _reasons(stack: GatewayStack) -> list[str]:
    return list(httpx.get(f"{stack.url}/health").json()["reasons"])
