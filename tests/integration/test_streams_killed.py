"""Workers that die or freeze in mid-stream: whoever reads must not see it.

Were one of these to fail, a chat would repeat a sentence, lose one, or end in a text that is not its result's, whenever
a GPU machine is lost.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.chaos.brokers import RedisServer
from tests.chaos.stack import Stack
from tests.transport_support import wait_until

from muai_producers import StreamEvent
from muai_producers.store import StoreKeys

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]
WORDS = " ".join(f"word{number}" for number in range(60))
ANSWER = " ".join(reversed(WORDS.split()))
LIMIT_S = 60.0


def page(events: list[StreamEvent]) -> str:
    text = ""
    for event in events:
        text = "" if event.kind == "restart" else text + event.text
    return text


def runner_of(stack: Stack, request_id: str) -> str:
    """The name of the worker that runs a request, once there is one."""
    found = wait_until(lambda: stack.client.status(request_id).info.get("worker"), what="the request to be started")
    return str(found).partition("@")[0]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("streams")
    server = RedisServer(folder)
    models = {"chatty": {"task": "text-generation", "source": "hub:none", "engines": ["fake"], "max_new_tokens": 100}}
    workers = {"worker-1": "engine", "worker-2": "engine"}
    stack = Stack(server, server, folder, workers=workers, models=models, lease_ttl_s=2.0)
    for name in workers:
        options = {"latency_per_batch_ms": 150.0, "latency_per_piece_ms": 50.0}
        stack.processes[name].environment["MUAI_TEST_FAKE_ENGINE"] = msgspec.json.encode(options).decode()
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        server.stop()


def test_given_a_worker_killed_in_mid_stream_then_its_reader_sees_one_text_that_of_the_result(stack: Stack) -> None:
    request_id = stack.client.submit("chatty", WORDS, stream=True)
    stream = stack.client.stream(request_id, timeout_s=LIMIT_S)
    events = [next(stream) for _ in range(4)]
    stack.processes[runner_of(stack, request_id)].signal(signal.SIGKILL)
    events += stream
    assert page(events) == ANSWER
    assert [event.kind for event in events if event.kind != "text"] == ["result"], "greedy: nothing begins anew"
    stack.wait_whole()


def test_given_a_worker_frozen_in_mid_stream_when_it_wakes_up_then_it_writes_nothing_into_the_stream(
    stack: Stack,
) -> None:
    request_id = stack.client.submit("chatty", WORDS, stream=True)
    stream = stack.client.stream(request_id, timeout_s=LIMIT_S)
    events = [next(stream) for _ in range(4)]
    frozen = runner_of(stack, request_id)
    owner = f"{StoreKeys().stream(request_id)}:owner"
    token = stack.state.client.hget(owner, "token")
    stack.processes[frozen].signal(signal.SIGSTOP)
    try:
        wait_until(lambda: stack.state.client.hget(owner, "token") != token, LIMIT_S, "another worker to take over")
    finally:
        stack.processes[frozen].signal(signal.SIGCONT)  # now two of them tell the same text
    events += stream
    assert page(events) == ANSWER
    assert [event.kind for event in events if event.kind != "text"] == ["result"]
    entries: list[Any] = stack.state.client.xrange(StoreKeys().stream(request_id))
    told = b"".join(fields[b"t"] for _, fields in entries).decode()
    assert ANSWER.startswith(told)
    stack.wait_whole()


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_given_pytorch_killed_in_mid_stream_then_the_text_read_is_that_of_the_result(
    real_stack: Stack, temperature: float
) -> None:
    # With that prompt the model goes on for long; the id gives the seed.
    options = {"id": f"killed-at-{temperature}", "parameters": {"max_tokens": 400, "temperature": temperature}}
    request_id = real_stack.client.submit("endless", "Rain", stream=True, **options)
    stream = real_stack.client.stream(request_id, timeout_s=LIMIT_S)
    events = [next(stream) for _ in range(3)]
    real_stack.processes["worker-1"].signal(signal.SIGKILL)
    events += stream
    assert events[-1].result is not None
    assert events[-1].result.metadata["usage"]["output_tokens"] > 100
    assert page(events) == events[-1].result.outputs["text"]
    assert [event.kind for event in events if event.kind != "text"] == ["result"]
    real_stack.wait_whole()


@pytest.fixture(scope="module")
def real_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    from muai_workers.models.tiny import build_tiny_causal

    folder: Path = tmp_path_factory.mktemp("real-streams")
    source = build_tiny_causal(folder / "endless", train=False, context_tokens=1024)
    models = {"endless": {"task": "text-generation", "source": f"folder:{source}", "engines": ["pytorch"]}}
    server = RedisServer(folder)
    stack = Stack(server, server, folder, workers={"worker-1": "real"}, models=models, lease_ttl_s=2.0)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        server.stop()
