"""`muai submit`, `result`, `status`, `cancel` and `dead` with a state store; the answers are written by the test."""

import io
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.transport_support import OwnRedis, wait_until

from muai_producers.cli.main import run
from muai_producers.cli.running import RunningStack, note_running
from muai_producers.dead_letters import DeadLetters
from muai_producers.errors import DeadlineExceededError, EnginesExhaustedError, MalformedMessageError, MuaiError
from muai_producers.store import Store, failure_answer, success_answer
from muai_producers.streams.store import MORE, StreamStore, Write
from muai_producers.wire import InferenceRequest, InferenceResult

pytestmark = pytest.mark.redis
Muai = Callable[..., tuple[int, str, str]]


@pytest.fixture
def muai(
    clean_redis: OwnRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Muai:
    """Runs the command line; gives exit status, output and complaints."""
    for name in [name for name in os.environ if name.startswith("MUAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUAI_HOME", str(tmp_path))
    monkeypatch.setenv("MUAI_BROKER_URL", clean_redis.url)

    def invoke(*args: str) -> tuple[int, str, str]:
        status = run(args)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke


def queued(redis: OwnRedis, queue: str = "inference") -> list[InferenceRequest]:
    """The requests in a queue, oldest first."""
    messages = [json.loads(json.loads(raw)["body"])[1] for raw in redis.client.lrange(queue, 0, -1)[::-1]]
    return [InferenceRequest(**message) for message in messages]


def answer(text: str = "42") -> InferenceResult:
    return InferenceResult(
        outputs={"text": text}, engine_used="fake", latency_ms=5.0, batch_size=2, cache_hit=False, metadata={}
    )


def serve(
    redis: OwnRedis, store: Store, outcomes: Sequence[InferenceResult | EnginesExhaustedError]
) -> threading.Thread:
    """Answer the next requests in turn, as workers would."""

    def work() -> None:
        wait_until(lambda: redis.client.llen("inference") >= len(outcomes))
        for request, outcome in zip(queued(redis), outcomes, strict=True):
            if isinstance(outcome, InferenceResult):
                store.answer([success_answer(request, outcome)])
            else:
                store.answer([failure_answer(request.id, outcome, request.reply_to)])

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_Given_options_When_submitted_Then_the_request_carries_them(muai: Muai, clean_redis: OwnRedis) -> None:
    status, out, _ = muai("submit", "m", "hi", "--priority", "9", "--tenant", "t", "--param", "max_tokens=3")
    assert status == 0
    [request] = queued(clean_redis, "inference.high")
    assert (request.id, request.model, request.inputs, request.tenant) == (out.strip(), "m", {"text": "hi"}, "t")
    assert request.parameters == {"max_tokens": 3}


def test_Given_a_wrong_parameter_Then_it_is_one_line_and_nothing_is_queued(muai: Muai, clean_redis: OwnRedis) -> None:
    status, _, err = muai("submit", "m", "hi", "--param", "max_tokns=3")
    assert status == 1
    assert err.startswith("invalid_request: ")
    assert err.count("\n") == 1
    assert queued(clean_redis) == []


def test_Given_standard_input_Then_it_is_the_text(
    muai: Muai, clean_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    muai("submit", "m", "-")
    assert [request.inputs for request in queued(clean_redis)] == [{"text": "two\nlines"}]


def test_Given_wait_Then_the_result_is_printed(muai: Muai, clean_redis: OwnRedis, store: Store) -> None:
    worker = serve(clean_redis, store, [answer()])
    status, out, err = muai("submit", "m", "hi", "--wait", "--timeout-s", "20")
    worker.join()
    assert (status, out) == (0, "42\n")
    assert err == "(fake; 5 ms; in a batch of 2)\n"


def test_Given_a_file_and_one_failure_Then_each_outcome_is_a_json_line_and_the_status_says_so(
    muai: Muai, clean_redis: OwnRedis, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('"one"\n{"text": "two"}\n')
    worker = serve(clean_redis, store, [answer("1"), EnginesExhaustedError("none left", {"attempts": []})])
    status, out, _ = muai("submit", "m", "--file", "in.jsonl", "--wait", "--timeout-s", "20", "--json")
    worker.join()
    lines = {line["state"]: line for line in map(json.loads, out.splitlines())}
    assert status == 1
    assert lines["SUCCESS"]["outputs"] == {"text": "1"}
    assert lines["FAILURE"]["error"]["code"] == "engines_exhausted"


def test_Given_more_than_fits_Then_what_was_accepted_is_named(
    muai: Muai, clean_redis: OwnRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUAI_MON_SERVER_QUEUE_CAPACITY", "600")
    (tmp_path / "in.txt").write_text("x\n" * 700)
    status, out, err = muai("submit", "m", "--file", "in.txt")
    assert status == 1
    assert err.startswith("queue_full: ")
    assert "500 requests were accepted before that" in err
    assert sorted(out.split()) == sorted(request.id for request in queued(clean_redis))


def test_Given_neither_text_nor_file_Then_it_is_wrong_usage(muai: Muai) -> None:
    assert muai("submit", "m")[0] == 2
    assert muai("submit", "m", "text", "--file", "/dev/null")[0] == 2


def test_Given_a_request_under_way_Then_status_result_and_cancel_say_how_it_stands(
    muai: Muai, clean_redis: OwnRedis, store: Store
) -> None:
    request_id = muai("submit", "m", "hi")[1].strip()
    store.mark("BATCHED", [request_id], {"engine": "onnx"})
    assert muai("status", request_id)[1] == f'{request_id}  BATCHED  {{"engine": "onnx"}}\n'
    status, _, err = muai("result", request_id)
    assert status == 1
    assert err.startswith("result_timeout: ")
    assert muai("cancel", request_id) == (0, f"{request_id}  cancelled\n", "")
    assert muai("cancel", request_id)[0] == 1
    status, out, _ = muai("result", request_id, "--json")
    assert (status, json.loads(out)["error"]["code"]) == (1, "cancelled")


def test_Given_a_store_that_is_away_Then_it_is_one_line(muai: Muai, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUAI_BROKER_URL", "redis://127.0.0.1:1/0")
    for command in (("submit", "m", "hi"), ("status", "x"), ("cancel", "x"), ("dead", "list")):
        status, _, err = muai(*command)
        assert status == 1
        assert err.startswith("broker_unavailable: ")
        assert err.count("\n") == 1


def test_Given_a_running_installation_Then_its_broker_is_found_without_being_named(
    muai: Muai, clean_redis: OwnRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MUAI_BROKER_URL")
    note_running(tmp_path, RunningStack(os.getpid(), {"MUAI_BROKER_URL": clean_redis.url}))
    assert muai("submit", "m", "hi")[0] == 0
    assert len(queued(clean_redis)) == 1
    assert (tmp_path / "up.json").stat().st_mode & 0o077 == 0


@pytest.fixture
def letters(store: Store) -> DeadLetters:
    """Two dead letters: a request, and a message that is none."""
    letters = DeadLetters(store)
    request = InferenceRequest(
        id="old", model="m", inputs={"text": "hi"}, deadline=1.0, idempotency_key="k", submitted_at=1.0
    )
    letters.add(request, EnginesExhaustedError("none left", {"attempts": []}))
    letters.add_message("bad", b"\xff{", MalformedMessageError("unreadable"))
    return letters


def test_Given_dead_letters_Then_they_are_listed_and_shown(muai: Muai, letters: DeadLetters) -> None:
    listed = [json.loads(line) for line in muai("dead", "list", "--json")[1].splitlines()]
    assert [entry["request_id"] for entry in listed] == ["bad", "old"]
    assert "engines_exhausted" in muai("dead", "list")[1]
    shown: dict[str, Any] = json.loads(muai("dead", "show", "bad")[1])
    assert shown["raw"] == "\\xff{"
    status, _, err = muai("dead", "show", "nobody")
    assert status == 1
    assert err.startswith("request_not_found: ")


def test_Given_dead_letters_When_replayed_Then_the_request_goes_again_and_its_entry_leaves(
    muai: Muai, letters: DeadLetters, clean_redis: OwnRedis
) -> None:
    status, out, err = muai("dead", "replay", "--all")
    [request] = queued(clean_redis)
    assert out == f"old → {request.id}\n"
    assert (request.inputs, request.deadline, request.idempotency_key) == ({"text": "hi"}, None, None)
    assert status == 1  # the other one is no request
    assert "not a request" in err
    assert [letter.request_id for letter in letters.newest()] == ["bad"]


def test_Given_a_replay_cut_off_before_its_entry_left_When_done_again_Then_there_is_one_request(
    muai: Muai, letters: DeadLetters, clean_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DeadLetters, "remove", lambda *_: 0)
        muai("dead", "replay", "old")
    muai("dead", "replay", "old")
    assert len(queued(clean_redis)) == 1
    assert len(letters) == 1


def test_Given_no_room_When_replayed_Then_the_entry_stays(
    muai: Muai, letters: DeadLetters, clean_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUAI_MON_SERVER_QUEUE_CAPACITY", "1")
    muai("submit", "m", "hi")
    status, _, err = muai("dead", "replay", "old")
    assert status == 1
    assert err.startswith("queue_full: ")
    assert len(letters) == 2


def test_Given_purge_Then_it_asks_unless_told_not_to(
    muai: Muai, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert muai("dead", "purge", "--all")[0] == 130
    assert len(letters) == 2
    assert muai("dead", "purge", "old", "--yes")[1] == "1 purged\n"
    assert muai("dead", "purge", "--all", "--yes")[1] == "1 purged\n"
    assert muai("dead", "list")[1] == "no dead letters\n"


def test_Given_no_entries_Then_replay_and_purge_want_to_know(muai: Muai) -> None:
    assert muai("dead", "replay")[0] == 2
    assert muai("dead", "purge", "x", "--all")[0] == 2


def tell(
    redis: OwnRedis, store: Store, pieces: Sequence[str], outcome: InferenceResult | MuaiError
) -> threading.Thread:
    """Tell the next request's text in pieces, then answer it, as a worker would."""

    def work() -> None:
        wait_until(lambda: redis.client.llen("inference") >= 1)
        (request,) = queued(redis)
        assert request.stream
        streams, told = StreamStore(store, ttl_s=60), 0
        streams.claim("w", [request.id])
        for number, piece in enumerate(pieces):
            streams.append([Write(request.id, "w", number, MORE, told, piece)])
            told += len(piece)
        if isinstance(outcome, MuaiError):
            store.answer([failure_answer(request.id, outcome, request.reply_to)])
        else:
            store.answer([success_answer(request, outcome)])

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_Given_a_stream_When_submitted_Then_the_text_is_printed_whole_and_once(
    muai: Muai, clean_redis: OwnRedis, store: Store
) -> None:
    thread = tell(clean_redis, store, ["forty", "-two"], answer("forty-two"))
    status, out, err = muai("submit", "m", "hi", "--stream")
    thread.join()
    assert (status, out) == (0, "forty-two\n")
    assert "(fake; 5 ms" in err


def test_Given_a_stream_as_json_When_submitted_Then_each_event_is_a_line(
    muai: Muai, clean_redis: OwnRedis, store: Store
) -> None:
    thread = tell(clean_redis, store, ["seven"], answer("forty-two"))
    status, out, _ = muai("submit", "m", "hi", "--stream", "--json")
    thread.join()
    events = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    text = ""
    for event in events:
        text = "" if event["event"] == "restart" else text + event["text"]
    assert text == events[-1]["result"]["outputs"]["text"] == "forty-two"


def test_Given_a_stream_that_fails_When_submitted_Then_the_error_has_a_line_of_its_own(
    muai: Muai, clean_redis: OwnRedis, store: Store
) -> None:
    thread = tell(clean_redis, store, ["forty"], DeadlineExceededError("too late"))
    status, out, err = muai("submit", "m", "hi", "--stream")
    thread.join()
    assert (status, out) in [(1, "forty\n"), (1, "")]
    assert err == "deadline_exceeded: too late\n"


def test_Given_a_file_and_stream_When_submitted_Then_the_usage_is_explained(muai: Muai, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n")
    status, _, err = muai("submit", "m", "--file", "lines.txt", "--stream")
    assert status == 2
    assert "--stream" in err
