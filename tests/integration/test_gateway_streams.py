"""Streams over HTTP: server-sent events, read at any gateway."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from tests.gateway_support import GatewayStack, Process, gateway_stack
from tests.transport_support import OwnRedis, free_port, wait_until

from muai_config import build_settings
from muai_producers.connections import state_client
from muai_producers.gateway.sse import HEARTBEAT
from muai_producers.gateway.stream_routes import _written
from muai_producers.gateway.streams import StreamHub
from muai_producers.store import Store

pytestmark = pytest.mark.redis
WORDS = " ".join(f"word{number}" for number in range(40))
ANSWER = " ".join(reversed(WORDS.split()))
STREAMED = {"model": "chatty", "inputs": WORDS, "parameters": {"max_tokens": 1000}, "stream": True}


@dataclass
class Event:
    name: str
    id: str
    data: Any


def events_of(lines: Iterator[str]) -> Iterator[Event]:
    """Server-sent events, comments left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and "data" in fields:
            yield Event(fields["event"], fields["id"], json.loads(fields["data"]))
            fields = {}


def text_of(events: list[Event]) -> str:
    text = ""
    for event in events:
        text = "" if event.name == "restart" else text + event.data.get("text", "")
    return text


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayStack]:
    with pytest.MonkeyPatch.context() as patch, gateway_stack(tmp_path_factory.mktemp("streams")) as stack:
        patch.setenv("MUAI_TEST_FAKE_ENGINE", json.dumps({"latency_per_piece_ms": 15.0}))
        stack.start_serving()
        stack.start_gateway()
        yield stack


@pytest.fixture
def http(stack: GatewayStack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=30.0) as client:
        yield client


def submit(http: httpx.Client, **fields: Any) -> str:
    response = http.post("/v1/inference", json={**STREAMED, **fields})
    assert response.status_code == 202, response.text
    url: str = response.json()["status_url"]
    return f"{url}/stream"


def test_given_a_stream_then_its_text_comes_in_events_and_the_standing_ends_it(http: httpx.Client) -> None:
    url = submit(http)
    with http.stream("GET", url) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
        events = list(events_of(response.iter_lines()))
    assert text_of(events) == ANSWER
    assert [event.name for event in events if event.name != "text"] == ["end"]
    assert len(events) > 4
    assert events[-1].data["state"] == "SUCCESS"
    assert events[-1].data["result"]["outputs"]["text"] == ANSWER


def test_given_a_reader_that_comes_back_to_another_gateway_then_it_reads_on_and_in_the_end_is_sent_away(
    stack: GatewayStack, http: httpx.Client
) -> None:
    port = free_port()
    other = stack.start("gateway", "--port", str(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as elsewhere:
        wait_until(lambda: _answers(elsewhere), what="the second gateway")
        url, events = submit(http), list[Event]()
        clients = [http, elsewhere]
        while not events or events[-1].name != "end":
            headers = {"Last-Event-ID": events[-1].id} if events else {}
            with clients[len(events) % 2].stream("GET", url, headers=headers) as response:
                for event in events_of(response.iter_lines()):
                    events.append(event)
                    if len(events) % 3 == 0:
                        break
        assert text_of(events) == ANSWER
        assert elsewhere.get(url, headers={"Last-Event-ID": events[-1].id}).status_code == 204
        again = list(events_of(iter(elsewhere.get(url, params={"after": events[0].id}).text.split("\n"))))
        assert text_of([events[0], *again]) == ANSWER
    other.stop()


def test_given_unknown_requests_or_offsets_then_the_error_says_which(http: httpx.Client) -> None:
    missing = http.get("/v1/inference/never/stream")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
    wrong = http.get(submit(http), headers={"Last-Event-ID": "7"})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["details"]["field"] == "after"


def test_given_requests_that_end_otherwise_then_the_last_event_says_how(http: httpx.Client) -> None:
    refused = list(events_of(iter(http.get(submit(http, inputs="BAD")).text.split("\n"))))
    assert [event.name for event in refused] == ["end"]
    assert refused[0].data["error"]["code"] == "invalid_request"
    plain = submit(http, model="noop", inputs="hi", parameters={}, stream=False)
    assert [event.data["state"] for event in events_of(iter(http.get(plain).text.split("\n")))] == ["SUCCESS"]


def test_given_a_reader_that_goes_away_then_the_request_goes_on(http: httpx.Client) -> None:
    url = submit(http)
    with http.stream("GET", url) as response:
        next(events_of(response.iter_lines()))
    assert http.get(url.removesuffix("/stream"), params={"wait": 20}).json()["state"] == "SUCCESS"


def test_given_many_readers_and_some_that_read_nothing_then_they_cost_no_connection_and_delay_nobody(
    stack: GatewayStack, http: httpx.Client
) -> None:
    url = submit(http, inputs=" ".join(f"{'long' * 500}{number}" for number in range(60)))
    parked = http.post("/v1/inference", json={"model": "parked", "inputs": "hello"}).json()["status_url"]
    before = stack.redis.client.info("clients")["connected_clients"]
    stalled = [_request(stack.port, url) for _ in range(3)]  # their socket buffers fill up
    idle = [_request(stack.port, f"{parked}/stream") for _ in range(200)]
    for connection in idle:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    with http.stream("GET", url) as response:
        events = list(events_of(response.iter_lines()))
    assert events[-1].data["state"] == "SUCCESS"
    assert text_of(events) == events[-1].data["result"]["outputs"]["text"]
    assert stack.redis.client.info("clients")["connected_clients"] - before < 20
    assert http.delete(parked).status_code == 200
    for connection in idle:
        assert b"REVOKED" in _rest(connection)
    for connection in stalled:
        connection.close()


def test_given_a_gateway_that_stops_then_its_readers_are_let_go_to_read_on_elsewhere(
    stack: GatewayStack, http: httpx.Client
) -> None:
    port = free_port()
    environment = {"MUAI_MON_SERVER_GRACEFUL_SHUTDOWN_TIMEOUT": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        other: Process = stack.start("gateway", "--port", str(port))
    parked = http.post("/v1/inference", json={"model": "parked", "inputs": "hello"}).json()["status_url"]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as elsewhere:
        wait_until(lambda: _answers(elsewhere), what="the second gateway")
        with elsewhere.stream("GET", f"{parked}/stream") as response:
            other.terminate()
            assert list(events_of(response.iter_lines())) == []
    assert other.popen.wait(timeout=15) == 0
    assert http.delete(parked).status_code == 200


def test_given_nothing_to_tell_then_a_comment_keeps_the_connection(clean_redis: OwnRedis) -> None:
    async def scenario() -> list[bytes]:
        settings = build_settings({"queue": {"broker_url": clean_redis.url}}, {})
        client = state_client(settings.queue.state_url)
        hub = StreamHub(Store(client), client)
        hub.start()
        reading = hub.read("r", patience_s=0.05)
        chunks = [_written(await anext(reading)) for _ in range(2)]
        await reading.aclose()
        hub.close()
        client.close()
        return chunks

    assert asyncio.run(scenario()) == [HEARTBEAT, HEARTBEAT]


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code in (200, 503)
    except httpx.TransportError:
        return False


def _request(port: int, path: str) -> socket.socket:
    """A connection on which a stream was asked for, and nothing read."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: muai\r\nConnection: close\r\n\r\n".encode())
    return connection


def _rest(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    connection.close()
    return b"".join(chunks)
