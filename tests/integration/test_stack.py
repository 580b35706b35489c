"""The whole way of a request through real processes: what plain Celery producers, monitors and bad senders see."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery
from tests.chaos.brokers import RedisServer
from tests.chaos.stack import Stack
from tests.transport_support import free_port, wait_until

from muai_producers import AsyncInferenceClient, InferenceClient
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import MalformedMessageError, ModelNotFoundError, MuaiError, PayloadTooLargeError
from muai_producers.vectors import from_base64
from muai_producers.wire import Parameters

pytestmark = pytest.mark.redis
MODELS = {
    "noop": {"task": "text-classification", "source": "hub:none", "engines": ["fake"]},
    "vectors": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("stack")
    server = RedisServer(folder)
    stack = Stack(server, server, folder, workers={"worker-1": "engine"}, models=MODELS, lease_ttl_s=2.0)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        server.stop()


@pytest.fixture
def plain(stack: Stack) -> Iterator[Celery]:
    """A web app's own Celery application, which knows nothing of MuAI."""
    app = Celery("shop", broker=stack.broker.url(), backend=stack.broker.url(), set_as_current=False)
    app.conf.accept_content = ["json", "msgpack", "pickle"]
    yield app
    app.close()


def send(app: Celery, **options: Any) -> Any:
    kwargs = {"model": "noop", "inputs": {"text": "good morning"}, **options.pop("kwargs", {})}
    return app.send_task("muai.infer", kwargs=kwargs, queue="inference", **options)


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_given_a_plain_celery_producer_then_async_result_gets_the_result(plain: Celery, serializer: str) -> None:
    result = send(plain, serializer=serializer).get(timeout=20)
    assert result["engine_used"] == "fake"
    assert result["outputs"]["labels"][0]["label"] in {"POSITIVE", "NEGATIVE"}


def test_given_our_client_and_a_plain_one_then_both_see_the_same_result(stack: Stack, plain: Celery) -> None:
    request_id = stack.client.submit("noop", "good morning")
    ours = stack.client.result(request_id, timeout_s=20)
    assert plain.AsyncResult(request_id).get(timeout=20)["outputs"] == ours.outputs
    assert stack.client.status(request_id).state == "SUCCESS"


@pytest.mark.parametrize("options", [{}, {"parameters": {"truncate": True}}, {"parameters": Parameters(truncate=True)}])
def test_given_an_embedding_then_it_travels_packed_and_our_client_gives_its_numbers(
    stack: Stack, plain: Celery, options: dict[str, Any]
) -> None:
    request_id = stack.client.submit("vectors", "good morning", **options)
    ours = stack.client.result(request_id, timeout_s=20).outputs["embedding"]
    travelled = plain.AsyncResult(request_id).get(timeout=20)["outputs"]["embedding"]
    assert isinstance(travelled, str)
    assert from_base64(travelled) == ours
    theirs = send(plain, kwargs={"model": "vectors"}).get(timeout=20)["outputs"]["embedding"]
    assert theirs == pytest.approx(ours, abs=1e-6)


def test_given_a_key_then_it_is_one_request_however_its_embedding_is_written(stack: Stack) -> None:
    key = f"key {time.time()}"
    packed = stack.client.submit("vectors", "good morning", idempotency_key=key)
    whole = {"encoding_format": "float"}
    assert stack.client.submit("vectors", "good morning", idempotency_key=key, parameters=whole) == packed


@pytest.mark.parametrize("parameters", [{"encoding_format": "float"}, Parameters(encoding_format="float")])
def test_given_a_caller_who_wants_numbers_on_the_wire_then_they_travel(
    stack: Stack, plain: Celery, parameters: Any
) -> None:
    request_id = stack.client.submit("vectors", "good morning", parameters=parameters)
    ours = stack.client.result(request_id, timeout_s=20).outputs["embedding"]
    assert plain.AsyncResult(request_id).get(timeout=20)["outputs"]["embedding"] == ours


def test_given_a_key_then_infer_gives_the_first_ones_result_again(stack: Stack) -> None:
    key = f"key of infer {time.time()}"
    first = stack.client.infer("noop", "good morning", timeout_s=20, idempotency_key=key)
    again = stack.client.infer("noop", "good morning", timeout_s=20, idempotency_key=key)
    assert again == first
    with InferenceClient(stack.client.settings) as other:
        assert other.infer("noop", "good morning", timeout_s=20, idempotency_key=key) == first


def test_given_a_hundred_awaits_at_once_then_the_async_client_answers_all(stack: Stack) -> None:
    async def run() -> list[str]:
        async with AsyncInferenceClient(stack.settings) as client:
            results = await asyncio.gather(*(client.infer("noop", f"text {n}", timeout_s=20) for n in range(100)))
            return [result.engine_used for result in results]

    assert asyncio.run(run()) == ["fake"] * 100


def test_given_a_pickle_message_then_it_is_refused_told_to_its_sender_and_kept_as_a_dead_letter(
    stack: Stack, plain: Celery
) -> None:
    before = len(DeadLetters(stack.client.store))
    sent = send(plain, serializer="pickle")
    with pytest.raises(MalformedMessageError, match="is refused"):
        sent.get(timeout=20)
    letters = DeadLetters(stack.client.store)
    assert len(letters) == before + 1
    assert next(iter(letters.newest(1))).request_id == sent.id


def test_given_garbage_on_the_queue_then_the_control_worker_keeps_it_and_others_go_on(
    stack: Stack, plain: Celery
) -> None:
    stack.state.client.lpush("inference", pickle.dumps({"not": "a message"}), b"\xff\xfe")
    assert send(plain).get(timeout=20)["engine_used"] == "fake"
    letters = DeadLetters(stack.client.store)
    wait_until(lambda: sum(1 for letter in letters.newest() if not letter.request_id) == 2, what="both to be kept")


def test_given_bad_requests_among_good_ones_then_each_sender_gets_its_own_error(stack: Stack, plain: Celery) -> None:
    cases: list[tuple[dict[str, Any], type[MuaiError]]] = [
        ({"model": "nop"}, ModelNotFoundError),
        ({"inputs": {"text": ""}}, MuaiError),
        ({"inputs": {"text": 7}}, MuaiError),
        ({"inputs": "text"}, MuaiError),
        ({"priority": "high"}, MuaiError),
        ({"deadline": 1.0}, MuaiError),
        ({"surprise": 1}, MuaiError),
        ({"inputs": {"text": "x" * 200_000}}, MuaiError),
    ]
    good = [send(plain) for _ in range(10)]
    bad = [(send(plain, kwargs=kwargs), error) for kwargs, error in cases]
    good += [send(plain) for _ in range(10)]
    for sent, error in bad:
        with pytest.raises(error):
            sent.get(timeout=20)
    assert [sent.get(timeout=20)["engine_used"] for sent in good] == ["fake"] * 20


def test_given_a_payload_of_100_mb_then_client_and_collector_refuse_it_and_neighbours_are_served(
    stack: Stack, plain: Celery
) -> None:
    huge = "x" * 100_000_000
    with pytest.raises(PayloadTooLargeError):
        stack.client.submit("noop", huge)
    before, sent, after = send(plain), send(plain, kwargs={"inputs": {"text": huge}}), send(plain)
    with pytest.raises(PayloadTooLargeError, match="max_payload_mb"):
        sent.get(timeout=60)
    assert before.get(timeout=20)["engine_used"] == after.get(timeout=20)["engine_used"] == "fake"


def test_given_a_revoke_by_celery_itself_then_the_request_ends_as_revoked(stack: Stack, plain: Celery) -> None:
    sent = send(plain, task_id="revoked-before-it-came")
    sent.get(timeout=20)
    plain.control.revoke("never-to-run")
    wait_until(
        lambda: any("never-to-run" in ids for ids in (plain.control.inspect(timeout=2).revoked() or {}).values()),
        what="the revocation to arrive",
    )
    second = send(plain, task_id="never-to-run")
    wait_until(lambda: second.state == "REVOKED", what="the request to be revoked")


def test_given_celery_inspect_then_every_process_answers(stack: Stack) -> None:
    environment = {**os.environ, "MUAI_CONFIG": str(stack.config_file), "PYTHONPATH": os.pathsep.join(sys.path)}
    for app in ("muai_workers.app", "muai_batching.app"):
        command = [sys.executable, "-m", "celery", "-A", app, "inspect", "ping", "--timeout", "5"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        for name in ("collector", "worker-1", "control"):
            assert f"{name}@" in done.stdout


def test_given_flower_then_it_shows_every_process_online_and_batches_as_tasks(stack: Stack, tmp_path: Path) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "MUAI_CONFIG": str(stack.config_file),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FLOWER_UNAUTHENTICATED_API": "true",
    }
    with (tmp_path / "flower.log").open("w") as log:
        command = [sys.executable, "-m", "muai_producers", "flower", "--port", str(port)]
        flower = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
                wait_until(lambda: _answers(http), what="Flower")
                names = {"collector", "worker-1", "control"}
                wait_until(lambda: names <= _online(http), timeout_s=30, what="Flower to see every process")
                stack.client.infer("noop", "for Flower", timeout_s=20)
                wait_until(lambda: _batches(stack, http), what="Flower to show a batch")
        finally:
            flower.terminate()
            flower.wait(timeout=20)


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/healthcheck").status_code == 200
    except httpx.TransportError:
        return False


def _online(http: httpx.Client) -> set[str]:
    workers = http.get("/workers", params={"json": "1"}).json()["data"]
    return {worker["hostname"].split("@")[0] for worker in workers if worker.get("status")}


def _batches(stack: Stack, http: httpx.Client) -> bool:
    with InferenceClient(stack.settings) as client:
        client.infer("noop", "another", timeout_s=20)
    tasks = http.get("/api/tasks").json().values()
    return any(task["name"] == "muai.run_batch" and "noop" in (task["kwargs"] or "") for task in tasks)
