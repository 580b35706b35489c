"""Files and batches by OpenAI's own clients against `muai up`, with no change but the base URL.

Were these to fail, whoever has a batch program for OpenAI could not run it here, or would lose lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch
from tests.node_support import node_script
from tests.transport_support import wait_until
from tests.up_support import Up

pytestmark = [pytest.mark.redis, pytest.mark.timeout(240)]
MODELS = {
    "chatty": {"task": "chat", "source": "hub:none", "engines": ["fake"]},
    "writer": {"task": "text-generation", "source": "hub:none", "engines": ["fake"]},
    "vectors": {"task": "embedding", "source": "hub:none", "engines": ["fake"]},
    "parked": {"task": "embedding", "source": "hub:none", "engines": ["onnx"]},
}
CHAT, EMBED, COMPLETE = "/v1/chat/completions", "/v1/embeddings", "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = tmp_path_factory.mktemp("batches")
    up = Up(home, sections={"models": MODELS})
    try:
        # Degraded, not healthy: no worker serves `parked`.
        wait_until(lambda: is_serving(up), 60.0, "an answer")
        yield up
    finally:
        up.stop()


def is_serving(up: Up) -> bool:
    try:
        answer = httpx.post(f"{up.url}/v1/inference?wait=5", json={"model": "vectors", "inputs": "x"}, timeout=10)
    except httpx.TransportError:
        return False
    return answer.status_code == 200


@pytest.fixture
def client(up: Up) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
        yield client


def line(custom_id: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def start(client: OpenAI, endpoint: Any, lines: Sequence[str], window: str = "24h") -> Batch:
    content = "\n".join(lines).encode()
    file = client.files.create(file=("input.jsonl", content), purpose="batch")
    assert (file.bytes, file.purpose, file.filename) == (len(content), "batch", "input.jsonl")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window)  # type: ignore[arg-type]


def finished(client: OpenAI, batch: Batch, timeout_s: float = 90.0) -> Batch:
    def look() -> Batch | None:
        seen = client.batches.retrieve(batch.id)
        time.sleep(0.05)
        return seen if seen.status in ENDED else None

    ended: Batch = wait_until(look, timeout_s, f"the end of {batch.id}")
    return ended


def read(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The answers by their custom_id, each of which must be there once."""
    assert file_id is not None
    answers = [json.loads(one) for one in client.files.content(file_id).text.splitlines()]
    assert Counter(one["custom_id"] for one in answers).most_common(1)[0][1] == 1
    return {one["custom_id"]: one for one in answers}


def test_given_a_thousand_lines_then_each_is_answered_once_and_says_what_the_endpoint_says(client: OpenAI) -> None:
    lines = [
        line(f"q-{number}", CHAT, model="chatty", messages=[{"role": "user", "content": f"{number} two three"}])
        for number in range(1000)
    ]
    batch = finished(client, start(client, CHAT, lines))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (1000, 1000, 0)
    assert batch.error_file_id is None
    answers = read(client, batch.output_file_id)
    assert set(answers) == {f"q-{number}" for number in range(1000)}
    for number in range(1000):
        answer = answers[f"q-{number}"]
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == f"three two {number}"
        assert answer["error"] is None
    assert answers["q-0"]["response"]["body"]["usage"]["total_tokens"] == 6
    assert batch.in_progress_at is not None
    assert batch.completed_at is not None
    output = client.files.retrieve(batch.output_file_id or "")
    assert output.purpose == "batch_output"
    assert batch.id in {one.id for one in client.batches.list(limit=5)}


def test_given_lines_of_several_inputs_or_answers_then_each_line_is_one_answer(client: OpenAI) -> None:
    batch = finished(
        client,
        start(client, EMBED, [line("many", EMBED, model="vectors", input=["a", "b", "c"], encoding_format="base64")]),
    )
    body = read(client, batch.output_file_id)["many"]["response"]["body"]
    assert [one["index"] for one in body["data"]] == [0, 1, 2]
    assert isinstance(body["data"][0]["embedding"], str)
    batch = finished(client, start(client, COMPLETE, [line("two", COMPLETE, model="writer", prompt="a b", n=2)]))
    choices = read(client, batch.output_file_id)["two"]["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == ["b a", "b a"]


def test_given_lines_that_fail_then_they_are_in_the_error_file_by_their_custom_id(client: OpenAI) -> None:
    lines = [
        line("good", EMBED, model="vectors", input="fine"),
        line("bad", EMBED, model="vectors", input="BAD"),
        line("poison", EMBED, model="vectors", input="POISON"),
        line("model", EMBED, model="gpt-9", input="x"),
        line("field", EMBED, model="vectors", input="x", colour="red"),
    ]
    batch = finished(client, start(client, EMBED, lines))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 4)
    assert set(read(client, batch.output_file_id)) == {"good"}
    errors = read(client, batch.error_file_id)
    told = {
        name: (one["response"]["status_code"], one["response"]["body"]["error"]["code"]) for name, one in errors.items()
    }
    assert told == {
        "bad": (400, "invalid_request"),
        "poison": (502, "engines_exhausted"),
        "model": (404, "model_not_found"),
        "field": (400, "invalid_request"),
    }
    assert errors["field"]["response"]["body"]["error"]["param"] == "colour"


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([], "empty_file", None),
        (["{"], "invalid_line", 1),
        (
            [line("a", EMBED, model="vectors", input="x"), line("b", CHAT, model="chatty", messages=[])],
            "invalid_line",
            2,
        ),
        ([line("a", EMBED, model="vectors", input="x")] * 2, "duplicate_custom_id", 2),
    ],
)
def test_given_a_file_that_is_no_input_then_the_batch_fails_and_names_the_line(
    client: OpenAI, lines: list[str], code: str, number: int | None
) -> None:
    batch = finished(client, start(client, EMBED, lines))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    problem = batch.errors.data[0]
    assert (problem.code, problem.line) == (code, number)
    assert problem.message


def test_given_a_batch_that_is_cancelled_then_what_is_done_stays_and_the_rest_is_named(up: Up, client: OpenAI) -> None:
    lines = [line("done", EMBED, model="vectors", input="x")]
    lines += [line(f"parked-{number}", EMBED, model="parked", input="x") for number in range(200)]
    batch = start(client, EMBED, lines)

    def one_is_done() -> bool:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed == 1

    wait_until(one_is_done, 30.0, "the line that can be done")
    with pytest.raises(openai.ConflictError) as used:
        client.files.delete(batch.input_file_id)
    assert used.value.code == "file_in_use"
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    ended = finished(client, batch)
    assert ended.status == "cancelled"
    assert ended.cancelled_at is not None
    assert set(read(client, ended.output_file_id)) == {"done"}
    errors = read(client, ended.error_file_id)
    assert len(errors) == 200
    assert {one["error"]["code"] for one in errors.values()} == {"batch_cancelled"}
    wait_until(lambda: up.redis().hlen("muai:inflight") == 0, what="nothing of it to be left in the queue")
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_given_a_window_that_ends_then_the_batch_expires_with_what_is_done(up: Up, client: OpenAI) -> None:
    lines = [line("done", EMBED, model="vectors", input="x"), line("late", EMBED, model="parked", input="x")]
    batch = start(client, EMBED, lines, window="1m")

    def one_is_done() -> bool:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed == 1

    wait_until(one_is_done, 30.0, "the line that can be done")
    store = up.redis()
    record = json.loads(store.hget(f"muai:batch:{batch.id}", "record") or b"")  # type: ignore[arg-type]
    # As if the minute were over: the runner writes over what it has read, so the version moves as well.
    store.hset(f"muai:batch:{batch.id}", "record", json.dumps({**record, "expires_at": int(time.time()) - 1}))
    ended = finished(client, batch)
    assert ended.status == "expired"
    assert set(read(client, ended.output_file_id)) == {"done"}
    assert read(client, ended.error_file_id)["late"]["error"]["code"] == "batch_expired"


@pytest.mark.parametrize(
    ("options", "code", "status"),
    [
        ({"input_file_id": "file-none"}, "file_not_found", 404),
        ({"endpoint": "/v1/images"}, "invalid_request", 400),
        ({"completion_window": "9999h"}, "invalid_request", 400),
        ({"completion_window": "soon"}, "invalid_request", 400),
    ],
)
def test_given_a_wrong_batch_then_it_is_refused_with_the_field(
    client: OpenAI, options: dict[str, Any], code: str, status: int
) -> None:
    file = client.files.create(file=("x.jsonl", b"{}"), purpose="batch")
    body: dict[str, Any] = {"input_file_id": file.id, "endpoint": EMBED, "completion_window": "24h", **options}
    with pytest.raises(openai.APIStatusError) as refused:
        client.batches.create(**body)
    assert (refused.value.status_code, refused.value.code) == (status, code)


def test_given_files_then_they_are_listed_read_and_deleted(client: OpenAI) -> None:
    first = client.files.create(file=("a.txt", b"alpha"), purpose="user_data")
    second = client.files.create(file=("b.txt", b"beta"), purpose="user_data")
    listed = [one.id for one in client.files.list(purpose="user_data")]
    assert listed[:2] == [second.id, first.id]
    assert client.files.content(first.id).read() == b"alpha"
    assert client.files.delete(first.id).deleted
    empty = client.files.create(file=("empty.txt", b""), purpose="user_data")
    assert (empty.bytes, client.files.delete(empty.id).deleted) == (0, True)
    with pytest.raises(openai.NotFoundError) as gone:
        client.files.content(first.id)
    assert gone.value.code == "file_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("x", b"x"), purpose="fine-tune")
    assert refused.value.param == "purpose"


def test_given_the_javascript_client_then_its_batch_completes_too(
    up: Up, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = node_script(tmp_path_factory, "batches.mjs")
    environment = {**os.environ, "MUAI_URL": up.url, "MUAI_LINES": "1000"}
    done = subprocess.run(
        ["node", str(script)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["status"] == "completed"
    assert seen["counts"] == {"total": 1000, "completed": 1000, "failed": 0}
    assert seen["metadata"] == {"from": "node"}
    assert seen["customIds"] == sorted(f"line-{number}" for number in range(1000))
    assert (seen["statusCodes"], seen["dimensions"]) == ([200], [8])
    assert (seen["listed"], seen["deleted"]) == (True, True)
